"""The whole system beside a bare PyTorch loop: the same model, micro-batches and cores.

    python benchmarks/overhead.py               one worker, then two; the mini tune stage on its real data
    python benchmarks/overhead.py --small       a small suite and few steps: does it run, are the losses equal
    python benchmarks/overhead.py --profile     where a worker's time goes, instead

The system is ``unimoe train tune``: Ray Train workers, DeepSpeed's engine (ZeRO-2), micro-batches planned, collated by
Ray Data and brought by its iterator, metrics written. The bare loop is one process without Ray and DeepSpeed: the same
start model, torch's AdamW and clipping, its batches collated before anything is timed. They take turns of some steps,
each waiting while the other computes, in another order each round; every step is timed, start-up apart. A figure is a
median over rounds, a ratio the median of the ratios within each round. ``worker``: CPU time of the training process,
all of its threads; ``others``: of all other processes of the system (collating, raylet, driver), per step.

Two workers with a thread each are compared with one process with two threads: by time on the clock, which needs a quiet
machine, and by CPU time.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import multiprocessing
import os
import pstats
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from rich.console import Console

from unimoe_ray import cluster, config, pipeline
from unimoe_ray.config import Config
from unimoe_ray.data import prepare
from unimoe_ray.progress import TrainProgress
from unimoe_ray.training import job as jobs
from unimoe_ray.training.checkpoint import ModelInfo

SYSTEM, BARE = "system", "bare"
# A start model without earlier stages: what is learnt doesn't matter here, but shapes and routing do.
ALONE = ["stages.base={}", "stages.align={}", "stages.experts={}", "model.moe.init=copies"]
# Figures of them are those of benchmarks/recovery.py.
WITHOUT = ["training.validation.every=0", "checkpoint.every=1000000"]


@dataclass
class Turn:
    """What a process did in one turn."""

    wall: float
    cpu: float


class Gate:
    """In a measured process: waits for its turn at every ``every`` steps and reports the turn before."""

    def __init__(self, address: str, name: str, every: int):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rw")
        self.every = every
        self._say(name=name, pid=os.getpid())
        self._begun = time.perf_counter(), time.process_time()

    def pace(self, steps: Iterable[Any]) -> Iterator[Any]:
        """The same steps, each when there is a turn for it."""
        for number, step in enumerate(steps):
            if number % self.every == 0:
                self.turn()
            yield step

    def turn(self) -> None:
        wall, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        self._say(wall=wall, cpu=cpu)
        if not self._lines.readline():
            raise SystemExit("the benchmark has ended")
        self._begun = time.perf_counter(), time.process_time()

    def _say(self, **values: Any) -> None:
        self._lines.write(json.dumps(values) + "\n")
        self._lines.flush()


@dataclass
class Team:
    """The processes that take a turn together."""

    size: int
    lines: list[Any] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    started: float = 0.0

    def wait(self) -> Turn:
        """Until all are done: the longest time, and the sum of CPU times."""
        turns = [json.loads(line.readline()) for line in self.lines]
        return Turn(max(turn["wall"] for turn in turns), sum(turn["cpu"] for turn in turns))

    def go(self) -> None:
        for line in self.lines:
            line.write("go\n")
            line.flush()


class Referee:
    """Gives turns to a bare process and to the system's workers."""

    def __init__(self, address: str, workers: int):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address)
        self._socket.listen()
        self.teams = {BARE: Team(1), SYSTEM: Team(workers)}
        self.rounds: list[dict[str, Turn]] = []
        self.others: list[float] = []

    def run(self, rounds: int, warm: int) -> None:
        begun = time.perf_counter()
        while any(len(team.lines) < team.size for team in self.teams.values()):
            connection, _ = self._socket.accept()
            lines = connection.makefile("rw")
            hello = json.loads(lines.readline())
            self.teams[hello["name"]].lines.append(lines)
            self.teams[hello["name"]].pids.append(hello["pid"])
        for team in self.teams.values():
            team.wait()  # for the first step of each
        self.started_s = time.perf_counter() - begun
        for number in range(warm + rounds):
            turns = {}
            for name in random.Random(number).sample([BARE, SYSTEM], 2):
                before = self._others_cpu()
                self.teams[name].go()
                turns[name] = self.teams[name].wait()
                if name == SYSTEM and number >= warm:
                    self.others.append(self._others_cpu() - before)
            if number >= warm:
                self.rounds.append(turns)
        for team in self.teams.values():
            team.go()

    def _others_cpu(self) -> float:
        measured = {pid for team in self.teams.values() for pid in team.pids}
        me = psutil.Process()
        total = 0.0
        for process in [me, *me.children(recursive=True)]:
            if process.pid not in measured:
                try:
                    times = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                total += times.user + times.system
        return total


