"""The errors that a user can cause or cure. The command line prints them as one line, without a traceback."""

from __future__ import annotations


class UnimoeError(Exception):
    """Something failed that the message explains in one line. Exit code 1."""

    exit_code = 1


class UsageError(UnimoeError):
    """A mistake in the command line or the configuration. Exit code 2."""

    exit_code = 2
