"""From a configuration and kinds of nodes to pods: how many, how large, and why; what does not fit, and what would."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unimoe_ray.config import Config
from unimoe_ray.config.kubernetes import NodeConfig
from unimoe_ray.kuberay import memory
from unimoe_ray.kuberay.memory import Need, Term
from unimoe_ray.kuberay.overlays import RANKS_PER_CPU_POD, Overlay

if TYPE_CHECKING:
    from unimoe_ray.parameter_table import Sizes  # It would load torch.

ENCODERS = ("image", "speech", "audio")
DATA_CPUS = 2  # for Ray Data beside the ranks of a pod
# Shared memory for Ray's objects: blocks of features while training, as a share of what the processes take; else soft
# tokens, a few MiB a request.
OBJECTS_SHARE, OBJECTS_MIN_GIB, OBJECTS_MAX_GIB = 0.2, 0.5, 64.0
STEP_GIB = 0.25  # to which memory is rounded up
RAYLET_GIB, HEAD_GIB = 0.75, 1.5  # the raylet and its agents; GCS and dashboard besides
STORAGE_GIB_PER_S = 0.5  # at which a checkpoint is written
AUTOSCALER_GIB, AUTOSCALER_CPUS = 1, 0.5  # of its container, beside the head's


@dataclass(frozen=True)
class Pod:
    """One kind of pod. memory_gib, cpus: requests and limits of its main container; objects_gib: of them, shared
    memory for Ray's objects; least, most: replicas; of: what it runs, how often; problems: what does not fit."""

    name: str
    node: NodeConfig
    node_name: str
    cpus: float
    gpus: int
    memory_gib: float
    objects_gib: float
    least: int
    most: int
    arithmetic: str
    runs: list[tuple[int, Need]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """All pods of an overlay by name; ranks: training workers; seconds: until a pod that ends is killed."""

    pods: dict[str, Pod]
    ranks: int
    checkpoint_s: int
    stream_s: int
    placement: list[str]
    storage_gib: int

    @property
    def problems(self) -> list[str]:
        return [problem for pod in self.pods.values() for problem in pod.problems]


def plan(config: Config, overlay: Overlay, sizes: Sizes) -> Plan:
    """Pure. ``config`` is the one that runs in the cluster (``in_cluster``)."""
    nodes, serving, on_gpu = config.kubernetes.nodes, config.serving, overlay.gpu
    large, large_name = (nodes.large_gpu, "large_gpu") if on_gpu else (nodes.cpu, "cpu")
    small, small_name = (nodes.small_gpu, "small_gpu") if on_gpu else (nodes.cpu, "cpu")
    ranks = int(config.training.workers)
    per_pod = max(1, min(large.gpus if on_gpu else RANKS_PER_CPU_POD, ranks))
    train_pods = math.ceil(ranks / per_pod)

    train = max(
        (memory.training(config, sizes, run, ranks, on_gpu) for run in sizes.trained),
        key=lambda need: (need.device_gib, need.host_gib),
        default=memory.driver(config, sizes, reads_model=False),
    )
    language = memory.language_model(config, sizes, on_gpu)
    threads = config.training.threads_per_worker
    pods = [
        _head("job-head", memory.driver(config, sizes, reads_model=True), nodes.cpu),
        _head("head", memory.driver(config, sizes, reads_model=False), nodes.cpu),
        _workers(
            "train",
            (large, large_name),
            runs=[(per_pod, train)],
            cpus=large.cpus if on_gpu else per_pod * threads + DATA_CPUS,
            gpus=per_pod if on_gpu else 0,
            counts=(0 if overlay.scales else train_pods, train_pods),
            holds_blocks=True,
        ),
        _workers(
            "language",
            (large, large_name),
            runs=[(1, language)],
            # An ingress replica and Serve's proxy have the other one.
            cpus=math.ceil(serving.language.replica_cpus) + 1,
            gpus=math.ceil(serving.language.replica_gpus),
            counts=(serving.language.min_replicas, serving.language.max_replicas),
        ),
    ]
    for tower in ENCODERS:
        part = getattr(serving, tower)
        pods.append(
            _workers(
                tower,
                (small, small_name),
                runs=[(1, memory.encoder(config, sizes, tower, on_gpu))],
                cpus=math.ceil(part.num_cpus),
                gpus=math.ceil(part.num_gpus),
                counts=(part.min_replicas, part.max_replicas),
            )
        )
    if on_gpu:
        need = max((memory.encoder(config, sizes, tower, True) for tower in ENCODERS), key=lambda n: n.device_gib)
        most = 2 * config.kubernetes.train_nodes
        pods.append(
            _workers(
                "encode",
                (small, small_name),
                runs=[(small.gpus, need)],
                cpus=small.cpus,
                gpus=small.gpus,
                counts=(0 if overlay.scales else most, most),
                holds_blocks=True,
            )
        )
    checkpoint = memory.checkpoint_bytes(sizes) / memory.GIB
    runs = sum(len(stage) for _, stage in config.stages)
    return Plan(
        pods={pod.name: pod for pod in pods},
        ranks=ranks,
        checkpoint_s=60 + math.ceil(checkpoint / STORAGE_GIB_PER_S),
        stream_s=math.ceil(max(serving.limits.request_seconds, serving.language.shutdown_timeout_s)),
        placement=_placement(config, sizes, language, train, large, on_gpu),
        storage_gib=config.kubernetes.storage_gib or 20 + math.ceil(checkpoint * max(runs, 1) * 1.5),
    )


def _head(name: str, driver: Need, node: NodeConfig) -> Pod:
    base = [Term("GCS, dashboard, raylet", "constant", HEAD_GIB + RAYLET_GIB)]
    return _pod(name, (node, "cpu"), [(1, driver)], cpus=1, gpus=0, counts=(1, 1), base=base, beside=AUTOSCALER_GIB)


def _workers(
    name: str,
    node: tuple[NodeConfig, str],
    *,
    runs: list[tuple[int, Need]],
    cpus: float,
    gpus: int,
    counts: tuple[int, int],
    holds_blocks: bool = False,
) -> Pod:
    base = [Term("raylet", f"{RAYLET_GIB:g} + {cpus:g} CPUs x 0.1", RAYLET_GIB + 0.1 * cpus)]
    return _pod(name, node, runs, cpus=cpus, gpus=gpus, counts=counts, base=base, holds_blocks=holds_blocks)


def _pod(
    name: str,
    where: tuple[NodeConfig, str],
    runs: list[tuple[int, Need]],
    *,
    cpus: float,
    gpus: int,
    counts: tuple[int, int],
    base: list[Term],
    holds_blocks: bool = False,
    beside: float = 0,
) -> Pod:
    """``beside``: memory of the pod's other containers."""
    node, node_name = where
    processes = sum(count * need.host_gib for count, need in runs) + sum(term.gib for term in base)
    share = processes * OBJECTS_SHARE if holds_blocks else 0
    objects = _rounded(min(max(share, OBJECTS_MIN_GIB), OBJECTS_MAX_GIB))
    total = _rounded(processes + objects)
    problems = []
    key = f"kubernetes.nodes.{node_name}"
    if total + beside > node.memory_gib:
        problems.append(f"{name}: needs {total + beside:g} GiB of memory, but {key}.memory_gib is {node.memory_gib:g}")
    if cpus > node.cpus:
        problems.append(f"{name}: needs {cpus:g} CPUs, but {key}.cpus is {node.cpus:g}")
    if gpus > node.gpus:
        problems.append(f"{name}: needs {gpus} GPUs, but {key}.gpus is {node.gpus}")
    for _, need in runs:
        if gpus and need.device_gib > node.gpu_memory_gib:
            problems.append(
                f"{name}: {need.of} needs {need.device_gib:.1f} GiB on its GPU, but {key}.gpu_memory_gib is "
                f"{node.gpu_memory_gib:g}"
            )
    return Pod(
        name=name,
        node=node,
        node_name=node_name,
        cpus=cpus,
        gpus=gpus,
        memory_gib=total,
        objects_gib=objects,
        least=counts[0],
        most=counts[1],
        arithmetic=_arithmetic(runs, base, objects, total),
        runs=runs,
        problems=problems,
    )


def _rounded(gib: float) -> float:
    return math.ceil(gib / STEP_GIB) * STEP_GIB


def _arithmetic(runs: list[tuple[int, Need]], base: list[Term], objects: float, total: float) -> str:
    """``process 0.75 + weights 10.8 M parameters x 4 B = 0.04 + ... = 4 GiB``, for people."""
    parts = []
    for count, need in runs:
        terms = " + ".join(f"{term.what} {term.gib:.2f} ({term.how})" for term in need.host)
        parts.append(f"{count} x [{terms}]" if count > 1 else terms)
    parts += [f"{term.what} {term.gib:.2f} ({term.how})" for term in base]
    return f"{' + '.join([*parts, f'objects {objects:g}'])} = {total:g} GiB"


def _placement(config: Config, sizes: Sizes, language: Need, train: Need, node: NodeConfig, on_gpu: bool) -> list[str]:
    """Where the experts are, for training and for the endpoint, and what it would take where they do not fit."""
    slots = config.model.moe.slots
    if not on_gpu:
        return [f"every process holds all {len(slots)} experts: there is no GPU to spread them over"]
    lines = []
    for need, width, what in ((train, 4, "training"), (language, 2, "endpoint")):
        ways = memory.expert_ranks(config, int(config.training.workers))
        if what == "training" and ways > 1:
            fits = f"{need.device_gib:.1f} GiB of {node.gpu_memory_gib:g} on each GPU"
            lines.append(f"{what}: {len(slots)} experts over {ways} ranks, training.expert_parallel.ep_size ({fits})")
            continue
        gpus = memory.experts_over_gpus(config, sizes, need, width, node.gpu_memory_gib)
        if gpus == 1:
            fits = f"{need.device_gib:.1f} GiB of {node.gpu_memory_gib:g}"
            lines.append(f"{what}: every GPU holds all {len(slots)} experts ({fits})")
        elif gpus is None:
            rest = need.device_gib - sizes.experts * width / memory.GIB
            lines.append(
                f"{what}: does not fit, wherever the experts are: without any it takes {rest:.1f} GiB, and a GPU has "
                f"{node.gpu_memory_gib:g}"
            )
        else:
            order = sorted(range(len(slots)), key=lambda expert: (slots[expert], expert))
            each = [order[len(order) * gpu // gpus : len(order) * (gpu + 1) // gpus] for gpu in range(gpus)]
            groups = "; ".join(
                f"GPU {gpu}: {', '.join(f'{expert} ({slots[expert]})' for expert in group)}"
                for gpu, group in enumerate(each)
            )
            lines.append(
                f"{what}: {need.device_gib:.1f} GiB do not fit a GPU of {node.gpu_memory_gib:g}; with the experts of a "
                f"layer over {gpus} GPUs it would ({groups})"
            )
    return lines
