"""The loss on held-out samples while training, by modality group; it leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from unimoe_ray.data.batch import collate
from unimoe_ray.data.layout import split_step
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import SampleTable, Source
from unimoe_ray.errors import UsageError
from unimoe_ray.model.unimoe import to_batch


@dataclass(frozen=True)
class ValidationPlan:
    """One rank's share: (index in ``groups``, sample indices) of each micro-batch, equally many on every rank, as the
    exchange between experts needs it; one without samples counts for no group."""

    source: Source
    groups: list[str]
    micro_batches: list[tuple[int, np.ndarray]]


def plan_validation(
    source: Source, tasks: list[str], *, samples: int, seed: int, rank: int, world: int, max_tokens: int
) -> ValidationPlan:
    """Up to ``samples`` of each modality group of these tasks, chosen by the seed. Raises UsageError without any."""
    table = SampleTable(Path(source.samples))
    by_task = table.by_task()
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *(by_task[task] for task in tasks if task in by_task)]))
    if not len(rows):
        raise UsageError("training.validation.every is not 0, but the dev split has no sample of this run's tasks")
    chosen, groups = [], []
    for code, name in sorted(enumerate(table.group_names), key=lambda item: item[1]):
        of_group = rows[table.groups[rows] == code]
        if len(of_group):
            groups.append((code, name))
            order = np.random.default_rng([seed, code]).permutation(of_group)
            chosen.append(order[:samples])
    mine = np.concatenate(chosen)
    ranks = split_step(mine, table.lengths[mine], table.groups[mine], world, max_tokens)
    place = {code: index for index, (code, _) in enumerate(groups)}
    micros = [(place[int(table.groups[micro[0]])] if len(micro) else 0, micro) for micro in ranks[rank]]
    return ValidationPlan(source, [name for _, name in groups], micros)


def validate(engine, plan: ValidationPlan, device: torch.device) -> dict[str, float]:
    """Mean loss per answer token of each group, over all ranks, each of which must call this at the same step."""
    table = SampleTable(Path(plan.source.samples))
    sums = torch.zeros(2, len(plan.groups), dtype=torch.float64, device=device)
    with _apart(engine, device):
        for group, rows in plan.micro_batches:
            arrays = collate([table.get(int(row)) for row in rows], lambda name: read_features(plan.source, name))
            loss = engine(to_batch(arrays).to(device))
            sums[0, group] += loss.token_loss
            sums[1, group] += loss.answer_tokens
    dist.all_reduce(sums)
    losses, tokens = sums.tolist()
    return {name: round(a / max(n, 1), 6) for name, a, n in zip(plan.groups, losses, tokens, strict=True)}


@contextmanager
def _apart(engine, device: torch.device) -> Iterator[None]:
    """Without gradients and dropout; each module's mode, the random numbers and the routers' record as before."""
    recorder = engine.module.recorder
    modes = [(module, module.training) for module in engine.modules()]
    kept = recorder.token_mask, recorder.kinds, recorder.layers
    devices = [device] if device.type == "cuda" else []
    engine.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        recorder.token_mask, recorder.kinds, recorder.layers = kept
