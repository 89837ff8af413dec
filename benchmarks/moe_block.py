"""The mixture layer beside a dense layer, peers and its own ceiling.

    python benchmarks/moe_block.py                     every size, one thread, CPU time
    python benchmarks/moe_block.py --cases train:8:64 --rounds 51
    python benchmarks/moe_block.py --small             small sizes, seconds: does it run, are all equal

Every implementation gets the same weights and tokens, so before anything is timed their outputs and input gradients
are compared (the dense layer has its own: a SwiGLU of top_k times the inner size, the same active products). Rounds
are interleaved in one process, in another order each; a figure is the median over rounds of this implementation's
CPU time, a ratio the median of the ratios within each round. H = 512, F = 1376, top-2, fp32. Freed memory is kept
(``training.allocator``), as in training, for all alike: else page faults are up to half of the time, and at random.

The ceiling is what the experts' matrix products cost when routing is free: rows already sorted and contiguous, per
expert its own weights, ``down(silu(gate(x)) * up(x))`` through autograd, nothing gathered, weighted or added up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F

from unimoe_ray.model.experts import SwiGLU
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.training.allocator import keep_freed_memory

HIDDEN, INNER, TOP_K = 512, 1376, 2
CASES = ("train:4:1024", "train:8:1024", "train:8:256", "train:8:64", "forward:8:64", "forward:8:4", "forward:8:1")
OURS, CEILING, DENSE = "ours", "ceiling", "dense, same active FLOPs"


@dataclass(frozen=True)
class Case:
    """train is forward and backward, forward is without gradients; E experts, T tokens."""

    kind: str
    experts: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} E={self.experts} T={self.tokens}"


@dataclass
class Contender:
    """run: tokens [T, H] (of the ceiling: sorted rows [T*K, H]) to [T, H]; exact: computes the mixture itself."""

    module: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor]
    inputs: torch.Tensor
    exact: bool = True


class OriginalLoop(nn.Module):
    """The published 4-expert code's: find the tokens of each expert, add its weighted outputs in place."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.gate, self.experts = layer.gate, layer.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk(self.gate(x), TOP_K)
        weights = F.softmax(weights, dim=1, dtype=torch.float).to(x.dtype)
        results = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            results[token] += weights[token, slot, None] * expert(x[token])
        return results


