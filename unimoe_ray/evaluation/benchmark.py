"""A benchmark's questions answered by a model, over Ray workers, and scored.

The folder of an evaluation, ``RUN/benchmarks/NAME-SPLIT/KEY``, belongs to one model, decoding and split
(``recipe.json``, whose hash is KEY):

    answers.jsonl   every answer as it came, by question id; what is there is not asked again
    samples.jsonl   question, references, answer and scores of each question, in the benchmark's order
    unusable.jsonl  questions without an answer (missing or broken media, ...) and why; asked again next time
    result.json     figures with intervals, counts
    submission/     the file for the benchmark's server, script or judge
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ray

from unimoe_ray.config import Config
from unimoe_ray.errors import UnimoeError, UsageError, root_cause
from unimoe_ray.evaluation.answering import Answerer, Reply
from unimoe_ray.evaluation.benchmarks import Answered, Benchmark, Decoding, Folder, Question
from unimoe_ray.evaluation.intervals import Measure, interval, ratio
from unimoe_ray.training.checkpoint import fingerprint

CHUNK = 32  # questions that a worker gets at a time
AHEAD = 2  # chunks that each worker has or waits for
RESTARTS = 3

# Questions, and how many they are, to each of them with its reply, in any order.
Ask = Callable[[Iterator[Question], int], Iterator[tuple[Question, Reply]]]


@dataclass(frozen=True)
class Task:
    """What is to be answered. ``limit``: only the first so many questions."""

    benchmark: Benchmark
    folder: Folder
    split: str
    decoding: Decoding
    limit: int | None = None

    def questions(self) -> Iterator[Question]:
        return islice(self.benchmark.read(self.folder, self.split), self.limit)


@dataclass(frozen=True)
class Result:
    """figures: {name, value, low, high, n} each, the main one first; none where a judge scores, or the answers are not
    published. unusable: {id, reason} of questions that got no answer; they have no part in the figures."""

    folder: Path
    questions: int
    asked: int
    unusable: list[dict[str, str]]
    cut: int
    figures: list[dict[str, Any]]
    submission: list[Path]


def decoding_of(benchmark: Benchmark, way: str) -> Decoding:
    """``greedy``, or ``published``. Raises UsageError for beams, which the engine does not have."""
    published = benchmark.published
    if way == "greedy":
        return published.greedy()
    if published.beams > 1:
        raise UsageError(
            f"{benchmark.name} was published with {published.beams} beams, which this engine does not have; "
            "allowed: --decoding greedy"
        )
    return published


def ray_workers(config: Config, model_dir: Path, decoding: Decoding, *, workers: int, use_gpu: bool) -> Ask:
    """Asks over so many Ray actors. One that dies is started again, and its questions are asked again. A bounded number
    of questions is on its way. Raises UnimoeError when workers keep failing."""

    def ask(questions: Iterator[Question], count: int) -> Iterator[tuple[Question, Reply]]:
        options = {"num_cpus": 1, "num_gpus": int(use_gpu), "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        remote = ray.remote(**options)(Answerer)
        settings = config.model_dump(mode="json")
        needed = min(workers, -(-count // CHUNK))
        actors = [remote.remote(settings, str(model_dir), decoding, use_gpu) for _ in range(needed)]
        pending: dict[Any, tuple[Any, list[Question]]] = {}

        def send(actor: Any) -> None:
            if chunk := list(islice(questions, CHUNK)):
                pending[actor.answer.remote(chunk)] = actor, chunk

        try:
            for actor in actors * AHEAD:
                send(actor)
            while pending:
                (ready, *_), _ = ray.wait(list(pending), num_returns=1)
                actor, chunk = pending.pop(ready)
                replies = ray.get(ready)
                send(actor)
                yield from zip(chunk, replies, strict=True)
        except ray.exceptions.RayError as error:
            raise UnimoeError(f"answering failed: {root_cause(error)}") from error
        finally:
            for actor in actors:
                ray.kill(actor)

    return ask


def run_benchmark(
    config: Config, model_dir: Path, task: Task, ask: Ask, on_progress: Callable[[int, int], None] | None = None
) -> Result:
    """Answer what is not answered yet (``ask``: see ``ray_workers``), score all. Raises UsageError for files that are
    not as published, before anything is asked."""
    wanted = _digests(task)
    recipe = {
        "benchmark": task.benchmark.name,
        "split": task.split,
        "decoding": asdict(task.decoding),
        "model": fingerprint(model_dir),
        "precision": config.serving.engine.precision,
        "frames": config.model.video.frames,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    out = config.run_dir.resolve() / "benchmarks" / f"{task.benchmark.name}-{task.split}" / key
    with _held(out):
        _replace(out / "recipe.json", json.dumps(recipe, indent=1))
        with open(out / "answers.jsonl", "a+b") as log:
            replies = {i: reply for i, (digest, reply) in _read_log(log).items() if wanted.get(i) == digest}
            left = len(wanted) - len(replies)
            unusable: dict[str, str] = {}
            if left:
                todo = (question for question in task.questions() if question.id not in replies)
                for question, reply in ask(todo, left):
                    if reply.fault:
                        unusable[question.id] = reply.fault
                    else:
                        replies[question.id] = reply
                        line = {"id": question.id, "digest": wanted[question.id]} | asdict(reply)
                        log.write(json.dumps(line).encode() + b"\n")
                        log.flush()
                    if on_progress:
                        on_progress(len(replies) + len(unusable), len(wanted))
        return _finish(task, out, recipe, replies, unusable, left)


def _digests(task: Task) -> dict[str, str]:
    """Of what is asked, by question id. Reads all files to their end, so that a fault in them shows at once."""
    found: dict[str, str] = {}
    for question in task.questions():
        if question.id in found:
            raise UsageError(f"{task.folder.path}: {task.benchmark.name} has the question {question.id} twice")
        asked = repr((question.prompt, question.media)).encode()
        found[question.id] = hashlib.blake2b(asked, digest_size=8).hexdigest()
    if not found:
        raise UsageError(f"{task.folder.path}: {task.benchmark.name} has no questions in its split '{task.split}'")
    return found


@contextmanager
def _held(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnimoeError(f"{out}: another command is answering this benchmark with this model") from None
        yield


def _read_log(log: IO[bytes]) -> dict[str, tuple[str, Reply]]:
    """Earlier answers: {id: (digest, reply)}. A line that was being written when the process was killed is cut off."""
    log.seek(0)
    found, end = {}, 0
    for line in log:
        if not line.endswith(b"\n"):
            log.truncate(end)
            break
        end += len(line)
        entry = json.loads(line)
        name, digest = entry.pop("id"), entry.pop("digest")
        found[name] = digest, Reply(**entry)
    log.seek(0, 2)
    return found


def _finish(
    task: Task,
    out: Path,
    recipe: dict[str, Any],
    replies: dict[str, Reply],
    unusable: dict[str, str],
    asked: int,
) -> Result:
    answered, everything = [], []
    for question in task.questions():
        kept = replace(question, media=())
        reply = replies.get(question.id)
        everything.append(Answered(kept, reply.answer if reply else ""))
        if reply:
            answered.append(everything[-1])
    measures: list[Measure] = []
    if task.benchmark.score and answered and all(a.question.references for a in answered):
        measures = task.benchmark.score(answered)
    groups = [a.question.group for a in answered]
    figures = []
    for measure in measures:
        bounds = interval(measure, groups)
        figures.append(
            {"name": measure.name, "value": measure.figure, "low": bounds.low, "high": bounds.high, "n": measure.count}
        )
    submission: list[Path] = []
    if task.benchmark.submit:
        (out / "submission").mkdir(exist_ok=True)
        submission = task.benchmark.submit(out / "submission", everything)
    faults = [{"id": name, "reason": reason} for name, reason in unusable.items()]
    _replace(out / "unusable.jsonl", "".join(json.dumps(fault) + "\n" for fault in faults))
    _replace(out / "samples.jsonl", "".join(_sample_lines(answered, measures)))
    counts = {
        "questions": len(everything),
        "answered": len(answered),
        "unusable": len(faults),
        "cut": sum(replies[a.question.id].cut for a in answered),
        "limit": task.limit,
    }
    _replace(out / "result.json", json.dumps(recipe | counts | {"figures": figures}, indent=1))
    return Result(out, len(everything), asked, faults, counts["cut"], figures, submission)


def _sample_lines(answered: list[Answered], measures: list[Measure]) -> Iterator[str]:
    means = [measure for measure in measures if measure.value is ratio]
    for row, a in enumerate(answered):
        scores = {m.name: float(m.sums[row, 0] / m.sums[row, 1]) for m in means if m.sums[row, 1]}
        question = a.question
        line = {
            "id": question.id,
            "group": question.group,
            "prompt": question.prompt,
            "references": question.references,
            "answer": a.answer,
            "scores": scores,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
