"""The states of a run as they lie in its folder: which there are, which are whole, which are kept."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe_ray.checkpoint.manifest import MANIFEST, MAX_BYTES, DamagedError, Manifest, UncommittedError, load
from unimoe_ray.checkpoint.parts import hash_part
from unimoe_ray.checkpoint.storage import Folder
from unimoe_ray.config import Config
from unimoe_ray.config.checkpoint import CheckpointConfig
from unimoe_ray.data.locations import is_url, reason
from unimoe_ray.errors import UnimoeError, UsageError

_NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{6}")
_LONG = 50
# (steps of committed states, ascending; validation losses by step, where there was one; policy): {step: why it is kept}
Policy = Callable[[Sequence[int], Mapping[int, float], CheckpointConfig], dict[int, list[str]]]


@dataclass(frozen=True)
class State:
    """One that was committed."""

    folder: Folder
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def states_folder(config: Config, stage: str, run: str) -> Folder:
    """Where the states of a run lie."""
    root = config.checkpoint.location
    root = str(config.run_dir / "states") if root is None else f"{root.rstrip('/')}/{config.name}"
    if not is_url(root):
        root = str(Path(root).resolve())
    return Folder(root) / (stage if stage == run else f"{stage}-{run}")


def absolute(policy: CheckpointConfig) -> CheckpointConfig:
    """The same for any working folder."""
    if policy.location is None or is_url(policy.location):
        return policy
    return policy.model_copy(update={"location": str(Path(policy.location).resolve())})


def state_name(step: int, attempt: str) -> str:
    """A folder of its own for each attempt at a run: what is left of one that died can't mix with another's."""
    return f"step-{step:08d}-{attempt}"


def step_of(name: str) -> int | None:
    """None for what is no state."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def read_state(folder: Folder) -> State:
    """Raises DamagedError if it was not committed or its manifest can't be used, OSError where nothing can be read."""
    try:
        if folder.size(MANIFEST) > MAX_BYTES:
            raise DamagedError(f"{MANIFEST} has more than {MAX_BYTES} bytes")
        manifest = load(folder.read(MANIFEST))
    except FileNotFoundError:
        raise UncommittedError(f"it was not committed: it has no {MANIFEST}") from None
    except OSError as error:
        raise _damage_or(error, MANIFEST) from None
    if manifest.step != step_of(folder.name):
        raise DamagedError(f"{MANIFEST} is that of step {manifest.step}")
    return State(folder, manifest)


def newest_first(folder: Folder) -> Iterator[State | tuple[Folder, DamagedError]]:
    """The committed states of a run, and for each folder that is none the reason. Raises OSError."""
    names = [name for name in folder.names() if step_of(name) is not None]
    for name in sorted(names, key=lambda name: (step_of(name), name), reverse=True):
        try:
            yield read_state(folder / name)
        except DamagedError as error:
            yield folder / name, error


def damages(state: State, parts: slice = slice(None)) -> list[str]:
    """What is wrong with the files of a state, each named; ``parts``: of these only. Raises OSError where nothing can
    be read."""
    found = []
    for part in state.manifest.parts[parts]:
        try:
            size = state.folder.size(part.name)
            if size != part.bytes:
                found.append(f"{part.name} has {size} bytes instead of {part.bytes}")
            elif hash_part(state.folder, part.name) != part.sha256:
                found.append(f"{part.name} does not match its checksum")
        except FileNotFoundError:
            found.append(f"{part.name} is missing")
        except OSError as error:
            found.append(str(_damage_or(error, part.name)))
    return found


def strangers(state: State) -> list[str]:
    """Files beside those of a state; they do not harm it."""
    own = {MANIFEST, *(part.name for part in state.manifest.parts)}
    return [name for name in state.folder.names() if name not in own]


def _damage_or(error: OSError, name: str) -> DamagedError:
    """A file that its disk can't read is damaged. A storage that can't be reached is not: it may be back soon."""
    if error.errno in (errno.EIO, errno.EISDIR, errno.ENOTDIR):
        return DamagedError(f"{name} can't be read: {reason(error)}")
    raise error


def kept(steps: Sequence[int], validations: Mapping[int, float], policy: CheckpointConfig) -> dict[int, list[str]]:
    """The ``Policy`` of a run that goes on."""
    why = {step: ["last"] for step in steps[-policy.keep_last :]}
    for step, reasons in kept_for_good(steps, validations, policy).items():
        why[step] = why.get(step, []) + reasons
    return why


def kept_for_good(
    steps: Sequence[int], validations: Mapping[int, float], policy: CheckpointConfig
) -> dict[int, list[str]]:
    """The ``Policy`` of a finished run, whose model stands for its last state."""
    why: dict[int, list[str]] = {}
    for step in steps:
        if policy.keep_every and step % policy.keep_every == 0:
            why.setdefault(step, []).append(f"every {policy.keep_every}")
    best = sorted((step for step in steps if step in validations), key=lambda step: (validations[step], step))
    for step in best[: policy.keep_best]:
        why.setdefault(step, []).append("best")
    return why


def remove_state(folder: Folder) -> None:
    """Its commit first, so that one of which a part is left does not count."""
    if MANIFEST in folder.names():
        folder.remove_file(MANIFEST)
    folder.remove()


def latest(config: Config, stage: str, run: str) -> int | None:
    """The step of the newest state that was committed, None without any; its files are not read. Raises UnimoeError
    where the storage can't be read."""
    state = _newest(states_folder(config, stage, run))
    return None if state is None else state.step


def check_latest(folder: Folder, decides: dict[str, Any]) -> int:
    """For a driver, before anything starts: the step that a run will go on from if the files of its newest state are
    whole, 0 without any. Raises UsageError as ``check_same_run``, UnimoeError where the storage can't be read."""
    state = _newest(folder)
    if state is None:
        return 0
    check_same_run(state, decides)
    return state.step


def _newest(folder: Folder) -> State | None:
    try:
        return next((found for found in newest_first(folder) if isinstance(found, State)), None)
    except OSError as error:
        raise UnimoeError(f"{folder.location}: {reason(error)}") from None


def check_same_run(state: State, decides: dict[str, Any]) -> None:
    """Raises UsageError naming a setting in which a state differs from the run that would go on from it."""
    before = state.manifest.decides
    changed = [(key, before.get(key), decides.get(key)) for key in sorted(before.keys() | decides.keys())]
    changed = [(key, old, new) for key, old, new in changed if old != new]
    if not changed:
        return
    # Hashes say less than settings, and change with them.
    key, old, new = min(changed, key=lambda change: any(len(str(value)) > _LONG for value in change[1:]))
    what = f"another {key}" if len(f"{old}{new}") > 2 * _LONG else f"{key}={_shown(old)}, now it is {_shown(new)}"
    raise UsageError(
        f"{state.folder.location}: the state of step {state.step} was made with {what}; go on with the former, or "
        f"remove {state.folder.location.rpartition('/')[0]} to train anew"
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
