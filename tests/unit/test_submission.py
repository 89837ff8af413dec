"""What `unimoe submit` sends, what it refuses, and a job's output over connections that are lost."""

from __future__ import annotations

import asyncio
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.unit.test_cli import fails, prints
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.submission import jobs, logs
from unimoe_ray.submission.client import Refused, Unreachable, connect
from unimoe_ray.submission.package import MAX_BYTES, SOURCE, pack

JOB = "job-1"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder of a user's own, as the current one."""
    folder = tmp_path / "project"
    for name in ("jobs/mine.py", "my.yaml", "tool.py", "deep/__init__.py", "deep/work.py", ".venv/lib/a.py", ".git/x"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (folder / "my.yaml").write_text("name: mine\n")
    monkeypatch.chdir(folder)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return folder


# What is sent


def test_a_folder_is_sent_with_the_library_and_its_jobs(project):
    files = pack("jobs/tune.py", project).files
    assert {"jobs/mine.py", "my.yaml", "tool.py", "deep/work.py"} <= files.keys()
    assert files["jobs/tune.py"] == SOURCE / "jobs" / "tune.py"
    assert "unimoe_ray/data/plan.py" in files and "serve/ui/index.html" in files
    assert "unimoe_ray/config/presets/mini.yaml" in files
    assert not any(part in name for name in files for part in (".venv", ".git", "__pycache__"))


def test_a_checkout_is_sent_as_it_is():
    files = pack("jobs/tune.py", SOURCE, excludes=["/tests"]).files
    assert files["unimoe_ray/cli.py"] == SOURCE / "unimoe_ray" / "cli.py" and "Makefile" in files
    assert not any(name.startswith(("tests/", ".venv/", ".git/")) or "__pycache__" in name for name in files)


@pytest.mark.parametrize(
    ("job", "target"),
    [
        ("jobs/tune.py", ("-m", "jobs.tune")),
        ("./jobs/tune.py", ("-m", "jobs.tune")),
        ("jobs/mine.py", ("-m", "jobs.mine")),
        ("deep/work.py", ("-m", "deep.work")),
        ("tool.py", ("tool.py",)),
    ],
)
def test_what_python_is_told_to_run(project, job, target):
    assert pack(job, project).target == target
    assert pack(str(project / job), project).target == target


def test_the_own_file_of_a_name_wins(project):
    (project / "jobs" / "tune.py").write_text("own")
    assert pack("jobs/tune.py", project).files["jobs/tune.py"] == project / "jobs" / "tune.py"


def test_ignore_files_and_patterns_are_heeded(project):
    (project / ".gitignore").write_text("*.log\n")
    (project / ".rayignore").write_text("/deep\n")
    (project / "a.log").write_text("")
    (project / "runs").mkdir()
    (project / "runs" / "weights").write_text("")
    files = pack("tool.py", project, excludes=["/runs"]).files
    assert "tool.py" in files
    assert not any(name == "a.log" or name.startswith(("deep/", "runs/")) for name in files)


def test_the_same_files_make_the_same_archive(project, tmp_path):
    archives = []
    for name in ("a.zip", "b.zip"):
        (project / "tool.py").touch()
        pack("tool.py", project).write(tmp_path / name)
        archives.append((tmp_path / name).read_bytes())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("my.yaml") == b"name: mine\n" and archive.testzip() is None


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("jobs/tun.py", "jobs/tun.py: no such job; did you mean jobs/tune.py? (jobs: jobs/ablate.py, "),
        ("tol.py", "tol.py: no such job; did you mean tool.py?"),
        ("zzz", "zzz: no such job; did you mean jobs/"),
        ("../other.py", "../other.py: outside of the current folder, of which the job gets a copy"),
        (".venv/lib/a.py", ".venv/lib/a.py: left out of what is sent, by .gitignore, .rayignore or --exclude"),
    ],
)
def test_jobs_that_are_not_there(project, job, line):
    with pytest.raises(UsageError) as error:
        pack(job, project)
    assert str(error.value).startswith(line)


def test_a_folder_that_is_too_large_names_what_is(project):
    (project / "weights").mkdir()
    with open(project / "weights" / "model.bin", "wb") as file:
        file.truncate(MAX_BYTES)
    with pytest.raises(UsageError, match=r"at most 100\.0 MiB; the largest: weights/ 100\.0 MiB, unimoe_ray/ "):
        pack("tool.py", project)
    assert pack("tool.py", project, excludes=["*.bin"]).size < MAX_BYTES


# The command line


