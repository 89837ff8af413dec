"""Who may import whom, and how long a file may be: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "unimoe_ray"

# What each part may import of the package, besides itself and ``errors``. Parts that are not listed (the command line
# and what it calls at the top) may import any other of the package.
ALLOWED = {
    "errors": set(),
    "config": set(),
    "kernels": set(),
    "model": {"config", "kernels"},
    "parallel": {"config", "model"},
    "data": {"config"},
    "mini": {"config", "model", "data"},
    "towers": {"config", "model", "mini"},
    "llama": {"model", "mini"},
    "parameter_table": {"config", "model", "data", "towers", "training"},
    "checkpoint": {"config", "parallel", "data"},
    "training": {"config", "model", "parallel", "data", "llama", "checkpoint"},
    "evaluation": {"config", "model", "data", "towers", "training", "inference"},
    "inference": {"config", "kernels", "model", "parallel", "data"},
    "analysis": {"config", "model", "data", "mini", "training", "evaluation"},
    # Its processor makes prompts of conversations, with our templates.
    "interop": {"config", "model", "data"},
    "kuberay": {"config", "parallel", "parameter_table"},
    "submission": {"config", "data", "report"},
    "progress": set(),
    "report": set(),
    "doctor": set(),
    "cluster": {"config"},
}
# Outside packages that a part must do without.
FORBIDDEN_OUTSIDE = {
    "config": {"torch", "ray", "deepspeed", "transformers", "peft"},
    "model": {"ray", "deepspeed", "peft", "av", "soundfile", "onnx"},
    "data": {"deepspeed", "peft", "transformers"},
    "checkpoint": {"ray", "deepspeed", "peft", "transformers"},
    "mini": {"deepspeed", "peft", "transformers"},
    "inference": {"ray", "deepspeed", "peft", "fastapi"},
    "kuberay": {"torch", "ray", "deepspeed", "transformers"},
    "submission": {"torch", "deepspeed", "transformers", "peft"},
    "progress": {"torch", "ray", "deepspeed", "transformers"},
    "report": {"torch", "ray", "deepspeed", "transformers"},
    "errors": {"torch", "ray", "deepspeed", "transformers"},
}
MAX_LINES, MAX_JOB_LINES = 600, 100


def sources(top: str) -> list[Path]:
    """Python files under a top-level folder, relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions; relative ones made absolute."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    package = list(path.with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """``config`` for unimoe_ray/config/root.py, ``chat`` for unimoe_ray/chat.py, the package itself for __init__."""
    return path.parts[1] if len(path.parts) > 2 else path.stem


def parts_imported(path: Path) -> set[str]:
    """Parts of the package that a file imports; names of the package's own __init__ (its version) are no part."""
    parts = {name.split(".")[1] for name in imports(path) if name.startswith(f"{PACKAGE}.")}
    return {part for part in parts if (ROOT / PACKAGE / part).is_dir() or (ROOT / PACKAGE / f"{part}.py").is_file()}


