"""The expert-parallel layer beside DeepSpeed's stock one, two ranks, gloo.

    python benchmarks/expert_parallel.py               four experts, balanced and skewed, and eight
    python benchmarks/expert_parallel.py --rounds 31
    python benchmarks/expert_parallel.py --small       small sizes, seconds: does it run, are both equal

Both get the same weights and tokens; before anything is timed, their outputs and gradients are compared. The stock
layer is set to be exact: no drops, no sampled second expert. A figure is the CPU time of forward and backward, one
thread a rank, gloo's threads included, summed over the ranks; rounds are interleaved, in another order each, and
figures are medians over rounds, a ratio the median of the ratios within each round. T = 1024 tokens a rank, H = 512,
F = 1376, top-2, fp32. "replicated" is our layer with every expert on both ranks: what the exchange costs is the
difference. "one after the other" is ours without gradients of rows that travel while those of weights are computed;
"hidden" is the wall time of ours over its, until both ranks are done. Routing by design of the tokens:

    balanced       every pair of experts alike
    half of slots  the first choice of every token is expert 0: it gets half of the routed slots
    half of tokens one of the choices of half of the tokens is expert 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import time
import warnings
from copy import deepcopy
from dataclasses import dataclass
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.moe.layer import MoE
from torch import nn

from unimoe_ray.model.experts import SwiGLU, run_experts
from unimoe_ray.model.language import RoutingRecorder, SparseFeedForward
from unimoe_ray.parallel import expert_parallel
from unimoe_ray.parallel.expert_parallel import TrainedExpertParallelFeedForward

RANKS, TOP_K = 2, 2
OURS, STOCK, REPLICATED, IN_TURN = "ours", "DeepSpeed, no drops", "replicated", "one after the other"
CASES = ((4, "balanced"), (4, "half of slots"), (8, "balanced"), (8, "half of tokens"), (8, "half of slots"))


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    inner: int
    rounds: int


class InTurn(nn.Module):
    """Our layer without anything beside the exchange of gradients."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(expert_parallel, "run_experts", lambda *asked: run_experts(*asked[:3])):
            return self.layer(x)


def layers(sizes: Sizes, experts: int) -> dict[str, nn.Module]:
    """On one rank; the same weights."""
    torch.manual_seed(1)
    whole = SparseFeedForward(sizes.hidden, sizes.inner, experts, TOP_K, RoutingRecorder())
    nn.init.orthogonal_(whole.gate.weight)
    stock = MoE(
        sizes.hidden,
        SwiGLU(sizes.hidden, sizes.inner),
        num_experts=experts,
        ep_size=RANKS,
        k=TOP_K,
        min_capacity=0,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
        use_rts=False,
    )
    stock.deepspeed_moe.gate.wg.load_state_dict(whole.gate.state_dict())
    each = experts // RANKS
    held = tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(RANKS))
    for expert, theirs in zip(held[dist.get_rank()], stock.deepspeed_moe.experts.deepspeed_experts, strict=True):
        theirs.load_state_dict(whole.experts[expert].state_dict())
    replicated = deepcopy(whole)
    ours = TrainedExpertParallelFeedForward(whole, held)
    for layer in (ours, stock):
        layer.set_deepspeed_parallelism()
    return {OURS: ours, STOCK: stock, REPLICATED: replicated, IN_TURN: InTurn(ours)}


def routed_tokens(routing: str, gate: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1, tokens, H] that a router with orthonormal rows ``gate`` [E, H] sends where ``routing`` says."""
    experts, hidden = gate.shape
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    logits = torch.randn(tokens, experts, generator=generator)
    if routing != "balanced":
        logits[:, 0] = logits[:, 1:].amax(1) + 1
    if routing == "half of tokens":
        logits[::2, 0] = logits[::2, 1:].amin(1) - 1
    noise = torch.randn(tokens, hidden, generator=generator)
    return (noise + (logits - noise @ gate.T) @ gate)[None]


def step(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the tokens."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(upstream)
    return y.detach(), x.grad


def check(entrants: dict[str, nn.Module], x: torch.Tensor, upstream: torch.Tensor) -> None:
    ours, stock = (
        [*step(entrants[n], x, upstream), *(p.grad for p in entrants[n].parameters())] for n in (OURS, STOCK)
    )
    for a, b in zip(ours, stock, strict=True):
        if not (a - b).norm() <= 1e-4 * b.norm():
            raise SystemExit(f"{OURS} and {STOCK} differ: relative error {((a - b).norm() / b.norm()).item():.1e}")


def measure(entrants: dict[str, nn.Module], x: torch.Tensor, upstream: torch.Tensor, rounds: int) -> dict[str, list]:
    """CPU seconds of a step over all ranks, and seconds until all are done, by entrant and round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in entrants}
    names, order = list(entrants), random.Random(0)
    for round_ in range(rounds + 2):
        order.shuffle(names)
        for name in names:
            entrants[name].zero_grad(set_to_none=True)
            dist.barrier()
            start, begun = time.process_time(), time.perf_counter()
            step(entrants[name], x, upstream)
            spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
            dist.all_reduce(spent)
            if round_ >= 2:  # the first ones warm up caches and the allocator
                times[name].append((spent.item(), time.perf_counter() - begun))
    return times


def work(rank: int, port: int, sizes: Sizes) -> None:
    import deepspeed.ops
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore")
    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    lines = []
    if rank == 0:
        print(f"T={sizes.tokens} a rank, H={sizes.hidden} F={sizes.inner} top-{TOP_K} fp32, {sizes.rounds} rounds")
        heads = (
            f"{'busiest expert':>15}{'replicated ms':>15}{'ours ms':>10}{'stock ms':>10}{'ours/stock':>12}{'hidden':>8}"
        )
        print(" " * 26 + heads)
    for experts, routing in CASES:
        entrants = layers(sizes, experts)
        x = routed_tokens(routing, entrants[OURS].gate.weight.detach(), sizes.tokens)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank))
        check(entrants, x, upstream)
        counts = entrants[OURS].recorder.layers[-1].tokens_per_expert.clone()
        dist.all_reduce(counts)
        times = measure(entrants, x, upstream, sizes.rounds)
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(times[OURS], times[STOCK], strict=True))
        hidden = statistics.median(a / b for (_, a), (_, b) in zip(times[OURS], times[IN_TURN], strict=True))
        ours, stock, local = (1e3 * statistics.median(cpu for cpu, _ in times[n]) for n in (OURS, STOCK, REPLICATED))
        share = (counts.max() / counts.sum()).item()
        lines.append(
            {
                "experts": experts,
                "routing": routing,
                "busiest_share": round(share, 3),
                "ours_ms": round(ours, 2),
                "stock_ms": round(stock, 2),
                "replicated_ms": round(local, 2),
                "ratio": round(ratio, 3),
                "hidden": round(hidden, 3),
            }
        )
        if rank == 0:
            row = (
                f"E={experts} {routing:22}{share:15.2f}{local:15.1f}{ours:10.1f}{stock:10.1f}{ratio:12.3f}{hidden:8.3f}"
            )
            print(row, flush=True)
    if rank == 0:
        print(json.dumps({"benchmark": "expert_parallel", "torch": torch.__version__, "results": lines}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="small sizes and few rounds")
    arguments = parser.parse_args()
    sizes = Sizes(64, 64, 96, 3) if arguments.small else Sizes(1024, 512, 1376, arguments.rounds)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, args=(port, sizes), nprocs=RANKS, start_method="spawn")


if __name__ == "__main__":
    main()
