"""What happens to a run's workers, written down by Ray Train's controller: who failed where, and why they stop."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker

from unimoe_ray.training import interrupt
from unimoe_ray.training.interrupt import PlannedRestart
from unimoe_ray.training.recovery import START, STOP, last_line, last_step, write_event

# What a worker says when another one is gone or does not answer.
COLLATERAL = re.compile(r"closed by peer|reset by peer|refused|broken pipe|timed? ?out|gloo/transport|nccl", re.I)
ANSWER_S = 2.0
# Ray Train kills a worker that takes longer than 5 s to stop.
WRITE_S = 3.0


class StandstillError(Exception):
    """No worker complains, and there is no new step."""


class SaveOnTerminate(WorkerCallback):
    """SIGTERM asks a worker to save, and a worker that is stopped has a moment for the state that it is writing."""

    def after_init_train_context(self) -> None:
        interrupt.on_terminate()

    def before_worker_shutdown(self) -> None:
        interrupt.finish_writing(WRITE_S)


class Observer(WorkerGroupCallback):
    """Writes the events of one run, and passes on to all workers that a node is about to be taken away.

    Workers of which one has failed are stopped at once, and their placement group is removed. Ray Train itself does so
    only when the next ones are to start: until then the group would hold what these are to get, and where a node of it
    was lost, Ray's head node would look for another without a pause, with no time left for anything else.

    hang_timeout: that of collectives; a run that makes no step for twice as long, with or without them, stands still
    """

    def __init__(self, folder: Path, run: str, hang_timeout: float):
        self._folder, self._run, self._patience = folder, run, 2 * hang_timeout
        self._workers: list[Worker] = []
        self._stop: Callable[[], None] = lambda: None
        self._told = self._asked = False
        self._came_at = self._looked = 0.0
        self._step = 0

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        self._workers, self._told, self._asked = [], False, False
        self._step = 0
        write_event(self._folder, self._run, START, workers=worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._workers, self._stop = worker_group.get_workers(), worker_group.get_worker_group_state().shutdown
        self._came_at = self._looked = time.monotonic()

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        if worker_group_status.get_preemption_info() is not None and not self._asked:
            self._asked = True
            for worker in self._workers:
                worker.execute_async(interrupt.request, "preemption")
        if worker_group_status.errors and not self._told:
            self._told = True
            self._tell(worker_group_status)
            self._stop()
        if not worker_group_status.errors and time.monotonic() - self._looked > self._patience / 20:
            self._look()

    def _look(self) -> None:
        """Raises StandstillError."""
        now = self._looked = time.monotonic()
        line = last_line(self._folder, self._run)
        if line.get("step", 0) != self._step or line.get("step") == line.get("steps", 0):
            self._step, self._came_at = line.get("step", 0), now
        if now - self._came_at > self._patience:
            what = self._silent(range(len(self._workers)))
            what = what or {"cause": "hang", "text": f"no new step; {self._at()}"}
            write_event(self._folder, self._run, STOP, **what)
            self._stop()
            raise StandstillError(what["text"])

    def _tell(self, status: WorkerGroupPollStatus) -> None:
        rank, error = min(status.errors.items(), key=lambda item: (_is_collateral(item[1]), item[0]))
        full = str(status.worker_statuses[rank].error)
        if isinstance(error, PlannedRestart):
            what = {"cause": error.cause, "text": f"{error.text}; {self._at()}"}
        elif _is_dead(error):
            what = {"cause": "lost", "rank": rank, "text": f"{self._where(rank)} is gone; {self._at()}"}
        elif _is_collateral(error):
            others = [rank for rank in status.worker_statuses if rank not in status.errors]
            ranks = ", ".join(map(str, sorted(status.errors)))
            what = self._silent(others) or {
                "cause": "network",
                "text": f"ranks {ranks} lost the connection between them; {self._at()}",
                "traceback": full,
            }
        else:
            text = f"{self._where(rank)}: {type(error).__name__}: {_first_line(error)}; {self._at()}"
            what = {"cause": "error", "rank": rank, "text": text, "traceback": full.rstrip()}
        write_event(self._folder, self._run, STOP, **what)

    def _silent(self, ranks: Sequence[int]) -> dict[str, Any]:
        """Which of these workers, that others complain of, is gone or hangs, and where in its code; {} if none."""
        asked = {rank: self._workers[rank].execute_async(interrupt.training_stack) for rank in ranks}
        deadline = time.monotonic() + ANSWER_S
        for rank, answer in asked.items():
            try:
                stack = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                return {"cause": "hang", "rank": rank, "text": f"{self._where(rank)} does not answer; {self._at()}"}
            except ray.exceptions.RayActorError:
                return {"cause": "lost", "rank": rank, "text": f"{self._where(rank)} is gone; {self._at()}"}
            if stack is not None:
                text = f"{self._where(rank)} hangs; {self._at()}"
                return {"cause": "hang", "rank": rank, "text": text, "traceback": f"It is here:\n{stack.rstrip()}"}
        return {}

    def _at(self) -> str:
        return f"after step {last_step(self._folder, self._run)}"

    def _where(self, rank: int) -> str:
        if rank >= len(self._workers):
            return f"rank {rank}"
        place = self._workers[rank].metadata
        return f"rank {rank} on node {place.node_ip} ({place.node_id[:8]}, process {place.pid})"


def _is_dead(error: BaseException) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError)


def _is_collateral(error: BaseException) -> bool:
    """Gone workers are the reason rather than those who miss them; ours says what it is."""
    if isinstance(error, PlannedRestart) or _is_dead(error):
        return False
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and bool(COLLATERAL.search(str(error)))
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
