"""``unimoe submit`` and ``unimoe jobs``: what they take. What they do is imported when one runs."""

from __future__ import annotations

import argparse

ADDRESS = "of the dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, ray_address, RAY_ADDRESS, this machine)"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``submit``, and ``jobs`` with its subcommands, to the command line."""
    about = "run a job on a Ray cluster and follow it"
    submit = commands.add_parser("submit", help=about, description=about)
    submit.add_argument("job", metavar="JOB", help="jobs/tune.py, or another Python file of the current folder")
    submit.add_argument(
        "--config", default="mini", metavar="PRESET|FILE", help="preset name or YAML file (default: mini)"
    )
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    submit.add_argument("--address", metavar="URL", help=ADDRESS)
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for the job (repeatable)"
    )
    submit.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out of what is sent of the current folder, beside .gitignore and .rayignore (repeatable)",
    )
    submit.add_argument("--no-follow", dest="follow", action="store_false", help="start it, print its id and return")
    submit.add_argument("--dry-run", action="store_true", help="print what would be sent and run, and stop")
    submit.set_defaults(run=_submit)

    parser = commands.add_parser("jobs", help="jobs of a Ray cluster: list, status, logs, stop")
    table = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, about in (
        ("list", "the submitted jobs, the latest first"),
        ("status", "how a job does, and why it failed"),
        ("logs", "the output of a job"),
        ("stop", "stop a job"),
    ):
        command = table.add_parser(name, help=about, description=about)
        if name != "list":
            command.add_argument("id", metavar="ID", help="as unimoe submit printed it, or the start of it")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true", help="go on until it ends, and end as it does")
        command.add_argument("--address", metavar="URL", help=ADDRESS)
        command.set_defaults(run=_jobs, command=name)


def _submit(arguments: argparse.Namespace) -> int:
    from unimoe_ray.submission.submit import submit

    return submit(arguments)


def _jobs(arguments: argparse.Namespace) -> int:
    from unimoe_ray.submission import jobs

    return {"list": jobs.list_jobs, "status": jobs.status, "logs": jobs.logs, "stop": jobs.stop}[arguments.command](
        arguments
    )
