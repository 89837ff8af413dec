"""How many workers a run has, and whether it goes on after a failure: what Ray Train's controller asks.

Ray Train's own elastic policy learns of new nodes every 20 s, gives all workers to the first of several runs, stops the
workers for a planned change without notice, and tries to place workers on a node that is gone until a timeout. This one
looks at the cluster itself, shares it among the runs of a stage, and has the workers save before they are stopped.

It stands on parts of Ray Train that are not public (the version is pinned): ``ScalingPolicy``, ``FailurePolicy`` and
what the controller hands to them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from unimoe_ray.errors import UnimoeError
from unimoe_ray.parallel.cluster_topology import label_selectors
from unimoe_ray.training import interrupt
from unimoe_ray.training.interrupt import PlannedRestart
from unimoe_ray.training.observe import StandstillError
from unimoe_ray.training.pool import Pool, fitting, free_resources, live_nodes

log = logging.getLogger(__name__)

CHECK_S = 0.5
# After workers ended, what they used is free again within a second or two; what is still missing then is in use.
PATIENCE_S = 20.0
# A run gives workers up for another one that has none, or for a node that leaves, after this time: not for a flicker.
SHRINK_AFTER_S = 5.0


@dataclass
class PoolScaling(ScalingConfig):
    """Ray Train's, with places for the workers chosen anew at each start of them, and away from lost nodes."""

    lost: frozenset[str] = frozenset()

    def _label_selector_per_worker(self, num_workers: int) -> list[dict[str, str]] | None:
        selectors = label_selectors(num_workers, self._resources_per_worker_not_none)
        if not self.lost:
            return selectors
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self.lost))})"}
        return [selector | elsewhere for selector in selectors or [{}] * num_workers]


class PoolPolicy(ScalingPolicy):
    """The run's share of the pool, from the cluster as it is."""

    def __init__(self, scaling_config: PoolScaling, pool: Pool, run: str, grow_after: float):
        super().__init__(scaling_config)
        self._pool, self._run, self._grow_after = pool, run, grow_after
        self._waiting_since: float | None = None
        self._differs_since: float | None = None
        self._wanted = 0
        self._nodes_used: set[str] = set()
        self._checked = 0.0
        self._asked = False

    def _get_num_workers_for_resource_request(self) -> int:
        return self._pool.wanted(self._run)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        self._asked, self._differs_since = False, None
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        known = live_nodes()
        nodes = live_nodes(suspects=self._nodes_used)
        self.scaling_config.lost = frozenset(known) - frozenset(nodes)
        share, free = self._pool.share(self._run, nodes), self._fitting_now(nodes)
        patient = now - self._waiting_since < PATIENCE_S
        if share < self._pool.least or free < (share if patient else self._pool.least):
            time.sleep(CHECK_S)  # the controller asks again at once
            return NoopDecision()
        self._waiting_since = None
        return self._resize(min(share, free))

    def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._asked or now - self._checked < CHECK_S:
            return NoopDecision()
        self._checked = now
        workers = worker_group_state.workers
        self._nodes_used = {worker.metadata.node_id for worker in workers}
        nodes = live_nodes()
        has, share = len(workers), self._pool.share(self._run, nodes)
        wanted = min(share, has + self._fitting_now(nodes)) if share > has else share
        if wanted == has or wanted < self._pool.least:
            self._differs_since = None
            return NoopDecision()
        if self._differs_since is None or wanted != self._wanted:
            self._differs_since, self._wanted = now, wanted
        if now - self._differs_since >= (self._grow_after if wanted > has else SHRINK_AFTER_S):
            # They save and raise PlannedRestart; the decision about how many there are then is the one above.
            log.info("asking %d workers to save and stop: there is to be %d", has, wanted)
            for worker in workers:
                worker.execute_async(interrupt.request, "resize")
            self._asked = True
        return NoopDecision()

    def _fitting_now(self, nodes: dict[str, dict[str, float]]) -> int:
        return sum(fitting(free, self._pool.need) for node, free in free_resources().items() if node in nodes)

    def _resize(self, workers: int) -> ResizeDecision:
        return ResizeDecision(workers, self.scaling_config._resources_per_worker_not_none)


class Perseverance(FailurePolicy):
    """Goes on after failures as long as the run comes further between them.

    progress: the last step that the run has done
    """

    def __init__(self, max_failures: int, progress: Callable[[], int]):
        super().__init__(FailureConfig(max_failures=max_failures))
        self._progress = progress
        self._failures, self._reached = 0, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, PreemptionError):
            return FailureDecision.RETRY
        if isinstance(error, ControllerError) and not isinstance(error.controller_failure, StandstillError):
            # Workers that could not be started: there will be others.
            retry = isinstance(error.controller_failure, RETRYABLE_CONTROLLER_ERRORS)
            return FailureDecision.RETRY if retry else FailureDecision.RAISE
        errors = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
        if any(isinstance(cause, UnimoeError) for cause in errors):
            return FailureDecision.RAISE  # it would be the same again
        if any(isinstance(cause, PlannedRestart) for cause in errors):
            return FailureDecision.RETRY
        reached = self._progress()
        self._failures = self._failures + 1 if reached <= self._reached else 1
        self._reached = max(reached, self._reached)
        return FailureDecision.RETRY if self._failures <= self.failure_config.max_failures else FailureDecision.RAISE
