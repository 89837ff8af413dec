"""Expert placement, simulated: 64 layers of 256 experts on 64 ranks in 8 nodes, 5 slots a rank for every algorithm.

Loads are skewed (Zipf), by modality (an expert has its main kinds of tokens, a node reads mainly some kinds), and drift
from window to window. Experts are placed on the loads of a window and stay for ``HOLD`` windows; what counts is the
balance and the traffic of the windows after it. How tokens are split over replicas moves nothing: our split follows the
counts of the step itself, which whoever dispatches knows before anything is sent; a row beside it has the split of the
window before. (In inference ``unimoe_ray.parallel.sharing`` does so for one sender: by load alone, as nodes make no
difference there. Several senders would have to tell each other their counts first.) Prints a table and one JSON line,
draws the trade-off of balance and traffic.

    python benchmarks/placement.py [FOLDER for placement.png and placement.md, default benchmarks/results]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from benchmarks.eplb import eplb_global, eplb_hierarchical
except ModuleNotFoundError:  # started as a file
    from eplb import eplb_global, eplb_hierarchical
from unimoe_ray.parallel.placement import plan
from unimoe_ray.parallel.placement_cost import Work, even_split, flows, imbalance_of, layer_seconds, split
from unimoe_ray.parallel.topology import Array, Loads, Placement, Topology, contiguous

LAYERS, EXPERTS, RANKS, NODES, SLOTS = 64, 256, 64, 8, 5
MODALITIES = np.array([0.35, 0.25, 0.15, 0.15, 0.10])  # text, image, video, speech, audio: parts of all tokens
TOKENS = RANKS * 8192 * 8  # routed in a step: 8192 tokens a rank, top 8
WINDOWS, HOLD, DRIFT = 4, 4, 0.05
WORK = Work.of(4096, 1536, tflops=300)


@dataclass(frozen=True)
class Scenario:
    """skew: exponent of the experts' popularity; focus: concentration of an expert's kinds of tokens and of a node's
    (Dirichlet: low is specialised); mixture: drift of the kinds' parts of all tokens. Training has none of it, as its
    data plan fixes the mixture."""

    name: str
    skew: float
    focus: float
    seed: int
    mixture: float = 0.0

    def windows(self, topology: Topology) -> list[Loads]:
        """From window to window each (layer, modality, expert) drifts by ``DRIFT``, log-normally."""
        rng = np.random.default_rng(self.seed)
        popularity = np.stack([rng.permutation(np.arange(1, EXPERTS + 1) ** -self.skew) for _ in range(LAYERS)])
        kinds = rng.dirichlet(np.full(len(MODALITIES), self.focus), size=(LAYERS, EXPERTS)).transpose(0, 2, 1)
        logs = np.log(popularity[:, None] * kinds + 1e-12)
        readers = rng.dirichlet(np.full(len(MODALITIES), self.focus), size=NODES).T[:, topology.node_of]
        result, mixture = [], np.log(MODALITIES)
        for _ in range(WINDOWS + 1):
            weight = np.exp(logs)
            tokens = weight / weight.sum(axis=2, keepdims=True) * np.exp(mixture)[:, None]
            result.append(Loads.by_modality(tokens / tokens.sum(axis=(1, 2), keepdims=True) * TOKENS, readers))
            logs = logs + DRIFT * rng.standard_normal(logs.shape)
            mixture = mixture + self.mixture * rng.standard_normal(mixture.shape)
        return result


SCENARIOS = (
    Scenario("mild skew, by modality", 0.4, 0.3, 1),
    Scenario("skewed, by modality", 0.8, 0.3, 2),
    Scenario("very skewed, by modality", 1.2, 0.3, 3),
    Scenario("skewed, mixed", 0.8, 2.0, 4),
    Scenario("skewed, no modality", 0.8, 1e4, 5),
    Scenario("skewed, by modality, mixture drifts", 0.8, 0.3, 2, mixture=DRIFT),
)


def listed(order: np.ndarray) -> Placement:
    """The same list of the experts in slots, rank by rank, for every layer."""
    return Placement.of([np.split(order, RANKS)] * LAYERS)


def naive_contiguous(loads: Loads, topology: Topology) -> Placement:
    """Slot after slot; spare slots repeat the experts from the first on, as serving engines start out."""
    return listed(np.arange(RANKS * SLOTS) % EXPERTS)


def naive_round_robin(loads: Loads, topology: Topology) -> Placement:
    return listed((np.arange(RANKS * SLOTS) % EXPERTS).reshape(SLOTS, RANKS).T.ravel())


def ours(loads: Loads, topology: Topology) -> Placement:
    return plan(loads, topology, replicas=True)


def global_policy(loads: Loads, topology: Topology) -> Placement:
    return eplb_global(loads.tokens.sum(axis=1), RANKS * SLOTS, RANKS)


def hierarchical_policy(loads: Loads, topology: Topology) -> Placement:
    return eplb_hierarchical(loads.tokens.sum(axis=1), RANKS * SLOTS, RANKS, NODES, groups=EXPERTS // 4)


def by_step(placement: Placement, before: Loads, now: Loads, topology: Topology) -> Array:
    return split(placement, now, topology)


def by_window(placement: Placement, before: Loads, now: Loads, topology: Topology) -> Array:
    return split(placement, before, topology)


def evenly(placement: Placement, before: Loads, now: Loads, topology: Topology) -> Array:
    """EPLB gives each replica an equal part; it gets the better choice of which tokens, those of the replica's node."""
    return even_split(placement, before, topology)