def measured_worker(address: str, every: int, profile: str | None, job: Any) -> None:
    """The Ray Train worker function: the real loop, its steps paced."""
    from unimoe_ray.training import loop

    iterate = loop.iterate_steps

    def paced(*arguments: Any, **options: Any) -> Iterator[Any]:
        steps = iterate(*arguments, **options)
        return Gate(address, SYSTEM, every).pace(steps) if profile is None else profiled(steps, profile, every)

    loop.iterate_steps = paced
    loop.train(job)


def profiled(steps: Iterable[Any], path: str, warm: int) -> Iterator[Any]:
    """The same steps; after the first ``warm``, what the process computes is written to ``path``."""
    profile = cProfile.Profile(time.process_time)
    count = 0
    for number, step in enumerate(steps):
        profile.disable()
        if number >= warm:
            count += 1
            text = io.StringIO()
            if number > warm:
                pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
                pstats.Stats(profile, stream=text).sort_stats("cumtime").print_stats(60)
                Path(path).write_text(f"{count - 1} steps\n{text.getvalue()}")
            profile.enable()
        yield step


def bare_loop(address: str, every: int, threads: int, settings: dict[str, Any], info: ModelInfo, losses: str) -> None:
    """A training loop as one would write it with PyTorch alone; its losses into a file."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    from unimoe_ray.data.batch import collate
    from unimoe_ray.data.loader import Layout, planned_micro_batches, read_features
    from unimoe_ray.data.samples import SampleTable
    from unimoe_ray.model.unimoe import to_batch
    from unimoe_ray.training.allocator import keep_freed_memory
    from unimoe_ray.training.engine import learning_rate_factor
    from unimoe_ray.training.recipe import order_of, run_seed
    from unimoe_ray.training.stages import make_trainable, start_model

    tree = config.parse(settings)
    run = tree.stages.tune["tune"]
    source = prepare.source(tree, "train")
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(run_seed(tree, "tune", "tune"))
    model = start_model(tree, info, "tune").train()
    groups = make_trainable(model, run)
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "lr": group.lr, "peak": group.lr} for group in groups],
        betas=tree.training.optimizer.betas,
        eps=tree.training.optimizer.eps,
        weight_decay=run.weight_decay,
    )
    trained = [parameter for group in groups for parameter in group.parameters]

    table = SampleTable(Path(source.samples))
    layout = Layout(0, 1, tree.training.max_tokens_per_micro_batch)
    plan = planned_micro_batches(source, order_of(tree, "tune", "tune", run.tasks), layout, range(run.steps))
    steps = []
    for micro_batches in plan:
        arrays = [
            collate([table.get(int(row)) for row in rows], lambda name: read_features(source, name))
            for rows in micro_batches
        ]
        steps.append(([to_batch(a) for a in arrays], sum(int((a["labels"] >= 0).sum()) for a in arrays)))

    found = []
    for number, (batches, answers) in enumerate(Gate(address, BARE, every).pace(steps)):
        factor = learning_rate_factor(number, run.steps, tree.training.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        total = 0.0
        for batch in batches:
            loss = model(batch)
            (loss.token_loss / answers + loss.router_loss / len(batches)).backward()
            total += loss.token_loss.item()
        torch.nn.utils.clip_grad_norm_(trained, tree.training.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total / answers)
    Path(losses).write_text(json.dumps(found))


def compare(settings: Config, info: ModelInfo, workers: int, every: int, rounds: int, warm: int) -> dict[str, Any]:
    """Both in turns, in the same run: ``workers`` with a thread each, and a bare loop with as many threads."""
    with tempfile.TemporaryDirectory() as scratch:
        address, losses = f"{scratch}/socket", f"{scratch}/losses"
        referee = Referee(address, workers)
        tree = settings.model_dump(mode="json")
        bare = multiprocessing.get_context("spawn").Process(
            target=bare_loop, args=(address, every, workers, tree, info, losses), daemon=True
        )
        bare.start()
        turns = threading.Thread(target=referee.run, args=(rounds, warm), daemon=True)
        turns.start()
        train(settings, partial(measured_worker, address, every, None))
        turns.join()
        bare.join()
        lines = [json.loads(line) for line in (settings.run_dir / "metrics.jsonl").read_text().splitlines()]
        theirs = json.loads(Path(losses).read_text())
    tokens = statistics.mean(line["tokens"] for line in lines) * every
    both = {name: [turn[name] for turn in referee.rounds] for name in (SYSTEM, BARE)}
    others = statistics.median(referee.others)
    return {
        "workers": workers,
        "tokens_per_step": round(tokens / every),
        "wall_ratio": _ratio([b.wall / s.wall for s, b in zip(both[SYSTEM], both[BARE], strict=True)]),
        "cpu_ratio": _ratio([b.cpu / s.cpu for s, b in zip(both[SYSTEM], both[BARE], strict=True)]),
        "cpu_ratio_all": _ratio(
            [b.cpu / (s.cpu + o) for s, b, o in zip(both[SYSTEM], both[BARE], referee.others, strict=True)]
        ),
        **{f"{name}_wall_ms": _milliseconds(t.wall for t in both[name]) / every for name in both},
        **{f"{name}_cpu_ms": _milliseconds(t.cpu for t in both[name]) / every for name in both},
        "others_cpu_ms": round(1000 * others / every, 1),
        **{f"{n}_tokens_per_s": round(tokens / statistics.median(t.wall for t in both[n])) for n in both},
        "loss_difference": max(abs(line["loss"] - loss) for line, loss in zip(lines, theirs, strict=True)),
        "start_s": round(referee.started_s, 1),
        "load": os.getloadavg()[0],
    }


def train(settings: Config, worker: Any) -> None:
    """``unimoe train tune`` with another worker function."""
    from unimoe_ray.training import trainer

    for module in (trainer, sys.modules.get("unimoe_ray.training.fit"), jobs):
        if hasattr(module, "train_worker"):
            module.train_worker = worker
    with cluster.connect(settings), TrainProgress(Console(stderr=True, quiet=True)) as progress:
        pipeline.train(settings, "tune", progress)


def _ratio(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def _milliseconds(values: Iterable[float]) -> float:
    return round(1000 * statistics.median(values), 1)


def load(folder: str, data: str, workers: int, steps: int, small: bool) -> Config:
    overrides = [*ALONE, *WITHOUT, f"runs_dir={folder}", f"data.dir={data}", f"name=overhead-{workers}"]
    overrides += [f"training.workers={workers}", f"stages.tune.tune.steps={steps}", "training.device=cpu"]
    return config.load("mini", [*overrides, *(["mini.scale=tiny"] if small else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small suite, few steps")
    parser.add_argument("--profile", action="store_true", help="print where a worker's CPU time goes, and stop")
    parser.add_argument("--rounds", type=int, help="turns of each")
    parser.add_argument("--data", default="data", metavar="DIR", help="with the suite and features, or to make them in")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    arguments = parser.parse_args()
    every, rounds, warm = (2, 3, 1) if arguments.small else (6, 15, 2)
    rounds = arguments.rounds or rounds
    steps = every * (rounds + warm) + 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in arguments.workers:
            settings = load(folder, str(Path(arguments.data).resolve()), workers, steps, arguments.small)
            with pipeline.session(settings) as progress:
                pipeline.prepare(settings, progress)
            info = pipeline.model_info(settings)
            if arguments.profile:
                path = f"{folder}/profile"
                train(settings, partial(measured_worker, "", every, path))
                print(Path(path).read_text())
                return
            results.append(compare(settings, info, workers, every, rounds, warm))
            print(json.dumps(results[-1]), file=sys.stderr)
    for result in results:
        one = result["workers"] == 1
        print(f"\n{'one worker, a bare loop with one thread' if one else 'two workers, a bare loop with two threads'}")
        print(f"{'':8}{'wall ms/step':>14}{'CPU ms/step':>14}{'others ms/step':>16}{'tokens/s':>12}")
        for name in (BARE, SYSTEM):
            others = result["others_cpu_ms"] if name == SYSTEM else ""
            print(
                f"{name:8}{result[f'{name}_wall_ms']:14.1f}{result[f'{name}_cpu_ms']:14.1f}{others:>16}"
                f"{result[f'{name}_tokens_per_s']:12}"
            )
        print(
            f"system over bare: {result['wall_ratio']} by the clock, {result['cpu_ratio']} by CPU time of the workers, "
            f"{result['cpu_ratio_all']} with all processes; losses differ by {result['loss_difference']:.1e}"
        )
    print(json.dumps({"benchmark": "overhead", "results": results}))


if __name__ == "__main__":
    main()
