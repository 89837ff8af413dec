"""The subcommands of ``unimoe k8s``: what they take. What they do is imported when one runs."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_OVERLAYS = "cpu-mini, gpu, gpu-spot or kueue"
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Command:
    """run: "module:function" in this package; the function takes the parsed arguments and returns the exit code."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: str

    def __call__(self, arguments: argparse.Namespace) -> int:
        module, function = self.run.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(arguments)


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``k8s`` and its subcommands to the command line."""
    parser = commands.add_parser("k8s", help="train and serve on Kubernetes, through KubeRay")
    table = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = table.add_parser(name, help=command.help, description=command.help)
        command.options(sub)
        sub.set_defaults(run=command)


def seconds(text: str) -> float:
    """``90``, ``90s``, ``30m`` or ``2h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 30m or 2h")
    return float(match[1]) * _UNITS[match[2]]


def _cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="default: KUBECONFIG, ~/.kube/config, this pod's"
    )
    group.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: its current one)")
    group.add_argument("-n", "--namespace", metavar="NAME", help="default: that of the context")


def _object(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("object", metavar="KIND/NAME", help="such as rayjob/unimoe-align")


def _source(parser: argparse.ArgumentParser, also: str = "") -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help=f"folder (a kustomization's too), YAML file, - for stdin{also}"
    )


def _apply(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    parser.add_argument("--dry-run", action="store_true", help="let the server judge everything, write nothing")
    parser.add_argument("--diff", action="store_true", help="print what changes in objects that are there; no secrets")
    parser.add_argument("--force-conflicts", action="store_true", help="take over fields that others manage")
    _cluster(parser)


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("object", nargs="?", metavar="KIND/NAME", help="default: all Ray resources of the namespace")
    _cluster(parser)


def _logs(parser: argparse.ArgumentParser) -> None:
    _object(parser)
    parser.add_argument("--node", metavar="NODE", help="head, worker, submitter, or a part of a pod's name")
    parser.add_argument("--container", metavar="NAME", help="default: the pod's first")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    parser.add_argument("--tail", type=int, metavar="N", help="the last N lines only")
    parser.add_argument("--previous", action="store_true", help="of the container before its last restart")
    _cluster(parser)


def _wait(parser: argparse.ArgumentParser) -> None:
    _object(parser)
    parser.add_argument(
        "--for",
        dest="goal",
        default="ready",
        metavar="GOAL",
        help="ready (of jobs: succeeded; the default), running, delete, condition=TYPE[=STATUS]",
    )
    parser.add_argument("--timeout", type=seconds, default=1800.0, metavar="TIME", help="90s, 30m, 2h (default: 30m)")
    _cluster(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    _source(parser, ", or KIND/NAME")
    parser.add_argument("--with-data", action="store_true", help="volume claims and namespaces too, and what they hold")
    parser.add_argument("--wait", action="store_true", help="until they are gone")
    parser.add_argument("--timeout", type=seconds, default=300.0, metavar="TIME", help="of --wait (default: 300s)")
    _cluster(parser)


def _submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="stage or other job, endpoint, cluster: the end of its name is enough"
    )
    _source(parser)
    parser.add_argument("--diff", action="store_true", help="print what changes in objects that are there; no secrets")
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="start it and return")
    parser.add_argument("--timeout", type=seconds, default=86400.0, metavar="TIME", help="to follow it (default: 24h)")
    _cluster(parser)


def _render(parser: argparse.ArgumentParser) -> None:
    _configuration(parser)
    parser.add_argument("--overlay", default="cpu-mini", metavar="NAME", help=f"{_OVERLAYS} (default: cpu-mini)")
    parser.add_argument("--output", type=Path, default=Path("k8s"), metavar="DIR", help="default: k8s")


def _size(parser: argparse.ArgumentParser) -> None:
    _configuration(parser)
    parser.add_argument("--overlay", metavar="NAME", help=f"{_OVERLAYS} (default: as large as the model)")


def _configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="mini", metavar="PRESET|FILE", help="preset name or YAML file (default: mini)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="such as kubernetes.nodes.large_gpu.gpus=4"
    )


COMMANDS = {
    "render": Command("write manifests of a configuration", _render, "manifests:render"),
    "size": Command("GPUs, memory and experts of a configuration, and why", _size, "manifests:size"),
    "apply": Command("make a cluster have what a folder, file or stdin says", _apply, "cluster_commands:apply"),
    "submit": Command("start a stage's job (or the endpoint, or the cluster) and follow it", _submit, "submit:submit"),
    "status": Command("what runs, and what is wrong with it", _status, "cluster_commands:status"),
    "logs": Command("the log of a job, cluster, service or pod", _logs, "cluster_commands:logs"),
    "wait": Command("wait until something is ready, done or gone", _wait, "cluster_commands:wait"),
    "delete": Command("delete what a folder, file or stdin names; data stays", _delete, "cluster_commands:delete"),
}
