"""``unimoe jobs list | status | logs | stop``: results on stdout, what happens to them on stderr."""

from __future__ import annotations

import argparse
import sys
import time

from ray.job_submission import JobDetails, JobStatus
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from unimoe_ray.errors import UnimoeError
from unimoe_ray.report.words import date, duration
from unimoe_ray.submission.client import Client, Unreachable, connect
from unimoe_ray.submission.logs import follow

# Ray gives a job 3 s to end by itself.
STOP_S = 30.0
LAST_LINES = 10


def list_jobs(arguments: argparse.Namespace) -> int:
    """What was submitted, the latest first."""
    client = connect(arguments.address)
    found = [job for job in client.list_jobs() if job.submission_id]
    if not found:
        say("no job was submitted to this cluster")
        return 0
    table = Table(
        *(Column(name, no_wrap=True) for name in ("id", "status", "started", "took", "runs")), box=SIMPLE_HEAD
    )
    for job in sorted(found, key=lambda job: -(job.start_time or 0)):
        started = date(job.start_time / 1000) if job.start_time else ""
        table.add_row(job.submission_id, _words(job), started, _took(job), job.entrypoint)
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """One line, and of a job that failed its last lines."""
    job = connect(arguments.address).job(arguments.id)
    took = f" after {_took(job)}" if job.status.is_terminal() else f", for {_took(job)}" if job.start_time else ""
    print(f"{job.submission_id} {_words(job)}{took}: {job.entrypoint}")
    for line in _last_lines(job):
        print(f"  {line}")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """The output so far, or until the job ends; the exit code is then the job's."""
    client = connect(arguments.address)
    job = client.job(arguments.id).submission_id
    if arguments.follow:
        return follow_to_end(client, job, arguments.address)
    print(client.get_job_logs(job), end="")
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """Ask the job to end, and wait until it has."""
    client = connect(arguments.address)
    job = client.job(arguments.id)
    if job.status.is_terminal():
        print(f"{job.submission_id} {_words(job)} before")
        return 0
    client.stop_job(job.submission_id)
    deadline = time.monotonic() + STOP_S
    while not (job := client.get_job_info(job.submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise UnimoeError(f"{job.submission_id} was asked to stop and still runs after {STOP_S:.0f} s")
        time.sleep(0.5)
    print(f"{job.submission_id} {_words(job)}")
    return 0


def follow_to_end(client: Client, job: str, address: str | None) -> int:
    """Print a job's output until it ends; its exit code. Ctrl-C leaves it running.

    address: as given on the command line, for the commands that are named
    """
    option = f" --address {address}" if address else ""
    try:
        details = follow(client, job, _write, say)
    except KeyboardInterrupt:
        say(f"{job} goes on; follow it with: unimoe jobs logs -f {job}{option}")
        say(f"stop it with: unimoe jobs stop {job}{option}")
        return 1
    except Unreachable as error:
        raise Unreachable(f"{error}; {job} may go on: unimoe jobs logs -f {job}{option}") from None
    say(f"{job} {_words(details)} after {_took(details)}")
    if details.driver_exit_code is None:  # Nothing ran that could have said why.
        for line in _last_lines(details):
            say(line)
    return _exit_code(details)


def say(line: str) -> None:
    print(f"unimoe: {line}", file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _words(job: JobDetails) -> str:
    code = job.driver_exit_code
    if job.status == JobStatus.FAILED and code is not None:
        return f"failed, killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return {JobStatus.PENDING: "is waiting", JobStatus.RUNNING: "is running", JobStatus.STOPPED: "was stopped"}.get(
        job.status, job.status.value.lower()
    )


def _exit_code(job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code if (job.driver_exit_code or 0) > 0 else 1


def _took(job: JobDetails) -> str:
    if not job.start_time:
        return ""
    return duration(max(0.0, (job.end_time or time.time() * 1000) - job.start_time) / 1000)


def _last_lines(job: JobDetails) -> list[str]:
    """Of the output or, if it never ran, of the reason."""
    if job.status != JobStatus.FAILED:
        return []
    lines = [line.rstrip() for line in (job.message or "").splitlines() if line.strip()]
    # Ray's own first line says what ours does.
    return lines[1:][-LAST_LINES:] if job.driver_exit_code is not None else lines[-LAST_LINES:]