Split = Callable[[Placement, Loads, Loads, Topology], Array]
# The last row but two gives EPLB's placement our split, which is no part of it.
STRATEGIES: dict[str, tuple[Callable[[Loads, Topology], Placement], Split]] = {
    "ours": (ours, by_step),
    "ours, split of the window before": (ours, by_window),
    "EPLB global": (global_policy, evenly),
    "EPLB hierarchical": (hierarchical_policy, evenly),
    "EPLB global + our split": (global_policy, by_step),
    "contiguous": (naive_contiguous, evenly),
    "round robin": (naive_round_robin, evenly),
}

# As while training: each expert has one place. EPLB then gives every rank as many; ours may use the fifth slot.
SINGLE: dict[str, tuple[Callable[[Loads, Topology], Placement], Split]] = {
    "ours": (plan, by_step),
    "EPLB global": (lambda loads, _: eplb_global(loads.tokens.sum(axis=1), EXPERTS, RANKS), by_step),
    "EPLB hierarchical": (
        lambda loads, _: eplb_hierarchical(loads.tokens.sum(axis=1), EXPERTS, RANKS, NODES, groups=EXPERTS // 4),
        by_step,
    ),
    "contiguous": (lambda loads, _: contiguous(LAYERS, EXPERTS, RANKS), by_step),
    "round robin": (lambda loads, _: Placement.of([np.arange(EXPERTS).reshape(-1, RANKS).T] * LAYERS), by_step),
}


@dataclass
class Result:
    """planned: on the loads that were planned for; later: mean over the windows after. Bytes are GB a step over all
    layers; seconds those of the expert layers in a step; split_ms the CPU time of a layer's split."""

    planned: float = 0.0
    later: float = 0.0
    planned_gb: float = 0.0
    later_gb: float = 0.0
    later_seconds: float = 0.0
    plan_seconds: float = 0.0
    split_ms: float = 0.0


def measure(scenario: Scenario, strategy: tuple[Callable, Split], topology: Topology) -> Result:
    place, divide = strategy
    windows, result = scenario.windows(topology), Result()
    plans = WINDOWS // HOLD
    for number in range(WINDOWS):
        before, now = windows[number], windows[number + 1]
        if number % HOLD == 0:
            started = time.process_time()
            placement = place(before, topology)
            result.plan_seconds += (time.process_time() - started) / plans
            found = flows(placement, before, topology, divide(placement, before, before, topology))
            result.planned += imbalance_of(found).mean() / plans
            result.planned_gb += found.received.sum() * WORK.token_bytes / 1e9 / plans
        started = time.process_time()
        shares = divide(placement, before, now, topology)
        result.split_ms += (time.process_time() - started) * 1e3 / LAYERS / WINDOWS
        found = flows(placement, now, topology, shares)
        result.later += imbalance_of(found).mean() / WINDOWS
        result.later_gb += found.received.sum() * WORK.token_bytes / 1e9 / WINDOWS
        result.later_seconds += layer_seconds(found, topology, WORK).sum() / WINDOWS
    return result


def least_crossing(loads: Loads, topology: Topology) -> float:
    """A part of the tokens that no placement can keep from crossing: a node takes at most its even part of the load, of
    as many experts as it has slots."""
    by_node = loads.by_node(topology)
    top = np.sort(by_node, axis=2)[:, :, -SLOTS * RANKS // NODES :].sum(axis=2)
    total = by_node.sum(axis=(1, 2))
    return float(1 - (np.minimum(top, total[:, None] / NODES).sum(axis=1) / total).mean())


def trade_off(scenario: Scenario, topology: Topology, path: Path) -> list[dict[str, float]]:
    """Our placements for growing slack beside the others, on the loads they were planned for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = scenario.windows(topology)[0]
    curve = []
    for slack in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
        placement = plan(loads, topology, replicas=True, slack=slack)
        found = flows(placement, loads, topology, split(placement, loads, topology, slack=slack))
        curve.append({"slack": slack, "imbalance": float(imbalance_of(found).mean()), "crossing": _crossing(found)})
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot([c["crossing"] for c in curve], [c["imbalance"] for c in curve], "o-", label="ours, slack 0 to 0.4")
    for name, marker in (("EPLB global", "s"), ("EPLB global + our split", "D"), ("EPLB hierarchical", "^")):
        place, divide = STRATEGIES[name]
        placement = place(loads, topology)
        found = flows(placement, loads, topology, divide(placement, loads, loads, topology))
        axes.plot(_crossing(found), imbalance_of(found).mean(), marker, label=name)
    axes.axvline(least_crossing(loads, topology), color="grey", ls=":", label="bound on crossing tokens")
    axes.set(xlabel="part of the routed tokens that leave their node", ylabel="slowest rank / mean rank")
    axes.set_title(f"{LAYERS} layers, {EXPERTS} experts, {RANKS} ranks, {NODES} nodes: {scenario.name}", fontsize=10)
    axes.set_ylim(0.98, 1.5)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return curve


def _crossing(found) -> float:
    return float(found.received.sum() / found.load.sum())


def growth() -> list[dict[str, float]]:
    """CPU seconds of planning for growing numbers of experts and ranks, 16 layers, 8 ranks a node, a quarter of the
    slots spare."""
    rows = []
    for experts, ranks in ((64, 64), (128, 64), (256, 64), (512, 64), (1024, 64), (256, 16), (256, 256), (1024, 256)):
        rng = np.random.default_rng(0)
        slots = -(-experts * 5 // (4 * ranks))
        topology = Topology.even(ranks, max(1, ranks // 8), slots)
        tokens = rng.lognormal(sigma=1, size=(16, 5, experts))
        readers = rng.dirichlet(np.full(5, 0.3), size=ranks // 8).T[:, topology.node_of]
        started = time.process_time()
        plan(Loads.by_modality(tokens, readers), topology, replicas=True)
        rows.append({"experts": experts, "ranks": ranks, "slots": slots, "seconds": time.process_time() - started})
    return rows


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    topology = Topology.even(RANKS, NODES, SLOTS)
    lines, results = [], {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{LAYERS} layers, {EXPERTS} experts, {RANKS} ranks, {NODES} nodes, {SLOTS} slots a rank; placed every {HOLD}")
    say(f"windows of {DRIFT:.0%} drift. slowest/mean: mean over layers; GB between nodes a step, all layers.")
    for title, strategies in (("with replicas", STRATEGIES), ("one place per expert, as in training", SINGLE)):
        say("")
        figures = "slowest/mean as planned | later | GB as planned | later | s/step later | plan s | split ms"
        say(f"| {title} | strategy | {figures} |")
        say("|---|---|---|---|---|---|---|---|---|")
        for scenario in SCENARIOS:
            results[f"{scenario.name}, {title}"] = rows = {}
            for name, strategy in strategies.items():
                r = rows[name] = vars(measure(scenario, strategy, topology))
                say(
                    f"| {scenario.name} | {name} | {r['planned']:.4f} | {r['later']:.4f} | {r['planned_gb']:.0f} | "
                    f"{r['later_gb']:.0f} | {r['later_seconds']:.2f} | {r['plan_seconds']:.2f} | {r['split_ms']:.1f} |"
                )
            bound = least_crossing(scenario.windows(topology)[0], topology) * TOKENS * LAYERS * WORK.token_bytes / 1e9
            say(f"| {scenario.name} | bound on bytes | | | {bound:.0f} | | | | |")
    curve = trade_off(SCENARIOS[1], topology, folder / "placement.png")
    say("")
    say("Growth of planning, 16 layers, CPU seconds:")
    say("")
    say("| experts | ranks | slots a rank | seconds |")
    say("|---|---|---|---|")
    grown = growth()
    for row in grown:
        say(f"| {row['experts']} | {row['ranks']} | {row['slots']} | {row['seconds']:.2f} |")
    (folder / "placement.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "placement", "scenarios": results, "trade_off": curve, "growth": grown}))


if __name__ == "__main__":
    main()