def test_a_dry_run_needs_no_cluster(project, capsys):
    out = prints(capsys, "submit", "jobs/mine.py", "--config", "my.yaml", "--env", "A=sesame", "--dry-run", "seed=3")
    assert "\nseed: 3\n" in out and "# variable: A\n" in out and "sesame" not in out
    assert "# runs: python -m jobs.mine --config my.yaml seed=3\n" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trainng.workers=1"], "unknown key 'trainng'; did you mean 'training'?"),
        (["--config", "../other.yaml"], "--config ../other.yaml: outside of the current folder"),
        (["--config", "my.yaml", "--exclude", "*.yaml"], "my.yaml: left out of what is sent"),
        (["--env", "A-B=1"], "--env A-B: not the name of a variable"),
        (["--env", "NOT_SET_ANYWHERE"], "--env NOT_SET_ANYWHERE: not set here; write NOT_SET_ANYWHERE=VALUE"),
        (["--address", "nonsense"], "'nonsense' is no address of a cluster; write http://HOST:8265"),
    ],
)
def test_mistakes(project, capsys, arguments, line):
    (project.parent / "other.yaml").write_text("name: other\n")
    code, found = fails(capsys, "submit", "jobs/tune.py", *arguments)
    assert code == 2 and found.startswith(line)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_no_cluster_at_the_address(project, capsys, address):
    code, line = fails(capsys, "submit", "jobs/tune.py", "--address", address)
    assert code == 1 and line.startswith(f"{address}: no Ray cluster answers there")


def test_no_cluster_on_this_machine(project, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    code, line = fails(capsys, "jobs", "list")
    assert code == 1 and line.startswith("no Ray cluster was started on this machine: start one with ray start --head")


# A server that plays the dashboard


class Dashboard:
    """Plays Ray's Jobs API: one job, whose output is ``text``; ``drops`` says what becomes of each connection."""

    def __init__(self) -> None:
        self.text, self.status, self.drops = "", "RUNNING", []
        self.answers: dict[str, tuple[int, str]] = {}
        self.connections = 0
        self.url = ""

    async def version(self, request: web.Request) -> web.Response:
        return self._answer("version") or web.json_response(
            {"ray_version": "2.60.0", "session_name": "session_elsewhere"}
        )

    async def job(self, request: web.Request) -> web.Response:
        return self._answer("job") or web.json_response(self._details())

    async def listed(self, request: web.Request) -> web.Response:
        return self._answer("jobs") or web.json_response([self._details()])

    async def package(self, request: web.Request) -> web.Response:
        return web.Response()

    async def output(self, request: web.Request) -> web.Response:
        return self._answer("logs") or web.json_response({"logs": self.text})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        """From the start, as Ray does it: cut off after so many characters, or silent from there, or whole."""
        drop = self.drops[min(self.connections, len(self.drops) - 1)]
        self.connections += 1
        if drop == "refuse":
            raise web.HTTPBadGateway
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        how, after = drop
        for start in range(0, after, 7):
            await socket.send_str(self.text[start : min(start + 7, after)])
        if how == "cut":
            request.transport.abort()
        elif how == "silent":
            await asyncio.sleep(200)
        elif how == "end":
            self.status = "SUCCEEDED"
        return socket

    def _answer(self, what: str) -> web.Response | None:
        if what not in self.answers:
            return None
        status, text = self.answers[what]
        return web.Response(status=status, text=text)

    def _details(self) -> dict:
        code = {"SUCCEEDED": 0, "FAILED": 2}.get(self.status)
        message = "failed with exit code 2, last available logs:\nbefore\nthe reason" if code else None
        return {
            "type": "SUBMISSION",
            "submission_id": JOB,
            "status": self.status,
            "entrypoint": "python -m jobs.tune",
            "driver_exit_code": code,
            "message": message,
            "start_time": 1_700_000_000_000,
            "end_time": 1_700_000_063_000,
        }


@contextmanager
def serving(played: Dashboard):
    """On a free port of this machine, in a thread."""
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/api/version", played.version)
    app.router.add_route("*", "/api/jobs/", played.listed)
    app.router.add_route("*", "/api/packages/{protocol}/{name}", played.package)
    app.router.add_get("/api/jobs/{job}", played.job)
    app.router.add_get("/api/jobs/{job}/logs", played.output)
    app.router.add_get("/api/jobs/{job}/logs/tail", played.tail)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    played.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    try:
        yield played
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def dashboard(project):
    with serving(Dashboard()) as played:
        yield played


LINES = "".join(f"line {number} äöü\n" for number in range(40))


@pytest.mark.parametrize(
    "drops",
    [
        [("end", len(LINES))],
        [("cut", 0), ("cut", 50), ("cut", 50), ("cut", 311), ("end", len(LINES))],
        [("silent", 100), ("end", len(LINES))],
        [("close", 100), ("end", len(LINES))],
        [("cut", 30), "refuse", ("end", len(LINES))],
        [("end", 200)],  # The end comes by the last request.
    ],
    ids=["whole", "cut", "silent", "closed", "refused", "early"],
)
def test_output_comes_once_and_whole(dashboard, drops):
    dashboard.text, dashboard.drops = LINES, drops
    written, said = [], []
    client = connect(dashboard.url)
    # Where nobody is silent on purpose, a slow machine is not taken for it.
    silence = 3.0 if any(drop[0] == "silent" for drop in drops) else 100.0
    details = logs.follow(client, JOB, written.append, said.append, silence_s=silence, pause_s=0.01)
    assert "".join(written) == LINES
    assert details.status.value == "SUCCEEDED" and dashboard.connections == len(drops) and said == []


def test_output_is_had_without_websockets(dashboard):
    """Some proxies pass none: then it is asked for again and again."""
    dashboard.text, dashboard.drops = LINES[:100], ["refuse"]
    written = []

    def write(text: str) -> None:
        written.append(text)
        dashboard.text, dashboard.status = LINES, "SUCCEEDED" if len(written) > 1 else "RUNNING"

    logs.follow(connect(dashboard.url), JOB, write, written.append, pause_s=0.01)
    assert "".join(written) == LINES and dashboard.connections >= 2


def test_a_cluster_that_is_gone_is_waited_for_and_then_given_up(project):
    said = []
    with serving(Dashboard()) as played:
        played.text, played.drops = LINES, [("cut", 10)]
        client = connect(played.url)
    with pytest.raises(Unreachable):
        logs.follow(client, JOB, said.append, said.append, pause_s=0.01, patience_s=0.05)
    assert len(said) == 1 and said[0].endswith("trying again")


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 2), ("STOPPED", 1)])
def test_the_exit_code_is_the_jobs(dashboard, capsys, status, code):
    dashboard.text, dashboard.drops, dashboard.status = "before\nthe reason\n", [("close", 18)], status
    assert jobs.follow_to_end(connect(dashboard.url), JOB, None) == code
    out, err = capsys.readouterr()
    assert out == "before\nthe reason\n"
    words = {"SUCCEEDED": "succeeded", "FAILED": "failed with exit code 2", "STOPPED": "was stopped"}[status]
    assert err == f"unimoe: {JOB} {words} after 1 min 03 s\n"


