"""The errors that a user can cause or cure. The command line prints them as one line, without a traceback."""

from __future__ import annotations

import re


class UnimoeError(Exception):
    """Something failed that the message explains in one line. Exit code 1."""

    exit_code = 1


class UsageError(UnimoeError):
    """A mistake in the command line or the configuration. Exit code 2."""

    exit_code = 2


def root_cause(error: BaseException) -> str:
    """The first error of a chained traceback in text, as remote errors carry it: one line, ours without the class."""
    causes = re.findall(r"^([\w.]+(?:Error|Exception|Interrupt)): (.+)$", str(error), flags=re.MULTILINE)
    if not causes:
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    kind, message = causes[0]
    return message if kind.startswith(f"{__name__}.") else f"{kind}: {message}"