LIBRARY = sources(PACKAGE)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_import_only_what_they_may(part: str) -> None:
    wrong = [
        f"{path} imports {other}"
        for path in LIBRARY
        if part_of(path) == part
        for other in sorted(parts_imported(path) - ALLOWED[part] - {part, "errors"})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", sorted(FORBIDDEN_OUTSIDE))
def test_parts_do_without_some_libraries(part: str) -> None:
    wrong = [
        f"{path} imports {name}"
        for path in LIBRARY
        if part_of(path) == part
        for name in sorted(imports(path))
        if name.split(".")[0] in FORBIDDEN_OUTSIDE[part]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_of_allowed_imports_has_no_cycle() -> None:
    """Taking away parts that import nothing that is left ends with no part left."""
    left = {part: set(allowed) for part, allowed in ALLOWED.items()}
    while free := [part for part, allowed in left.items() if not allowed & left.keys()]:
        for part in free:
            del left[part]
    assert not left


def test_nothing_in_the_library_imports_jobs_or_tests_and_only_the_command_line_imports_serve() -> None:
    wrong = []
    for path in LIBRARY:
        tops = {name.split(".")[0] for name in imports(path)}
        wrong += [f"{path} imports {top}" for top in tops & {"jobs", "tests", "benchmarks"}]
        if "serve" in tops and path != Path(PACKAGE, "cli.py"):
            wrong.append(f"{path} imports serve")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "name",
    [
        *("chat", "conversation", "errors", "http", "keys", "media", "openai_api", "priority", "proxy", "suspects"),
        "tracing",
    ],
)
def test_the_http_side_of_serving_knows_no_ray(name):
    """It runs under any ASGI server, and is tested so."""
    tops = {imported.split(".")[0] for imported in imports(Path("serve", f"{name}.py"))}
    assert not tops & {"ray", "torch", "transformers"}


@pytest.mark.parametrize("name", ["topology", "placement", "placement_search", "placement_cost", "placement_table"])
def test_the_placement_planner_needs_numpy_only(name):
    """It also runs where no training does: in ``unimoe plan-experts``, on any machine."""
    tops = {imported.split(".")[0] for imported in imports(Path(PACKAGE, "parallel", f"{name}.py"))}
    assert not tops & {"ray", "torch", "deepspeed", "transformers"}


def test_the_command_line_imports_serve_and_the_heavy_libraries_lazily() -> None:
    """``unimoe --help`` is quick: neither they nor parts of the package that need them load with the module."""
    tree = ast.parse((ROOT / PACKAGE / "cli.py").read_text(encoding="utf-8"))
    top = {
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not {name.split(".")[0] for name in top} & {"serve", "ray", "torch", "deepspeed", "transformers"}
    parts = {name.split(".")[1] for name in top if name.startswith(f"{PACKAGE}.")}
    assert parts <= {"config", "errors", "__version__"}


def test_the_command_lines_of_kubernetes_and_of_jobs_are_light():
    """Its parser is made for every command of ``unimoe``; manifests are read and checked without torch and Ray."""
    code = (
        "import sys, unimoe_ray.kuberay.commands, unimoe_ray.submission.commands; print(*sys.modules); print('|')\n"
        "import unimoe_ray.kuberay.submit, unimoe_ray.kuberay.render, unimoe_ray.kuberay.manifests; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = done.stdout.split("|")
    assert not {"kubernetes", "pydantic", "yaml", "rich"} & set(first.split())
    assert not {"torch", "ray", "transformers"} & set(second.split())


def test_imports_are_seen_wherever_they_stand(tmp_path, monkeypatch) -> None:
    """The reader itself: relative imports and imports inside functions count."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from ..data import plan\nfrom . import b\ndef f():\n    import ray.data\n")
    assert imports(Path(PACKAGE, "model", "a.py")) == {f"{PACKAGE}.data.plan", f"{PACKAGE}.model.b", "ray.data"}


@pytest.mark.parametrize("top", [PACKAGE, "serve", "tests", "benchmarks", "jobs"])
def test_files_stay_short(top: str) -> None:
    limit = MAX_JOB_LINES if top == "jobs" else MAX_LINES
    counts = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources(top)}
    long = [f"{path}: {count} lines, at most {limit}" for path, count in counts.items() if count > limit]
    assert not long, "\n".join(long)


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file with what is called, as written: ``torch.load``."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_model_opens_no_media_file() -> None:
    """It gets decoded media; ``data.media`` reads files."""
    wrong = [
        f"{path}:{node.lineno}: {name}"
        for path in LIBRARY
        if part_of(path) == "model"
        for name, node in calls(path)
        if name in ("open", "io.open", "Image.open", "PIL.Image.open")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_reads_pickles() -> None:
    """Bytes from outside reach no pickle: torch.load says weights_only=True, nothing calls a reader of pickles."""
    readers = {
        f"{module}.{name}" for module in ("pickle", "cloudpickle", "dill") for name in ("load", "loads", "Unpickler")
    }
    wrong = []
    for path in [*LIBRARY, *sources("serve"), *sources("jobs")]:
        wrong += [f"{path} imports {name}" for name in sorted(imports(path) & (readers | {"joblib", "shelve"}))]
        for name, node in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in readers:
                wrong.append(f"{path}:{node.lineno}: {name}")
            if name == "torch.load" and given.get("weights_only") != "True":
                wrong.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if given.get("allow_pickle", "False") != "False":
                wrong.append(f"{path}:{node.lineno}: {name} with pickles")
    assert not wrong, "\n".join(wrong)


def test_what_rays_own_actors_import_is_light():
    """Each training run has several actors of Ray that unpickle the job; torch and transformers would cost seconds."""
    code = "import sys, unimoe_ray.training.job, unimoe_ray.data.loader; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "transformers", "peft", "deepspeed"} & set(modules.split())
