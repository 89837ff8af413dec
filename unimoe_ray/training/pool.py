"""The runs of a stage share the cluster's workers: what one does not need any more goes to the others.

The driver keeps a file of the runs that are not finished; the controller of each reads it, looks at the cluster, and
computes the shares of all. Controllers run on the driver's node, so the file can be anywhere.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

# Logical CPUs that are left to Ray Data, which delivers the batches: it starves without any.
DATA_CPUS = 1
CONNECT_S = 0.5


@dataclass(frozen=True)
class Pool:
    """workers: of all runs together; least: of a run, which waits otherwise; need: resources of a worker; side_by_side:
    where there are more runs, each has a worker, as cores can be shared and GPUs cannot."""

    path: Path
    workers: int
    least: int
    need: Mapping[str, float]
    side_by_side: bool = False

    def announce(self, runs: Sequence[str]) -> None:
        """These runs are not finished. For the driver."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(list(runs)), encoding="utf-8")
        temporary.replace(self.path)

    def runs(self) -> list[str]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    def wanted(self, run: str) -> int:
        """Workers of this run if the cluster had room for all: what an autoscaler is asked for."""
        runs = self.runs()
        return shares(self._most(runs), runs, self.least).get(run, 0)

    def share(self, run: str, nodes: Mapping[str, Mapping[str, float]]) -> int:
        """Workers of this run in a cluster of ``nodes`` (resources by id); 0: it waits for others to finish."""
        runs = self.runs()
        return shares(min(self._most(runs), self.room(nodes)), runs, self.least).get(run, 0)

    def _most(self, runs: Sequence[str]) -> int:
        return max(self.workers, len(runs)) if self.side_by_side else self.workers

    def room(self, nodes: Mapping[str, Mapping[str, float]]) -> int:
        """Workers that fit."""
        fit = sum(fitting(resources, self.need) for resources in nodes.values())
        spare = sum(resources.get("CPU", 0) for resources in nodes.values()) - DATA_CPUS
        return min(fit, max(1, int(spare / self.need["CPU"] + 1e-9)))


def fitting(resources: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Workers that fit on one node."""
    return max(0, min(int(resources.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount > 0))


def shares(workers: int, runs: Sequence[str], least: int) -> dict[str, int]:
    """Even parts, the first runs getting one more; where the parts would be below ``least``, the last runs get none."""
    served = runs[: max(1, workers // least)] if workers >= least else []
    if not served:
        return dict.fromkeys(runs, 0)
    part, more = divmod(workers, len(served))
    given = {run: part + (place < more) for place, run in enumerate(served)}
    return dict.fromkeys(runs, 0) | given


def live_nodes(suspects: Collection[str] = ()) -> dict[str, dict[str, float]]:
    """Resources of the nodes that workers can be started on, by node id: alive, and not about to be taken away.

    The cluster's head takes some seconds to notice that a node is gone; ``suspects`` are asked whether they answer.
    """
    leaving = ray._private.state.state.get_draining_nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and (node["NodeID"] not in suspects or _answers(node))
    }


def free_resources() -> dict[str, dict[str, float]]:
    """What nobody uses, by node id."""
    return ray._private.state.available_resources_per_node()


def _answers(node: Mapping) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_S):
            return True
    except OSError:
        return False
