"""Experts land where the plan says: fake GPUs and labels on a cluster of several nodes on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from unimoe_ray.parallel.cluster_topology import (
    MODALITY_LABEL,
    Ranks,
    cluster_nodes,
    gather,
    label_selectors,
)
from unimoe_ray.parallel.placement import plan
from unimoe_ray.parallel.topology import Loads, Placement, readers_of

KINDS = ("text", "image", "speech")
LAYERS, EXPERTS, SLOTS, WORKERS = 2, 6, 3, 3
# The kind of tokens that goes to each expert; text goes to all alike.
MAIN = ["image", "speech", "image", "image", "speech", "image"]
NEED = {"CPU": 1, "GPU": 1}


def make_plan(ranks: Ranks) -> Placement:
    tokens = np.array(
        [[10.0] * EXPERTS, [90.0 * (kind == "image") for kind in MAIN], [90.0 * (kind == "speech") for kind in MAIN]]
    )
    readers = readers_of(KINDS, ranks.topology, ranks.on_node)
    return plan(Loads.by_modality([tokens] * LAYERS, readers, KINDS), ranks.topology)


def worker(config: dict) -> None:
    """A training worker: makes the experts that the plan gives it, and looks where it is."""
    import torch
    import torch.distributed as dist

    from unimoe_ray.model.moe import SwiGLU

    assert not torch.cuda.is_available() or config["real_gpus"]
    rank, context = dist.get_rank(), ray.get_runtime_context()
    ranks = gather(SLOTS)
    placement = make_plan(ranks)
    experts = {
        f"layers.{layer}.experts.{expert}": SwiGLU(4, 8)
        for layer, held in enumerate(placement.layers)
        for expert in held[rank]
    }
    assert ranks.node_ids[ranks.topology.nodes[rank]] == context.get_node_id()
    assert len(ray.get_gpu_ids()) == 1
    label = context.get_node_labels()[MODALITY_LABEL]
    for name in experts:
        assert MAIN[int(name.rsplit(".", 1)[1])] in label.split("-"), (name, label)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (context.get_node_id(), label, sorted(experts), placement.layers))
    assert all(other[3] == placement.layers for other in told)
    if rank == 0:
        Path(config["out"]).write_text(json.dumps([other[:3] for other in told]))


@pytest.fixture(scope="module")
def cluster():
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    try:
        for label, gpus in (("image-video", 2), ("speech", 1)):
            nodes.add_node(num_cpus=gpus, num_gpus=gpus, labels={MODALITY_LABEL: label}, object_store_memory=80 * 2**20)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.timeout(500)
def test_experts_land_where_the_plan_says(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import torch

    out = tmp_path / "landed.json"
    trainer = TorchTrainer(
        worker,
        train_loop_config={"out": str(out), "real_gpus": torch.cuda.is_available()},
        scaling_config=ScalingConfig(
            num_workers=WORKERS,
            use_gpu=True,
            resources_per_worker=NEED,
            label_selector=label_selectors(WORKERS, NEED),
        ),
        run_config=RunConfig(name="placement", storage_path=str(tmp_path)),
        torch_config=TorchConfig(backend="gloo"),
    )
    trainer.fit()

    landed = json.loads(out.read_text())
    labels = {node.id: node.label for node in cluster_nodes()}
    assert sorted(label for _, label, _ in landed) == ["image-video", "image-video", "speech"]
    assert all(labels[node] == label for node, label, _ in landed)
    # What the driver expects of the cluster, whatever order the ranks came in.
    expected = Ranks.of([(node, label) for node, label, _ in landed], [SLOTS] * WORKERS)
    for rank, held in enumerate(zip(*make_plan(expected).layers, strict=True)):
        names = sorted(f"layers.{layer}.experts.{expert}" for layer, experts in enumerate(held) for expert in experts)
        assert landed[rank][2] == names
    everything = sorted(name for *_, names in landed for name in names)
    assert everything == sorted(f"layers.{layer}.experts.{e}" for layer in range(LAYERS) for e in range(EXPERTS))


@pytest.mark.timeout(200)
def test_selectors_are_by_label_and_keep_the_others_out_of_labelled_nodes(cluster):
    """The fourth worker belongs on the node without a label, and Ray puts it there."""
    selectors = label_selectors(4, NEED)
    assert selectors is not None
    wanted = [selector[MODALITY_LABEL] for selector in selectors]
    assert wanted == ["!in(image-video,speech)", "image-video", "image-video", "speech"]
    assert label_selectors(5, NEED) is None  # a node has yet to join

    @ray.remote(num_cpus=0, num_gpus=1)
    def label() -> str:
        return ray.get_runtime_context().get_node_labels().get(MODALITY_LABEL, "")

    assert ray.get(label.options(label_selector=selectors[0]).remote(), timeout=150) == ""
