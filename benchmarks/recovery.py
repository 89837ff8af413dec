"""How long a run of two workers stands still when one of them is killed, and what writing states costs it.

    python benchmarks/recovery.py                 the mini model's stage 3, three kills
    python benchmarks/recovery.py --cold          the same without processes that wait to take over
    python benchmarks/recovery.py --small         a tiny model, one kill: does it run

The model has the sizes of the preset mini; its data are random features. A worker process is killed (SIGKILL) from
outside, after the first half of an interval between two states, when a process waits for each worker
(``training.elastic.standby_every``). The time from then to the end of the first step after the restart is split into

    detection      until Ray Train's controller notices that the worker is gone
    scheduling     until it asks for new workers
    process start  until the training function runs in them: Ray's work (processes, torch, the process group)
    import         our code and what it needs; nothing in a process that has waited
    restore        the model, the engine, the state, the plan of the data
    first step     with the wait for its data

All but detection, scheduling and process start is ours. Figures are medians over the kills, seconds of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from tests.chaos import runs
from tests.tiny import TinyRun
from unimoe_ray import cluster, config
from unimoe_ray.checkpoint.states import latest
from unimoe_ray.training import standby

WORKERS, EVERY = 2, 20
PHASES = ("detection", "scheduling", "process start", "import", "restore", "first step")
OURS = ("import", "restore", "first step")


def make_run(folder: Path, small: bool, kills: int, standby: bool) -> TinyRun:
    mini = config.load("mini")
    model = {} if small else {"language": mini.model.language.model_dump(exclude_unset=True)}
    # A process that is to wait takes some seconds beside the training.
    intervals = kills + 1 if not standby else 4 * kills + 1
    run = runs.make_run(folder, steps=EVERY * intervals * (10 if small and standby else 1), every=EVERY, model=model)
    run.config.training.elastic.standby_every = 2.0 if standby else None
    tune = run.config.stages.tune["tune"]
    if not small:
        tune.batch_size, tune.lora = mini.stages.tune["tune"].batch_size, mini.stages.tune["tune"].lora
    return run


class Killer:
    """Kills a worker in the second half of an interval between two states, as often as asked.

    ready: processes that must wait meanwhile
    """

    def __init__(self, run: TinyRun, kills: int, ready: int):
        self._run, self._left, self._ready = run, kills, ready
        self._at = EVERY + EVERY // 2
        self.times: list[float] = []
        self.committed: list[int] = []

    def __call__(self) -> None:
        lines = runs.lines(self._run)
        if not self._left or not lines or lines[-1]["step"] < self._at or lines[-1]["step"] % EVERY < EVERY // 2:
            return
        if len(list(standby.requests().glob("ready-*"))) - WORKERS * len(self.times) < self._ready:
            return
        self._left, self._at = self._left - 1, lines[-1]["step"] + EVERY
        workers = [
            p for p in psutil.process_iter(["cmdline"]) if "ray::RayTrainWorker" in " ".join(p.info["cmdline"] or [])
        ]
        ours = set(psutil.Process().children(recursive=True))
        self.committed.append(latest(self._run.config, "tune", "tune") or 0)
        self.times.append(time.time())
        next(p for p in workers if p in ours).kill()


def measure(small: bool, kills: int, waiting: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), small, kills, waiting)
        killer = Killer(run, kills, WORKERS if waiting else 0)
        with cluster.connect(run.config):
            runs.train(run, workers=WORKERS, follow=killer)
        lines, stops = runs.lines(run), runs.stops(run)
    found = [line for line in lines if "recovery" in line]
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for killed, stop, line in zip(killer.times, stops, found, strict=True):
        recovery = line["recovery"]
        phases["detection"].append(stop["time"] - killed)
        for phase in PHASES[1:]:
            key = {"process start": "process_s", "first step": "first_step_s"}.get(phase, f"{phase}_s")
            phases[phase].append(recovery[key])
    first = {line["step"] for line in found} | {1}
    steady = [line["seconds"] for line in lines if line["step"] not in first]
    written = [line["checkpoint"] for line in lines if "checkpoint" in line]
    step = statistics.median(steady)
    pause = statistics.median(state["wait_s"] + state["copy_s"] for state in written)
    medians = {phase: round(statistics.median(values), 3) for phase, values in phases.items()}
    return {
        "kills": kills,
        "standby": [line["recovery"]["standby"] for line in found],
        "phases_s": medians,
        "whole_s": round(statistics.median(map(sum, zip(*phases.values(), strict=True))), 3),
        "ours_s": round(sum(medians[phase] for phase in OURS), 3),
        "lost_steps": [line["recovery"]["lost_steps"] for line in found],
        "went_on_from": [line["step"] - 1 for line in found],
        "committed_at_kill": killer.committed,
        "step_s": round(step, 4),
        "pause_s": round(pause, 5),
        "pause_share": round(pause / (EVERY * step), 5),
        "goodput": lines[-1]["goodput"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cold", action="store_true", help="no process waits")
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    result = measure(given.small, 1 if given.small else given.kills, not given.cold)
    print(f"{'phase':<16}{'seconds':>9}")
    for phase, seconds in result["phases_s"].items():
        print(f"{phase:<16}{seconds:>9.2f}{'   ours' if phase in OURS else ''}")
    print(f"{'whole':<16}{result['whole_s']:>9.2f}   of it ours {result['ours_s']:.2f}")
    share = 100 * result["pause_share"]
    print(
        f"a state every {EVERY} steps of {1000 * result['step_s']:.0f} ms: {share:.2f} % of the time is waiting for it"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
