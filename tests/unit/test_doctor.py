"""The doctor on this machine, and with things missing or taken."""

from __future__ import annotations

import json
import socket
from collections import namedtuple
from importlib import metadata

from tests.ports import free_port
from unimoe_ray import doctor

GIB = 2**30


def _by_name(found: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {item.name: item for item in found}


def test_json_is_one_object_and_agrees_with_the_exit_code(capsys) -> None:
    code = doctor.run(json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    assert {item["level"] for item in printed["findings"]} <= {"ok", "warn", "fail"}
    found = {item["name"]: item for item in printed["findings"]}
    assert found["torch"]["value"] == metadata.version("torch")
    assert {"CPU cores", "CPU bf16", "memory", "shared memory", "port 8265", "token authentication"} <= set(found)
    assert all(item["advice"] for item in printed["findings"] if item["level"] != "ok")


def test_table_shows_every_finding_and_a_verdict(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code = doctor.run(json=False)
    text = capsys.readouterr().out
    assert "deepspeed" in text and "port 8000" in text
    assert ("ready" in text.splitlines()[-1]) == (code == 0)


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as sock:
        port = free_port()
        sock.bind(("127.0.0.1", port))
        sock.listen()
        assert not doctor.port_is_free(port)
    assert doctor.port_is_free(port)


def test_a_missing_package_fails_and_says_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "surely-not-installed"))
    assert doctor.run(json=True) == 1
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["findings"]}
    assert found["surely-not-installed"]["level"] == "fail"
    assert "install" in found["surely-not-installed"]["advice"]
    assert found["torch"]["level"] == "ok"


def test_a_version_that_is_not_the_pinned_one_is_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_pins", lambda: {"ray": "1.2.3"})
    ray = _by_name(list(doctor._software()))["ray"]
    assert ray.level == "warn" and "1.2.3" in ray.advice


def test_a_full_disk_fails_and_a_small_shared_memory_warns(monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(GIB, GIB, GIB // 8))
    found = _by_name(list(doctor._disk()))
    assert {found[name].level for name in ("here", "cache", "/tmp")} == {"fail"}
    assert found["shared memory"].level == "warn" and "--shm-size" in found["shared memory"].advice


def test_no_compiler_is_a_warning_that_names_the_package(monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    found = _by_name(list(doctor._compilers()))
    assert found["C compiler"].level == "warn" and "gcc" in found["C compiler"].advice
    assert found["ninja"].level == "warn"


def test_token_authentication_settings(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def setting() -> doctor.Finding:
        return _by_name(list(doctor._ray()))["token authentication"]

    assert setting().level == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert setting().level == "warn" and "auth_token" in setting().advice
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret-value")
    assert setting().level == "ok" and "secret-value" not in setting().value
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert setting().level == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "tokn")
    assert setting().level == "fail"
