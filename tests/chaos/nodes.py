"""A real Ray cluster of several nodes on this machine, that lose and gain nodes at steps of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2


@dataclass
class Nodes:
    """head and others: with ``Cluster``'s own nodes."""

    cluster: Cluster
    others: list = field(default_factory=list)

    def add(self) -> None:
        """One with room for one worker."""
        self.others.append(self.cluster.add_node(num_cpus=1, include_dashboard=False))

    def kill(self) -> None:
        """One that has a worker, as if its power was cut: all its processes die at once, and nobody is told."""
        node = self._with_worker()
        self.others.remove(node)
        for process in [*raylet(node).children(recursive=True), raylet(node)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self) -> None:
        """Notice that one that has a worker will be taken away in a minute, as a cloud gives it."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int(1000 * (time.time() + 60))
        gcs = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, why = gcs.drain_node(self._with_worker().node_id, reason, "spot", deadline)
        assert accepted, why

    def _with_worker(self):
        pids = _raylets_of_workers()
        return next(node for node in self.others if raylet(node).pid in pids)


def raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _raylets_of_workers() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if any("ray::RayTrainWorker" in part for part in process.info["cmdline"] or []):
                found.add(int(process.environ()["RAY_RAYLET_PID"]))
    return found


@contextmanager
def cluster_of(workers: int) -> Iterator[Nodes]:
    """The head and as many other nodes, each with room for one worker; one of these rooms is Ray Data's."""
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = Nodes(cluster)
        for _ in range(workers):
            nodes.add()
        cluster.wait_for_nodes()
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
