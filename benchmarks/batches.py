"""How full micro-batches are, what a training step costs in them, and what planning costs at growing sizes.

naive: samples in the plan's order, as many as fit, groups mixed; bucketed: by modality group and length, as trained by
default; packed: rows shared by samples of a group (``training.packed_row_tokens``: 256, or the whole micro-batch).
Steps of the mini suite need its prepared files (``unimoe prepare``; overrides such as data.dir=... say where); lengths
like LLaVA-665K's are synthetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from unimoe_ray.config import Config, load
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.columns import Column
from unimoe_ray.data.layout import MIN_PADDING, padded_tokens, split_step
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.plan import Mixture, MixturePlan, Order
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.model.unimoe import UniMoE, to_batch

NAMES = ("naive", "bucketed", "packed")
BLOCK = 65_536


def micro_batches(name: str, lengths: np.ndarray, groups: np.ndarray, world: int, most: int, row: int) -> list:
    """Indices into lengths [B] of each micro-batch, of all ranks."""
    if name != "naive":
        ranks = split_step(np.arange(len(lengths)), lengths, groups, world, most, row if name == "packed" else 0)
        return [micro for rank in ranks for micro in rank if len(micro)]
    micros: list[list[int]] = [[]]
    for index in range(len(lengths)):
        tried = [*micros[-1], index]
        if len(tried) > 1 and len(tried) * lengths[tried].max() > most:
            micros.append([])
        micros[-1].append(index)
    return [np.array(micro) for micro in micros]


def fill(steps: list[tuple[np.ndarray, np.ndarray]], name: str, world: int, most: int, row: int) -> dict:
    """full: tokens of padded tokens; micros: per rank and step; cost: padded tokens and ``MIN_PADDING`` for each
    micro-batch, of the tokens."""
    tokens = padded = count = 0
    for lengths, groups in steps:
        for micro in micro_batches(name, lengths, groups, world, most, row):
            count += 1
            tokens += int(lengths[micro].sum())
            padded += padded_tokens(lengths[micro], row if name == "packed" else 0)
    cost = (padded + MIN_PADDING * count) / tokens
    return {"full": tokens / padded, "micros": count / len(steps) / world, "cost": cost}


def mini_steps(config: Config, stage: str, batch: int, count: int) -> tuple[SampleTable, list[np.ndarray]]:
    table = SampleTable(Path(prepare.source(config, "train").samples))
    run = getattr(config.stages, stage)[stage]
    tasks = tuple((task, weight) for task, weight in run.tasks.items() if task in table.by_task())
    plan = Order(tasks, batch, 0, steps=count).plan(table)
    return table, [plan.samples(step) for step in range(count)]


def llava_steps(batch: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """6 of 100 samples are text; others have 576 soft tokens of a picture; words are log-normal, as conversations."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(count):
        text = rng.random(batch) < 0.06
        words = rng.lognormal(5.2, 0.8, batch).clip(20, 1400).astype(np.int64)
        steps.append((words + 576 * ~text, text.astype(np.int64)))
    return steps