class StackedGroupedMM(nn.Module):
    """One stack of weights per projection and ``torch.nn.functional.grouped_mm``."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.gate = layer.gate
        self.gate_up = nn.Parameter(
            torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]).T for e in layer.experts]).contiguous()
        )
        self.down = nn.Parameter(torch.stack([e.down_proj.weight.T for e in layer.experts]).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, chosen = self.gate(x).topk(TOP_K)
        slots = chosen.reshape(-1)
        order = slots.argsort(stable=True)
        ends = torch.bincount(slots, minlength=len(self.down)).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x.index_select(0, order // TOP_K), self.gate_up, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        y = y * top.softmax(-1).reshape(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // TOP_K, y)


class Ceiling(nn.Module):
    """The experts on rows that are sorted already, ``counts`` of them each."""

    def __init__(self, layer: MoELayer, counts: list[int]):
        super().__init__()
        self.experts, self.counts = layer.experts, counts

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        parts = zip(self.experts, rows.split(self.counts), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)])


def mixtral(layer: MoELayer, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.gate.in_features,
        intermediate_size=layer.experts[0].gate_proj.out_features,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in layer.experts])
    down = torch.stack([e.down_proj.weight for e in layer.experts])
    block.load_state_dict(
        {"gate.weight": layer.gate.weight, "experts.gate_up_proj": gate_up, "experts.down_proj": down}
    )
    return block


def deepspeed_stock(layer: MoELayer) -> nn.Module:
    """Its own gate and dispatch, set to be exact: no drops, no sampled second expert. It pads to the fullest expert."""
    from deepspeed.moe.layer import MoE

    start_deepspeed()
    block = MoE(
        layer.gate.in_features,
        SwiGLU(layer.gate.in_features, layer.experts[0].gate_proj.out_features),
        num_experts=layer.num_experts,
        ep_size=1,
        k=TOP_K,
        min_capacity=0,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
        use_rts=False,
    )
    block.set_deepspeed_parallelism()
    block.deepspeed_moe.gate.wg.load_state_dict(layer.gate.state_dict())
    for mine, theirs in zip(layer.experts, block.deepspeed_moe.experts.deepspeed_experts, strict=True):
        theirs.load_state_dict(mine.state_dict())
    return block


def start_deepspeed() -> None:
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.distributed.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)


def contenders(case: Case, hidden: int, inner: int) -> dict[str, Contender]:
    torch.manual_seed(1)
    layer = MoELayer(hidden, inner, case.experts, TOP_K)
    x = torch.randn(case.tokens, hidden)
    with torch.no_grad():
        counts = layer(x)[1].tokens_per_expert.tolist()
    rows = torch.randn(case.tokens * TOP_K, hidden)
    dense = SwiGLU(hidden, inner * TOP_K)

    def tokens(module: nn.Module, exact: bool = True) -> Contender:
        def run(x: torch.Tensor) -> torch.Tensor:
            y = module(x[None] if isinstance(module, batched) else x)
            return y[0].view_as(x) if isinstance(y, tuple) else y.view_as(x)

        return Contender(module, run, x, exact)

    stock = deepspeed_stock(layer)
    eager, grouped = mixtral(layer, "eager"), mixtral(layer, "grouped_mm")
    batched = (type(eager), type(stock))
    ceiling = Ceiling(layer, counts)
    return {
        OURS: tokens(layer),
        DENSE: tokens(dense, exact=False),
        CEILING: Contender(ceiling, ceiling, rows, exact=False),
        "original loop": tokens(OriginalLoop(layer)),
        "HF Mixtral eager": tokens(eager),
        "HF Mixtral grouped_mm": tokens(grouped),
        "torch grouped_mm, stacked": tokens(StackedGroupedMM(layer)),
        "DeepSpeed, no drops": tokens(stock),
    }


def check(entrants: dict[str, Contender], tolerance: float = 1e-4) -> None:
    """Outputs and input gradients of all that compute the mixture agree; SystemExit names the one that does not."""
    wanted = None
    for name, entrant in entrants.items():
        if entrant.exact:
            x = entrant.inputs.clone().requires_grad_()
            y = entrant.run(x)
            found = (y.detach(), *torch.autograd.grad(y.square().sum(), x))
            wanted = wanted or found
            for a, b in zip(found, wanted, strict=True):
                error = ((a - b).norm() / b.norm()).item()
                if not error < tolerance:
                    raise SystemExit(f"{name} differs from {OURS}: relative error {error:.1e}")


def measure(case: Case, entrants: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one step, by contender and round; a step takes at least a few milliseconds of repetitions."""
    upstream = {name: torch.randn_like(entrant.inputs) for name, entrant in entrants.items()}
    repeats = 16 if case.kind == "forward" else max(1, 64 // case.tokens)
    times: dict[str, list[float]] = {name: [] for name in entrants}
    names = list(entrants)
    shuffle = random.Random(0).shuffle
    for round_ in range(rounds + 2):
        shuffle(names)
        for name in names:
            spent = step_time(case, entrants[name], upstream[name], repeats)
            if round_ >= 2:  # the first ones warm up caches and the allocator
                times[name].append(spent)
    return times


def step_time(case: Case, entrant: Contender, upstream: torch.Tensor, repeats: int) -> float:
    spent = 0.0
    for _ in range(repeats):
        if case.kind == "forward":
            with torch.inference_mode():
                start = time.process_time()
                entrant.run(entrant.inputs)
                spent += time.process_time() - start
            continue
        entrant.module.zero_grad(set_to_none=True)
        x = entrant.inputs.clone().requires_grad_()
        start = time.process_time()
        entrant.run(x).backward(upstream)
        spent += time.process_time() - start
    entrant.module.zero_grad(set_to_none=True)
    return spent / repeats


def results(case: Case, times: dict[str, list[float]]) -> Iterator[dict]:
    for name, spent in times.items():
        ratios = {
            key: round(statistics.median(b / a for a, b in zip(spent, times[other], strict=True)), 3)
            for key, other in (("of_dense", DENSE), ("of_ceiling", CEILING))
        }
        median = statistics.median(spent)
        yield {
            "case": str(case),
            "name": name,
            "ms": round(1e3 * median, 3),
            "tokens_per_cpu_s": round(case.tokens / median),
            **ratios,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="KIND:E:T", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--small", action="store_true", help="small sizes and few rounds")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    hidden, inner, rounds = (64, 96, 3) if arguments.small else (HIDDEN, INNER, arguments.rounds)
    lines = []
    for text in arguments.cases:
        kind, experts, tokens = text.split(":")
        case = Case(kind, int(experts), int(tokens))
        entrants = contenders(case, hidden, inner)
        check(entrants)
        print(f"\n{case}  (H={hidden} F={inner} top-{TOP_K} fp32, {rounds} rounds)")
        print(f"{'':28}{'ms':>9}{'tokens/s':>10}{'of dense':>10}{'of ceiling':>12}")
        for line in results(case, measure(case, entrants, rounds)):
            lines.append(line)
            print(
                f"{line['name']:28}{line['ms']:9.2f}{line['tokens_per_cpu_s']:10}{line['of_dense']:10.2f}"
                f"{line['of_ceiling']:12.3f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "moe_block", "torch": torch.__version__, "results": lines}))


if __name__ == "__main__":
    main()
