"""``unimoe checkpoint``: the states of a run's unfinished stages, listed, verified, looked into."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``checkpoint`` and its subcommands to the command line."""
    parser = commands.add_parser("checkpoint", help="the states that unfinished runs go on from")
    table = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    texts = {
        "list": "which there are, and why each is kept",
        "verify": "read every file and compare checksums; exit code 1 if one is damaged",
        "inspect": "what is in one: parameters, position, workers and their experts",
    }
    for name, text in texts.items():
        sub = table.add_parser(name, help=text, description=text)
        sub.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, such as runs/mini")
        if name == "inspect":
            sub.add_argument(
                "state", nargs="?", metavar="STATE", help="as listed, or only its beginning (default: the newest)"
            )
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.set_defaults(run=_run, command=name)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from unimoe_ray import config
    from unimoe_ray.checkpoint import show

    settings = config.load_run(arguments.run_folder)
    found = show.states_of(settings)
    console = Console(highlight=False)

    def give(answer: dict[str, Any], *pages: Any) -> None:
        if arguments.json:
            print(json.dumps(answer))
        else:
            for page in pages:
                console.print(page)

    if arguments.command == "list":
        give({"states": [show.summary(one) for one in found]}, show.states_table(settings.name, found))
    elif arguments.command == "inspect":
        state = show.choose(found, arguments.state)
        give(show.contents(state), show.position_table(state), show.parameters_table(state))
    else:
        checked = [show.verify(one) for one in found]
        give({"states": checked}, *show.verdicts(checked))
        return int(any(one["damages"] for one in checked))
    return 0
