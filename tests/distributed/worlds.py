"""Several processes on one machine, and the small training runs they make for comparison with one process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.tiny import DIMS, VOCAB, tiny_config
from unimoe_ray.config.model import MODALITIES, PLACEHOLDER_IDS
from unimoe_ray.config.training import LoraConfig, OptimizerConfig, TrainRun
from unimoe_ray.data.batch import collate
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import Batch, UniMoE, to_batch
from unimoe_ray.parallel.groups import Held
from unimoe_ray.training.stages import make_trainable

SAMPLES = 12  # of a step, over all ranks: divisible by every world and accumulation here
STEPS = 5
_KINDS = ("image", "speech", "audio", None)
_CONNECTORS = {f"connector.{modality}": 1e-2 for modality in MODALITIES}
TRAIN = {
    "full": TrainRun(steps=STEPS, tasks={"x": 1}, train={"language": 2e-3} | _CONNECTORS, weight_decay=0.1),
    "experts": TrainRun(steps=STEPS, tasks={"x": 1}, train={"feed_forward": 2e-3, "router": 5e-3} | _CONNECTORS),
    "lora": TrainRun(
        steps=STEPS, tasks={"x": 1}, train={"lora": 3e-3, "router": 5e-3} | _CONNECTORS, lora=LoraConfig(r=4, alpha=8)
    ),
    "frozen experts": TrainRun(
        steps=STEPS,
        tasks={"x": 1},
        train={"lora": 3e-3, "router": 5e-3} | _CONNECTORS,
        lora=LoraConfig(r=4, alpha=8, targets=["attention"]),
    ),
}
# Where a gradient is rounding noise only, Adam makes steps of full size and random sign of it; eps must be above that.
OPTIMIZER = OptimizerConfig(eps=1e-6)


@dataclass(frozen=True)
class Model:
    """What one process and a world must agree on.

    trains: key of ``TRAIN``; skewed: five experts, one of which no token goes to, and the first gets half of them;
    moe: settings of ``model.moe``
    """

    trains: str = "full"
    skewed: bool = False
    moe: tuple[tuple[str, object], ...] = ()
    steps: int = STEPS


@dataclass(frozen=True)
class Case:
    """How a world trains it. placement: of both mixtures, None: experts on every rank; per_rank: micro-batches of a
    rank and step; moves: step to placement, before which experts move there; checkpointed: with activation
    checkpointing; same_as: another case, of which nothing must differ."""

    model: Model
    placement: tuple[Held, Held] | None = None
    zero: int = 2
    per_rank: int = 1
    moves: dict[int, tuple[Held, Held]] = field(default_factory=dict)
    checkpointed: bool = False
    precision: str = "fp32"
    same_as: str | None = None


def build(settings: Model):
    """The model and its parameter groups, the same everywhere."""
    slots = ["base", "image", "speech", "audio", *(["base"] if settings.skewed else [])]
    config = tiny_config(Path("unused"), model={"moe": {"slots": slots} | dict(settings.moe)}).model
    torch.manual_seed(0)
    model = UniMoE(config, VOCAB, DIMS)
    with torch.no_grad():
        model.make_sparse()
        for parameter in model.language.parameters():
            if parameter.ndim == 2:  # experts differ, and what is added up is of like size
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.match_text_rms()
        if settings.skewed:  # logits a, -a, b, -b, 0: two of the first four are positive
            for layer in mixtures(model):
                big, small = torch.randn(2, layer.gate.in_features)
                layer.gate.weight.copy_(torch.stack([big, -big, small, -small, 0 * small]))
    groups = make_trainable(model, TRAIN[settings.trains])
    with torch.no_grad():  # LoRA's B starts at zero: give every adapter a gradient path
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    return model.train(), groups


def samples(step: int) -> list[Batch]:
    """Of one step, each by itself; the media of neighbours are of one kind."""
    return [micro_batch(step, range(i, i + 1)) for i in range(SAMPLES)]


def micro_batch(step: int, which: range) -> Batch:
    """Padded to the longest of them."""
    made = [_sample(step, i) for i in which]
    features = {name: value for _, stored in made for name, value in stored.items()}
    return to_batch(collate([sample for sample, _ in made], features.__getitem__))


def _sample(step: int, index: int) -> tuple[PreparedSample, dict[str, StoredFeatures]]:
    rng = np.random.default_rng([step, index])
    kind = _KINDS[index * len(_KINDS) // SAMPLES]
    media, counts, ids, stored = [], [], [1], {}
    if kind is not None:
        length = 4 if kind == "image" else int(rng.integers(2, 6))
        media, counts = [f"{kind}/{index}"], [length]
        ids.append(PLACEHOLDER_IDS[kind])
        stored[media[0]] = StoredFeatures(rng.normal(size=(1, length, DIMS[kind])).astype(np.float16), [length])
    answer = [*rng.integers(4, 250, size=rng.integers(1, 4)).tolist(), 2]
    ids += [*rng.integers(4, 250, size=rng.integers(2, 9)).tolist(), *answer]
    labels = [-100] * (len(ids) - len(answer)) + answer
    return PreparedSample(str(index), "x", kind or "text", ids, labels, media, counts), stored


def record_outputs(model: UniMoE) -> list[torch.Tensor]:
    """Final hidden states of each forward pass from now on, [tokens, H] each."""
    outputs: list[torch.Tensor] = []
    norm = model.language.get_decoder().norm
    norm.register_forward_hook(lambda *args: outputs.append(args[-1].detach().clone().flatten(0, 1)))
    return outputs


def run_world(world: int, work: Callable[[int, int], None]) -> None:
    """``work(rank, world)`` in as many processes with a gloo process group, forked from one that has imported what they
    need (importing takes longer than the work). It must be picklable. They meet at a port that is held from the
    beginning: one that was free may be taken while they start."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed.worlds_preload"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(partial(_join, world=world, port=store.port, work=work), nprocs=world, start_method="forkserver")


def _join(rank: int, world: int, port: int, work: Callable[[int, int], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    work(rank, world)
    dist.barrier()
    dist.destroy_process_group()
