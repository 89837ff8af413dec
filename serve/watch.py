"""A call by value ends as one by reference does when its replica is lost.

Serve sends it over a connection to the replica. That breaks with the replica's process; but of a node whose power is
cut nothing comes any more, and gRPC waits a minute for the answer to a ping (its default, which Serve leaves). Ray
finds out sooner, and this asks Ray.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator

from grpc.aio import AioRpcError
from ray._private import state
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentResponseGenerator

from serve.calls import Told

# After so long without a word from a replica, Ray is asked whether it is still there.
SILENCE_S = 5.0


async def watched(items: DeploymentResponseGenerator) -> AsyncIterator[Told]:
    """What a call says. Left before its end, it is cancelled. Raises WorkerCrashedError when a connection broke,
    RequestCancelledError when the replica behind it is dead, and RayTaskError for what the replica raised."""
    heard, ended = [time.monotonic()], False
    watching = None if items.by_reference else asyncio.create_task(_watch(items, heard))
    try:
        async for told in items:
            heard[0] = time.monotonic()
            yield told
        ended = True
    except AioRpcError as error:
        raise WorkerCrashedError from error
    except (RayError, RayServeException):
        raise
    except Exception as error:  # The replica's own, of whatever kind: over a connection it comes bare.
        raise RayTaskError("generate", "".join(traceback.format_exception(error)), error) from None
    finally:
        if watching is not None:
            watching.cancel()
        if not ended:
            items.cancel()


async def _watch(items: DeploymentResponseGenerator, heard: list[float]) -> None:
    while True:
        await asyncio.sleep(SILENCE_S)
        replica = items._replica_result  # None while it waits for one.
        if replica is not None and time.monotonic() - heard[0] >= SILENCE_S:
            known = await asyncio.to_thread(state.actors, replica._actor_id.hex())
            if known.get("State") == "DEAD":
                items.cancel()
                return
