"""``unimoe submit``: send a job to a Ray cluster, start it and follow it."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import yaml

import unimoe_ray
from unimoe_ray import config
from unimoe_ray.config import Config
from unimoe_ray.data.locations import is_url
from unimoe_ray.data.sources import absolute
from unimoe_ray.errors import UsageError
from unimoe_ray.submission.client import Unreachable, connect
from unimoe_ray.submission.jobs import follow_to_end, say
from unimoe_ray.submission.package import inside, pack


def submit(arguments: argparse.Namespace) -> int:
    """Exit code: the job's, or 0 where it is not followed."""
    settings = config.load(arguments.config, arguments.overrides)
    variables = _variables(arguments.env)
    folder = Path.cwd()
    file = _configuration_file(arguments.config, folder)
    written = [f"/{path}" for path in _inner((settings.runs_dir, settings.data.dir), folder)]
    package = pack(arguments.job, folder, [file] if file else [], [*written, *arguments.exclude])
    given = ["--config", file or arguments.config, *arguments.overrides]
    if arguments.dry_run:
        print(config.dump(settings), end="")
        print(f"# runs: {package.entrypoint('python', given)}")
        print(f"# sends: {package}" + "".join(f"\n# variable: {name}" for name in variables))
        return 0
    client = connect(arguments.address, settings.ray_address)
    if client.ray_version != ray.__version__:
        say(f"the cluster has Ray {client.ray_version}, this machine {ray.__version__}")
    places = _places_here(settings) if client.is_here else _places_there(settings)
    python = sys.executable if client.is_here else "python"
    job = f"{Path(arguments.job).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "job.zip")
        package.write(archive)
        say(f"{job}: {package}, to {client.get_address()}")
        try:
            client.submit_job(
                entrypoint=package.entrypoint(python, [*given, *places]),
                runtime_env={"working_dir": str(archive), "env_vars": variables},
                submission_id=job,
                metadata={"run": settings.name, "unimoe": unimoe_ray.__version__},
            )
        except Unreachable as error:
            raise Unreachable(f"{error}; whether it has started: unimoe jobs status {job}") from None
    if not arguments.follow:
        print(job)
        return 0
    return follow_to_end(client, job, arguments.address)


def _configuration_file(source: str, folder: Path) -> str | None:
    """Its path in the job's working folder; None of a preset."""
    if not source.endswith((".yaml", ".yml")):
        return None
    found = inside(Path(source), folder)
    if found is None:
        raise UsageError(f"--config {source}: outside of the current folder, of which the job gets a copy")
    return found


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {name}: not the name of a variable; write NAME=VALUE, or NAME to pass it on")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: not set here; write {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def _inner(paths: tuple[str, ...], folder: Path) -> Iterator[str]:
    """Those of them below the folder, relative to it."""
    for path in paths:
        found = None if is_url(path) else inside(Path(path), folder)
        if found not in (None, "."):
            yield found


def _places_here(settings: Config) -> list[str]:
    """Overrides by which the job, in its copy of the folder, reads and writes where this command would."""
    data = absolute(settings.data)
    places: dict[str, Any] = {"runs_dir": str(Path(settings.runs_dir).resolve()), "data.dir": data.dir}
    if data.source != settings.data.source:
        places["data.source"] = data.source
    if data.sources:
        places["data.sources"] = [source.model_dump(mode="json", exclude_none=True) for source in data.sources]
    places |= {key: str(Path(path).resolve()) for key, path in _weights(settings) if Path(path).exists()}
    return [*(f"{key}={_text(value)}" for key, value in places.items()), *_this_cluster(settings)]


def _places_there(settings: Config) -> list[str]:
    """Raises UsageError for what would be written into the job's copy of the folder, which goes with the job."""
    for key, path in (("runs_dir", settings.runs_dir), ("data.dir", settings.data.dir)):
        if not is_url(path) and not Path(path).is_absolute():
            raise UsageError(
                f"{key} is {path!r}, in the job's own copy of this folder, which goes with the job; on another machine "
                "give the full path of a folder that all nodes of the cluster share"
            )
    return _this_cluster(settings)


def _this_cluster(settings: Config) -> list[str]:
    return ["ray_address=null"] if settings.ray_address else []


def _weights(settings: Config) -> Iterator[tuple[str, str]]:
    """Keys and values of the model's settings that may name a local folder or file."""
    found: list[tuple[str, Any]] = [("model", settings.model.model_dump(mode="json"))]
    while found:
        key, node = found.pop()
        if isinstance(node, dict):
            found += [(f"{key}.{name}", inner) for name, inner in node.items()]
        elif isinstance(node, str) and key.endswith((".path", ".pretrained")):
            yield key, node


def _text(value: Any) -> str:
    """As an override gives it: words as they are where YAML reads them so."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
