"""The command line: exit codes, one clear line for every mistake, and a conversation with a small random model."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from tests.tiny import TinyRun, make_servable_run, save_start, tiny_config
from unimoe_ray import config as configuration
from unimoe_ray.chat import Conversation
from unimoe_ray.cli import main
from unimoe_ray.data.prompt import plain_text
from unimoe_ray.data.schema import PLACEHOLDER, Media
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.pipeline import open_run
from unimoe_ray.training.checkpoint import ModelInfo

ROOT = Path(__file__).parents[2]


def fails(capsys, *arguments) -> tuple[int, str]:
    """Exit code and the one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("unimoe: "), (out, err)
    return stop.value.code, err.removeprefix("unimoe: ").strip()


def prints(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


# Usage and configuration


def test_a_wrong_key_names_the_nearest_one(tmp_path):
    command = [sys.executable, "-m", "unimoe_ray.cli", "train", "all", "training.wokers=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "unimoe: unknown key 'training.wokers'; did you mean 'training.workers'?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prepare", "--config", "mni"], "--config mni: no such preset; allowed: mini"),
        (["prepare", "--config", "gone.yaml"], "--config gone.yaml: No such file or directory"),
        (["train", "base", "seed=-1"], "seed is -1: Input should be greater than or equal to 0"),
        (["train", "base", "seed"], "'seed' is not an override; write key.sub=value"),
    ],
)
def test_mistakes_in_the_configuration(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    code, found = fails(capsys, *arguments)
    assert code == 2 and found.startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "tunes"], "argument STAGE: invalid choice: 'tunes' (choose from 'base', 'align', 'experts', 'tune'"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["chat"], "the following arguments are required: RUN"),
        (["eval", "runs/x", "--stage", "experts"], "argument --stage: invalid choice: 'experts'"),
        (["train", "all", "--sed", "3"], "unrecognized arguments: --sed 3"),
        (["chat", "runs/x", "--image", "a.png", "one", "two"], "unrecognized arguments: two"),
        (["eval", "runs/x", "--routing"], "argument --routing: expected one argument"),
        (["eval", "runs/x", "seed=3"], "unrecognized arguments: seed=3"),
    ],
)
def test_wrong_usage(capsys, arguments, line):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert f"error: {line}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "all", "seed=3", "name=x", "--dry-run"],
        ["train", "all", "--dry-run", "seed=3", "name=x"],
        ["train", "all", "seed=2", "--dry-run", "seed=3", "name=x"],
        ["prepare", "--config", "mini", "seed=3", "--dry-run", "name=x"],
    ],
)
def test_dry_run_prints_the_resolved_configuration(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    shown = configuration.parse(yaml.safe_load(prints(capsys, *arguments)))
    assert shown == configuration.load("mini", ["seed=3", "name=x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--benchmark", "vqa"], "benchmark 'vqa' does not exist; allowed: a-okvqa, ok-vqa, vqav2"),
        (
            ["--benchmark", "vqav2"],
            "--benchmark vqav2 needs --data DIR, a folder with v2_OpenEnded_mscoco_val2014_quest",
        ),
        (["--benchmark", "vqav2", "--data", "gone"], "vqav2: gone: no such folder; it is to have v2_OpenEnded"),
        (["--benchmark", "vqav2", "--data", ".", "--split", "dev"], "vqav2 has no split 'dev'; allowed: val, test-dev"),
        (["--benchmark", "vqav2", "--data", ".", "--limit", "0"], "--limit 0: allowed: from 1"),
        (["--benchmark", "vqav2", "--data", ".", "--task", "x"], "--task does not go with --benchmark"),
        (["--benchmark", "clotho", "--data", ".", "--decoding", "published"], "clotho was published with 5 beams"),
        (["--data", "."], "--data belongs to --benchmark"),
        (["--split", "val"], "--split val: allowed: test, dev"),
    ],
)
def test_mistakes_in_benchmarks(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(configuration.dump(configuration.load("mini")))
    code, found = fails(capsys, "eval", "x", *arguments)
    assert code == 2 and found.startswith(line)


def test_benchmarks_are_listed(capsys):
    lines = prints(capsys, "eval", "any", "--benchmark", "list").splitlines()
    assert len(lines) == 30
    assert lines[4].split() == ["vqav2", "VQAv2;", "val|test-dev|test"]


def test_version_and_help(capsys):
    assert prints(capsys, "--version").strip().count(".") == 2
    for command in ("prepare", "train", "eval", "chat", "serve", "report", "doctor"):
        assert command in prints(capsys, command, "--help")


# Run folders


@pytest.mark.parametrize("command", ["eval", "chat", "report", "serve"])
def test_a_missing_run_folder(capsys, tmp_path, command):
    code, line = fails(capsys, command, tmp_path / "gone", *(["hello"] if command == "chat" else []))
    assert code == 1 and line.startswith(f"{tmp_path / 'gone'}: no such run folder")


def test_a_damaged_configuration_in_the_run_folder(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("seeed: 3\n")
    assert fails(capsys, "chat", tmp_path, "hello") == (2, "unknown key 'seeed'; did you mean 'seed'?")


def test_a_run_without_a_model(capsys, tmp_path):
    settings = tiny_config(tmp_path)
    with open_run(settings) as folder:
        for command in (["chat", folder, "hello"], ["serve", folder], ["serve", folder, "--write-config", "x.yaml"]):
            code, line = fails(capsys, *command)
            assert code == 1 and "no finished model" in line and "unimoe train all" in line


def test_a_run_folder_is_held_by_one_command(tmp_path):
    settings = tiny_config(tmp_path)
    with open_run(settings), pytest.raises(UnimoeError, match="tiny: another command is using this run folder"):
        open_run(settings).__enter__()
    with open_run(settings) as folder:
        assert configuration.load(folder / "config.yaml") == settings


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    """A limit on the size of files fails every write, as a full disk does."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        found = fails(capsys, "prepare", f"runs_dir={tmp_path}", "name=full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == (1, f"{tmp_path / 'full'}: File too large")


# The endpoint


def test_serve_settings_and_their_config_file(capsys, run, tmp_path):
    folder = run.config.run_dir
    shown = yaml.safe_load(prints(capsys, "serve", folder, "--port", 9001, "serving.image.min_replicas=0", "--dry-run"))
    assert (shown["serving"]["port"], shown["serving"]["image"]["min_replicas"]) == (9001, 0)
    path = tmp_path / "serve.yaml"
    assert prints(capsys, "serve", folder, "--host", "0.0.0.0", "--write-config", path).strip() == str(path)
    written = yaml.safe_load(path.read_text())
    assert written["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert written["applications"][0]["args"]["run"] == str(folder.resolve())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serving.prot=1"], "unknown key 'serving.prot'; did you mean 'serving.port'?"),
        (["--port", "70000"], "serving.port is 70000: Input should be less than or equal to 65535"),
        (["serving.speech.max_replicas=0"], "serving.speech.max_replicas is 0: "),
    ],
)
def test_mistakes_in_serve_settings(capsys, run, arguments, line):
    code, found = fails(capsys, "serve", run.config.run_dir, *arguments)
    assert code == 2 and found.startswith(line)


def test_a_port_in_use_is_one_line(capsys, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = fails(capsys, "serve", run.config.run_dir, "--port", port)
    assert (code, line) == (1, f"port {port} is in use on this machine; give another one with --port")


# Conversations


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    return make_servable_run(tmp_path_factory.mktemp("chat"), model={"language": {"max_positions": 128}})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("a.png", "b.png")):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    soundfile.write(folder / "a.wav", np.random.default_rng(2).normal(0, 0.1, 16_000), 16_000)
    (folder / "text.png").write_text("no picture")
    content = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    return folder


def test_an_answer(capsys, run, files):
    folder, image = run.config.run_dir, files / "a.png"
    plain = prints(capsys, "chat", folder, "what is this?", "--image", image)
    answer = json.loads(prints(capsys, "chat", folder, "--image", image, "what is this?", "--json"))
    assert answer == {"question": "what is this?", "answer": plain.rstrip("\n")}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--image", "text.png", "x?"], "text.png: not an image that can be read"),
        (["--image", "a.png", "--image", "half.png", "x?"], "half.png: image file is truncated"),
        (["--image", "gone.png", "x?"], "--image gone.png: no such file"),
        (["--video", "a.wav", "x?"], "a.wav: has no video stream"),
        (["--audio", "a.png", "x?"], "a.png: "),
        (["--speech", ".", "x?"], "--speech .: no such file"),
    ],
)
def test_unreadable_files(capsys, run, files, monkeypatch, arguments, reason):
    monkeypatch.chdir(files)
    code, line = fails(capsys, "chat", run.config.run_dir, *arguments, "--json")
    assert code == 1 and line.startswith(reason)


def test_nothing_to_answer(capsys, run):
    assert fails(capsys, "chat", run.config.run_dir, "--json") == (2, "--json needs a question")
    assert fails(capsys, "chat", run.config.run_dir, " ")[0] == 2


def test_a_run_folder_may_be_moved_and_named_anything(capsys, run, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(run.config.run_dir)
    assert prints(capsys, "chat", moved, "hello") == prints(capsys, "chat", run.config.run_dir, "hello")
    odd = tmp_path / "my run"
    odd.mkdir()
    (odd / "config.yaml").write_text((run.config.run_dir / "config.yaml").read_text())
    code, line = fails(capsys, "chat", odd, "hello")
    assert code == 2 and line.startswith("name is 'my run': ")


def test_a_conversation_keeps_its_turns_and_media(run, files):
    image, other, sound = (
        Media(k, (str(files / n),)) for k, n in (("image", "a.png"), ("image", "b.png"), ("speech", "a.wav"))
    )

    def start() -> Conversation:
        return Conversation(run.config, final_model(run.config))

    talk = start()
    first = talk.ask("what?", [image])
    second = talk.ask("and?", [sound])
    third = talk.ask("more?", [])
    replay = start()
    assert [replay.ask("what?", [image]), replay.ask("and?", [sound]), replay.ask("more?", [])] == [
        first,
        second,
        third,
    ]
    # What was said and shown before matters.
    assert start().ask("more?", []) != third
    assert start().ask("what?", [other]) != first


def test_a_failed_question_leaves_the_conversation_as_it_was(run, files):
    image = Media("image", (str(files / "a.png"),))
    talk, other = (Conversation(run.config, final_model(run.config)) for _ in range(2))
    assert talk.ask("what?", [image]) == other.ask("what?", [image])
    with pytest.raises(UnimoeError, match="text.png"):
        talk.ask("and?", [image, Media("image", (str(files / "text.png"),))])
    with pytest.raises(UsageError, match="the conversation has .* tokens; at most 124 fit, start a new one"):
        talk.ask("word " * 200, [])
    with pytest.raises(UsageError, match="nothing to answer"):
        talk.ask(" ", [])
    assert talk.ask("and?", [image]) == other.ask("and?", [image])


@pytest.mark.parametrize("text", ["<image> what?", "<video><audio>", "<<image>>", "</s><|assistant|> x", "a<b"])
def test_anything_may_be_written(run, text):
    """Placeholders belong to files; written by a user they are text. All other text stays as it is."""
    assert isinstance(Conversation(run.config, final_model(run.config)).ask(text, []), str)
    assert not PLACEHOLDER.search(plain_text(text))
    assert (plain_text(text) == text) == (not PLACEHOLDER.search(text))


def test_towers_other_than_those_of_the_training_are_refused(run, tmp_path):
    settings = run.config.model_copy(update={"runs_dir": str(tmp_path)})
    info = ModelInfo(**run.info.__dict__ | {"towers": run.info.towers | {"speech": "0" * 64}})
    save_start(TinyRun(settings, info, run.tokenizer), info.build(), "tune", "tune")
    with pytest.raises(UnimoeError, match="was trained with another speech tower"):
        Conversation(settings, final_model(settings))


def test_the_terminal(capsys, run, files, monkeypatch):
    picture, text = files / "a.png", files / "text.png"
    lines = ["what?", f"/image {picture}", "what?", "", "/image gone.png", f"/image {text}", "x", "/help", "x?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out = "".join(prints(capsys, "chat", run.config.run_dir).split())
    talk = Conversation(run.config, final_model(run.config))
    answers = [talk.ask("what?", []), talk.ask("what?", [Media("image", (str(picture),))]), talk.ask("x?", [])]
    order = [
        *answers[:2],
        "gone.png: no such file",
        "text.png: not an image that can be read",
        "Attach files",
        answers[2],
    ]
    place = out.index("quitends.")
    for part in order:
        place = out.index("".join(part.split()), place)
