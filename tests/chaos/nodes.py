"""A real Ray cluster of several nodes on this machine, that lose and gain nodes at steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import ray
from ray.cluster_utils import Cluster


@dataclass
class Nodes:
    """head and others: with ``Cluster``'s own nodes."""

    cluster: Cluster
    others: list = field(default_factory=list)

    def add(self) -> None:
        """One with room for one worker."""
        self.others.append(self.cluster.add_node(num_cpus=1, include_dashboard=False))

    def kill(self) -> None:
        """The last one, as if its power was cut: all its processes die at once, and nobody is told."""
        node = self.others.pop()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def cluster_of(workers: int) -> Iterator[Nodes]:
    """Room for one worker on the head, beside Ray Data, and for one on each other node."""
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = Nodes(cluster)
        for _ in range(workers - 1):
            nodes.add()
        cluster.wait_for_nodes()
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
