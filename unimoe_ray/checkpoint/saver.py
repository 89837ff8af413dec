"""Writes the state of a run while it goes on: the steps wait for a copy in memory only."""

from __future__ import annotations

import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from unimoe_ray.checkpoint.manifest import KINDS, MANIFEST, Manifest, Part, part_name, tensor_name
from unimoe_ray.checkpoint.parts import write_part
from unimoe_ray.checkpoint.states import (
    Policy,
    State,
    kept,
    kept_for_good,
    newest_first,
    remove_state,
    state_name,
    step_of,
)
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.data.locations import reason
from unimoe_ray.errors import UnimoeError
from unimoe_ray.parallel.groups import Held
from unimoe_ray.parallel.state import fragments, trained_parameters, updates_done

log = logging.getLogger(__name__)

# Without a new part for so long, a state is given up. (A rank that died ends the run long before.)
PATIENCE_S = 600.0
_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.5


@dataclass(frozen=True)
class Outcome:
    """What became of the state after a step. Seconds: the steps waited ``wait_s`` for the state before it and
    ``copy_s`` for this one; in the background its parts took ``write_s`` (the slowest), and ``commit_s`` from rank 0's
    own to the end, the waiting for the others' included. error: why it was not committed."""

    step: int
    wait_s: float
    copy_s: float
    write_s: float = 0.0
    commit_s: float = 0.0
    bytes: int = 0
    error: str | None = None

    def metrics(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        values = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Copy:
    """What a rank has of a state, in memory of the host."""

    tensors: list[tuple[str, int]]
    values: torch.Tensor
    fragments: list[tuple[str, int, int]]
    shapes: dict[str, list[int]]  # of parameters whose first value is here: together the ranks tell each once
    ready: torch.cuda.Event | None


class Saver:
    """Of one rank, for one attempt at a run. All ranks make theirs, and call ``save`` and ``save_now``, together.

    A state is written by a thread, one at a time: where the one before is not there yet, ``save`` waits for it. Parts
    are announced in the store of the process group, where rank 0's thread waits for them and commits; no rank waits for
    another in a collective.

    label, steps, decides: as in ``Manifest``; start: the state that the run goes on from
    """

    def __init__(
        self,
        folder: Folder,
        policy: CheckpointConfig,
        *,
        label: str,
        steps: int,
        decides: dict[str, Any],
        start: State | None = None,
    ):
        self._folder, self._policy, self._start = folder, policy, start
        self._about = {"label": label, "steps": steps, "decides": decides}
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # A connection of its own: the thread's requests must not come between those of the process group.
        self._store = dist.distributed_c10d._get_default_store().clone()
        # Rank 0's. What was there before may go; what came since is other ranks' next state, or another attempt's. The
        # others can begin only after it has looked.
        self._left = {name for name in folder.names() if step_of(name) is not None} if self._rank == 0 else set()
        attempt = [secrets.token_hex(3)]
        dist.broadcast_object_list(attempt)
        self._attempt: str = attempt[0]
        self._buffer = torch.empty(0)
        self._writing: Future[Outcome] | None = None
        self._last_step = 0
        self._told: str | None = None
        self._committed: dict[int, tuple[str, float | None]] | None = None

    def is_due(self, step: int) -> bool:
        """After the last step comes the model itself."""
        return bool(self._policy.every) and step % self._policy.every == 0 and step < self._about["steps"]

    def save(
        self, engine, step: int, *, placement: Sequence[Held] | None = None, validation: float | None = None
    ) -> Outcome | None:
        """Begin to write the state after ``step`` steps, between two updates. Returns (on rank 0) what became of the
        one before, if it was not told yet. Raises UnimoeError if that failed and ``checkpoint.on_error`` is stop."""
        started = time.perf_counter()
        before = self._result()
        waited = time.perf_counter()
        copy = self._copy(engine)
        about = self._about | {
            "step": step,
            "updates": updates_done(engine),
            "placement": None if placement is None else [[list(ids) for ids in held] for held in placement],
            "validation": validation if validation is not None and math.isfinite(validation) else None,
        }
        begun = Outcome(step, waited - started, time.perf_counter() - waited)
        self._last_step = step
        self._writing = Future()
        threading.Thread(
            target=_run, args=(self._writing, self._write, about, copy, begun), name=f"state-{step}", daemon=True
        ).start()
        return before

    def save_now(
        self, engine, step: int, *, placement: Sequence[Held] | None = None, validation: float | None = None
    ) -> None:
        """Write the state after ``step`` steps, between two updates; it is committed when this returns. Raises
        UnimoeError if it could not be."""
        if self._last_step != step:
            self.save(engine, step, placement=placement, validation=validation)
        if self._writing is not None:
            outcome = self._writing.result()
            self._await([self._key(step, "outcome")])
            error = outcome.error or self._store.get(self._key(step, "outcome")).decode()
            if error:
                raise UnimoeError(f"the state of step {step} was not written: {error}")

    def outcome(self) -> Outcome | None:
        """Of the last state, once, as soon as it is known, on rank 0. Called after every step, on all ranks. Raises
        UnimoeError as ``save``."""
        return self._result() if self._writing is not None and self._writing.done() else None

    def finish(self) -> Outcome | None:
        """When the run has left its model: of its states only those that are kept for good stay."""
        outcome = self._result(may_stop=False)
        if self._rank == 0:
            try:
                self._keep(kept_for_good)
            except OSError as error:
                log.warning("%s: states of a finished run are left there: %s", self._folder.location, reason(error))
        return outcome

    def _result(self, may_stop: bool = True) -> Outcome | None:
        if self._writing is None:
            return None
        outcome, self._writing = self._writing.result(), None
        if outcome.error and may_stop and self._policy.on_error == "stop":
            raise UnimoeError(
                f"the state of step {outcome.step} was not written: {outcome.error} (checkpoint.on_error is stop)"
            )
        return outcome if self._rank == 0 else None

    def _copy(self, engine) -> _Copy:
        """Into a buffer that is used again for the next state."""
        found = list(fragments(engine))
        total = sum(len(KINDS) * len(fragment.weight) for fragment in found)
        on_gpu = engine.device.type == "cuda"
        if len(self._buffer) < total:
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=on_gpu)
        tensors, at = [], 0
        for fragment in found:
            for kind, tensor in zip(KINDS, fragment.tensors(), strict=True):
                self._buffer[at : at + len(tensor)].copy_(tensor, non_blocking=on_gpu)
                tensors.append((tensor_name(fragment.name, kind), len(tensor)))
                at += len(tensor)
        ready = None
        if on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        first = {fragment.name for fragment in found if fragment.start == 0}
        shapes = {name: list(p.shape) for name, p in trained_parameters(engine) if name in first}
        places = [(fragment.name, fragment.start, len(fragment.weight)) for fragment in found]
        return _Copy(tensors, self._buffer[:total], places, shapes, ready)

    def _write(self, about: dict[str, Any], copy: _Copy, begun: Outcome) -> Outcome:
        """In the thread."""
        folder = self._folder / state_name(begun.step, self._attempt)
        started = time.perf_counter()
        try:
            if copy.ready is not None:
                copy.ready.synchronize()
            folder.make()
            name = part_name(self._rank, self._world)
            size, digest = write_part(folder, name, copy.tensors, copy.values.numpy())
            part = {"name": name, "bytes": size, "sha256": digest, "fragments": copy.fragments}
            note = {"part": part, "shapes": copy.shapes, "seconds": time.perf_counter() - started}
        except OSError as error:
            note = {"error": f"{folder.location}: {reason(error)} (rank {self._rank})"}
        self._store.set(self._key(begun.step, self._rank), json.dumps(note))
        return self._commit(folder, about, begun) if self._rank == 0 else replace(begun, error=note.get("error"))

    def _commit(self, folder: Folder, about: dict[str, Any], begun: Outcome) -> Outcome:
        started = time.perf_counter()
        keys = [self._key(begun.step, rank) for rank in range(self._world)]
        missing = self._await(keys)
        notes = [json.loads(self._store.get(key)) for key in keys if key not in missing]
        errors = [note["error"] for note in notes if "error" in note]
        if missing:
            errors.append(f"{len(missing)} of {self._world} ranks did not write their part in {PATIENCE_S:.0f} s")
        if not errors:
            shapes = {name: shape for note in notes for name, shape in note["shapes"].items()}
            manifest = Manifest(
                **about,
                time=round(time.time(), 3),
                parameters=shapes,
                parts=[Part.model_validate_json(json.dumps(note["part"])) for note in notes],
            )
            try:
                folder.put(MANIFEST, manifest.dump())
            except OSError as error:
                errors.append(f"{folder.location}: {reason(error)}")
        done = replace(begun, commit_s=time.perf_counter() - started)
        if errors:
            self._discard(folder)
            done = replace(done, error=errors[0])
        else:
            self._remember(State(folder, manifest))
            done = replace(done, bytes=manifest.bytes, write_s=max(note["seconds"] for note in notes))
        for key in [*keys, *([self._told] if self._told else [])]:
            self._store.delete_key(key)
        self._told = self._key(begun.step, "outcome")
        self._store.set(self._told, done.error or "")
        return done

    def _await(self, keys: list[str]) -> list[str]:
        """Until all keys are there, or one has not come for ``PATIENCE_S``: those that are missing."""
        for number, key in enumerate(keys):
            pause, since = _FIRST_POLL_S, time.monotonic()
            while not self._store.check([key]):
                if time.monotonic() - since > PATIENCE_S:
                    return [late for late in keys[number:] if not self._store.check([late])]
                time.sleep(pause)
                pause = min(2 * pause, _LAST_POLL_S)
        return []

    def _key(self, step: int, what: int | str) -> str:
        return f"unimoe/state/{self._attempt}/{step}/{what}"

    def _discard(self, folder: Folder) -> None:
        try:
            remove_state(folder)
        except OSError as error:
            log.warning("%s: what was written of it is left there: %s", folder.location, reason(error))

    def _remember(self, state: State) -> None:
        """A state that was committed just now. Those that need not be kept go."""
        try:
            self._known()[state.step] = state.folder.name, state.manifest.validation
            self._keep(kept)
        except OSError as error:
            log.warning("%s: old states are left there: %s", self._folder.location, reason(error))

    def _known(self) -> dict[int, tuple[str, float | None]]:
        """Name and validation loss by step, of the states of this run that count. Those after the start are of an
        attempt that went another way, or damaged."""
        if self._committed is None:
            start, committed = self._start, {}
            for found in newest_first(self._folder) if start is not None else ():
                if isinstance(found, State) and (found.step < start.step or found.folder == start.folder):
                    committed.setdefault(found.step, (found.folder.name, found.manifest.validation))
            self._committed = committed
        return self._committed

    def _keep(self, policy: Policy) -> None:
        known = self._known()
        validations = {step: loss for step, (_, loss) in known.items() if loss is not None}
        why = policy(sorted(known), validations, self._policy)
        self._committed = {step: known[step] for step in known if step in why}
        wanted = {name for name, _ in self._committed.values()}
        for name in (self._left | {name for name, _ in known.values()}) - wanted:
            remove_state(self._folder / name)
        self._left &= wanted
        if not self._folder.names():
            self._folder.remove()


def _run(future: Future, work: Callable[..., Any], *arguments: Any) -> None:
    """``work`` in this thread, its result or error in the future: whoever asks for it gets either."""
    try:
        future.set_result(work(*arguments))
    except BaseException as error:
        future.set_exception(error)