def step_seconds(config: Config, names: tuple[str, ...], steps: int, rounds: int) -> dict[str, float]:
    """CPU seconds of forward and backward of the mini model's mixture per step: medians, layouts in turn."""
    source = prepare.source(config, "train")
    table, rows = mini_steps(config, "tune", 48, steps)
    torch.manual_seed(0)
    features = {m: read_features(source, name) for m, name in _one_of_each(table, rows)}
    dims = {m: stored.values.shape[-1] for m, stored in features.items()}
    model = UniMoE(config.model, load_tokenizer(prepare.tokenizer_path(config)).get_vocab_size(), dims)
    model.make_sparse()
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for step in rows:
            lengths, groups = table.lengths[step], table.groups[step]
            for name in names:
                row = 256 if name == "packed" else 0
                micros = micro_batches(name, lengths, groups, 1, 4096, row)
                samples = [[table.get(int(step[i])) for i in micro] for micro in micros]
                read = [collate(s, lambda key: read_features(source, key), row_tokens=row) for s in samples]
                batches = [to_batch(arrays) for arrays in read]
                model.zero_grad()
                started = time.process_time()
                for batch in batches:
                    model(batch).token_loss.backward()
                spent[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def _one_of_each(table: SampleTable, steps: list[np.ndarray]) -> list[tuple[str, str]]:
    names = (name for step in steps for row in step for name in table.get(int(row)).media)
    return list({name.split("/")[0]: name for name in names}.items())


def growth(sizes: list[int]) -> list[dict]:
    """Plans over a mapped column of ``size`` task codes (one block's, over and over): CPU seconds until the first step,
    ms of a later one (1024 samples), and the peak of memory of one process."""
    codes = np.random.default_rng(0).integers(8, size=BLOCK).astype(np.int32)

    def plan_of(size: int) -> MixturePlan:
        column = Column([codes] * (size // BLOCK) + [codes[: size % BLOCK]], np.int64)
        pools = {str(code): column.rows_of(code) for code in range(8)}
        return MixturePlan(Mixture.build({task: 1.0 + int(task) for task in pools}, pools), size // 1024, 1024, 0)

    lines = []
    for size in sizes:
        times = [time.process_time()]
        plan = plan_of(size)
        for step in (0, *np.linspace(1, plan.steps - 1, 9).astype(int).tolist()):
            plan.samples(step)
            times.append(time.process_time())
        first, *later = np.diff(times).tolist()
        tracemalloc.start()
        plan_of(size).samples(plan.steps // 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        lines.append({"samples": size, "first_s": first, "step_ms": statistics.median(later) * 1e3, "mb": peak / 1e6})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the mini configuration")
    parser.add_argument("--small", action="store_true", help="few steps and sizes")
    arguments = parser.parse_args()
    config, count = load("mini", arguments.overrides), 10 if arguments.small else 60
    torch.set_num_threads(1)
    cases = [("llava", batch, llava_steps(batch, count), most, most) for batch in (64, 256) for most in (4096, 16384)]
    prepared = (prepare.data_dir(config) / "train.arrow").is_file()
    if prepared:
        for stage in ("base", "align", "tune"):
            for batch in (48, 192):
                table, rows = mini_steps(config, stage, batch, count)
                steps = [(table.lengths[step], table.groups[step]) for step in rows]
                cases.append((f"mini {stage}", batch, steps, 4096, 256))
    else:
        print(f"no prepared files in {prepare.data_dir(config)}: without the mini suite")
    results = []
    print("| samples | batch | ranks | max tokens | order | full | micro-batches a rank | cost a token |")
    print("|---|---|---|---|---|---|---|---|")
    for title, batch, steps, most, row in cases:
        for world in (1, 2, 4):
            for name in NAMES:
                found = fill(steps, name, world, most, row)
                about = {"samples": title, "batch": batch, "world": world, "max_tokens": most, "order": name}
                results.append(about | found)
                print(
                    f"| {title} | {batch} | {world} | {most} | {name} | {found['full']:.3f} | {found['micros']:.1f} | "
                    f"{found['cost']:.2f} |"
                )
    seconds = {}
    if prepared:
        seconds = step_seconds(config, NAMES, *((2, 1) if arguments.small else (6, 3)))
        print("\nforward and backward of a step of mini tune (48 samples, one process, one thread), CPU s:")
        print(", ".join(f"{name} {spent:.3f}" for name, spent in seconds.items()))
    grown = growth([10**5, 10**6, 10**7] if arguments.small else [10**5, 10**6, 10**7, 10**8, 10**9])
    print("\n| samples | until the first step, CPU s | a later step of 1024, CPU ms | peak MB |\n|---|---|---|---|")
    for line in grown:
        print(f"| {line['samples']:.0e} | {line['first_s']:.2f} | {line['step_ms']:.1f} | {line['mb']:.1f} |")
    print(json.dumps({"benchmark": "batches", "fill": results, "step_cpu_s": seconds, "plan": grown}))


if __name__ == "__main__":
    main()
