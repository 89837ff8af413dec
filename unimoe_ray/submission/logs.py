"""A job's output as it comes, each character once, over connections that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from unimoe_ray.submission.client import Client, Refused, Unreachable

# Proxies drop connections that are silent, and not all of them say so.
SILENCE_S = 60.0
PAUSE_S = 2.0
PATIENCE_S = 600.0


class Unseen:
    """Writes of a text that may start again and again what was not written before."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._read = self._written = 0

    def start_again(self) -> None:
        self._read = 0

    def add(self, text: str) -> None:
        """The next part of the text since its start."""
        fresh = text[max(self._written - self._read, 0) :]
        self._read += len(text)
        if fresh:
            self._write(fresh)
            self._written = self._read


def follow(
    client: Client,
    job: str,
    write: Callable[[str], None],
    say: Callable[[str], None],
    *,
    silence_s: float = SILENCE_S,
    pause_s: float = PAUSE_S,
    patience_s: float = PATIENCE_S,
) -> JobDetails:
    """Write a job's output until it has ended; the job then.

    say: gets a line when the connection is lost, and when it is back. Raises Unreachable after ``patience_s`` seconds
    without one; the job may go on.
    """
    log = Unseen(write)
    lost_at: float | None = None
    waiting = ""
    while True:
        # What a lost connection did not bring is asked for below, over a new one.
        with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError, TimeoutError):
            asyncio.run(_tail(client, job, log, silence_s))
        try:
            details = client.get_job_info(job)
            log.start_again()
            log.add(_whole(client, job))
        except Unreachable as error:
            if lost_at is None:
                lost_at = time.monotonic()
                say(f"{error}; trying again")
            elif time.monotonic() - lost_at > patience_s:
                raise
        else:
            if lost_at is not None:
                say("connected again")
                lost_at = None
            if details.status == JobStatus.PENDING and details.message and details.message != waiting:
                waiting = details.message
                say(" ".join(waiting.split()))
            if details.status.is_terminal():
                return details
        time.sleep(pause_s)


async def _tail(client: JobSubmissionClient, job: str, log: Unseen, silence_s: float) -> None:
    """Until the job ends, the connection is lost, or nothing came for ``silence_s`` seconds."""
    log.start_again()
    async with contextlib.aclosing(client.tail_job_logs(job)) as parts:
        while True:
            async with asyncio.timeout(silence_s):
                part = await anext(parts, None)
            if part is None:
                return
            log.add(part)


def _whole(client: Client, job: str) -> str:
    """The output so far; none where its node is gone."""
    try:
        return client.get_job_logs(job)
    except Refused as error:
        if error.status < 500:
            raise
        return ""