def test_the_status_of_a_failed_job_has_its_last_lines_once(dashboard, capsys):
    dashboard.status = "FAILED"
    out = prints(capsys, "jobs", "status", "job", "--address", dashboard.url)
    assert out == f"{JOB} failed with exit code 2 after 1 min 03 s: python -m jobs.tune\n  before\n  the reason\n"


def test_a_job_that_is_not_there(dashboard, capsys):
    code, line = fails(capsys, "jobs", "logs", "jub-1", "--address", dashboard.url)
    assert code == 2 and line == f"jub-1: no such job of {dashboard.url}; did you mean {JOB}?"


@pytest.mark.parametrize(
    ("what", "answer", "kind", "line"),
    [
        ("version", (404, "Not found"), UnimoeError, "this is no Ray dashboard"),
        ("version", (200, "<html>hello</html>"), UnimoeError, "this is no Ray dashboard"),
        ("version", (401, "Unauthorized: Missing authentication token"), UnimoeError, "the cluster wants its token"),
        ("version", (403, "Forbidden: Invalid authentication token"), UnimoeError, "the token of "),
        ("jobs", (500, "No available agent to submit job, please try again later."), Refused, "has no job agent"),
        ("jobs", (500, "Traceback:\n  File x\nValueError: disk is full"), Refused, r"ValueError: disk is full \(500\)"),
    ],
)
def test_answers_that_are_errors(dashboard, what, answer, kind, line):
    dashboard.answers[what] = answer
    with pytest.raises(kind, match=line) as error:
        connect(dashboard.url).submit_job(entrypoint="true")
    assert dashboard.url in str(error.value) and "\n" not in str(error.value)


def test_tokens_are_named_by_their_place_only(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame-0123456789")
    for status in (401, 403):
        dashboard.answers["version"] = (status, "no")
        with pytest.raises(UnimoeError) as error:
            connect(dashboard.url)
        assert "sesame" not in str(error.value)
        assert ("RAY_AUTH_MODE=disabled" if status == 401 else "the token of RAY_AUTH_TOKEN") in str(error.value)


def test_on_another_machine_results_need_a_shared_folder(dashboard, capsys):
    code, line = fails(capsys, "submit", "jobs/tune.py", "--address", dashboard.url)
    assert code == 2 and line.startswith("runs_dir is 'runs', in the job's own copy of this folder")


def test_the_option_comes_before_the_environment(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert connect(dashboard.url).get_address() == dashboard.url
    monkeypatch.setenv("RAY_ADDRESS", dashboard.url)
    with pytest.raises(Unreachable, match="127.0.0.1:1"):
        connect(None)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert connect(None).get_address() == dashboard.url
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert connect(None, dashboard.url + "/").get_address() == dashboard.url
