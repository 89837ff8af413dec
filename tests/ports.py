"""Ports for servers that want to be told theirs."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One that is free now, and that the system gives nobody who leaves the choice to it: connections that go out, and
    servers at port 0, would sooner or later take one of those before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
