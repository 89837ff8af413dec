"""The steps of a run, as the jobs and the command line call them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from unimoe_ray import cluster
from unimoe_ray.checkpoint import states
from unimoe_ray.config import Config, dump
from unimoe_ray.config.model import MODALITIES
from unimoe_ray.config.training import STAGES
from unimoe_ray.data import check as checking
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.data.pretrained import load_pretrained_tokenizer
from unimoe_ray.data.sources import absolute, sources_of
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation import benchmark as benchmarking
from unimoe_ray.evaluation import evaluate as evaluating
from unimoe_ray.evaluation.evaluate import Evaluation
from unimoe_ray.llama import checkpoint_of
from unimoe_ray.mini import source as mini
from unimoe_ray.model.connectors import build_connector
from unimoe_ray.model.language import pretrained_config
from unimoe_ray.progress import TrainProgress, follow_metrics
from unimoe_ray.report.check import write_check_page
from unimoe_ray.tables import check_summary
from unimoe_ray.towers import TOWERS, load_tower, load_towers, sketch_tower
from unimoe_ray.training import checkpoint
from unimoe_ray.training.checkpoint import ModelInfo

SHOWN_FAULTS = 5  # questions without an answer that are named on the terminal


@contextmanager
def open_run(config: Config) -> Iterator[Path]:
    """The run folder, with the resolved configuration in it, held by one command at a time."""
    folder = config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnimoeError(f"{folder}: another command is using this run folder") from None
            # Data and states are found again from wherever the run is used.
            places = {"data": absolute(config.data), "checkpoint": states.absolute(config.checkpoint)}
            found = config.model_copy(update=places)
            (folder / "config.yaml").write_text(dump(found), encoding="utf-8")
            yield folder
    except OSError as error:
        raise UnimoeError(f"{error.filename or folder}: {error.strerror or error}") from error


@contextmanager
def session(config: Config) -> Iterator[TrainProgress]:
    """The run folder held, Ray joined or started, progress on the terminal."""
    with open_run(config), cluster.connect(config), TrainProgress(Console()) as progress:
        yield progress


def prepare(config: Config, progress: TrainProgress) -> preparing.Prepared:
    """The suite (for the embedded default), the feature store and the tokenised samples."""
    suite = mini.suite(config, progress.message) if config.data.is_mini else None
    towers = load_towers(config)
    connectors = {
        m: build_connector(m, towers[TOWER_OF[m]].feature_dim, 1, config.model.connector_of(m), config.model.video)
        for m in MODALITIES
    }
    result = preparing.prepare(
        with_checkpoint(config, progress.message),
        sources_of(absolute(config.data), suite and suite.resolve()),
        replace(encode_settings(config), threads=cluster.decoders(config), gpu=cluster.uses_gpu(config)),
        lambda kind, lengths: connectors[kind].soft_tokens(lengths),
        cluster.workers(config),
        progress.count,
        progress.message,
    )
    total = sum(sum(tasks.values()) for tasks in result.samples.values())
    progress.message(
        f"prepared {total} samples of {result.media} media files ({result.encoded} encoded now, "
        f"{result.quarantined} records in quarantine)"
    )
    if result.shortened:
        path = config.run_dir / preparing.SHORTENED
        first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        progress.message(
            f"{result.shortened} of them were longer than model.language.max_positions and were shortened (first: "
            f"{first['split']} {first['id']}: {first['what']}); all in {path}"
        )
    return result


def encode_settings(config: Config) -> EncodeSettings:
    """How the media of a run are encoded, on CPUs. Loads the towers."""
    towers = load_towers(config)
    return EncodeSettings(
        root=str(Path(config.data.dir).resolve() / "features"),
        fingerprints={m: fingerprint(config, m, towers[TOWER_OF[m]].fingerprint()) for m in MODALITIES},
        frames=config.model.video.frames,
        data=config.data,
        load_tower=partial(load_tower, config),
        sketch_tower=partial(sketch_tower, config),
    )


def check(config: Config, progress: TrainProgress) -> bool:
    """Look over the data without encoding them: ``check/`` of the run folder gets index.html, check.json and
    quarantine.jsonl. Returns whether the data can be prepared."""
    suite = mini.suite(config, progress.message) if config.data.is_mini else None
    folder = config.run_dir / "check"
    folder.mkdir(parents=True, exist_ok=True)
    towers = {modality: sketch_tower(config, modality) for modality in TOWERS}
    connectors = {
        m: build_connector(m, towers[TOWER_OF[m]].feature_dim, 1, config.model.connector_of(m), config.model.video)
        for m in MODALITIES
    }
    with open(folder / "quarantine.jsonl", "w", encoding="utf-8") as quarantine:
        found = checking.check(
            with_checkpoint(config, progress.message),
            sources_of(absolute(config.data), suite and suite.resolve()),
            lambda kind, decoded: connectors[kind].soft_tokens(towers[TOWER_OF[kind]].tokens_for(decoded)),
            folder,
            progress.count,
            lambda entry: quarantine.write(json.dumps(entry) + "\n"),
        )
    plain = vars(found) | {"repeats": [asdict(repeat) for repeat in found.repeats]}
    (folder / "check.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    write_check_page(folder / "index.html", config.name, plain)
    progress.message(check_summary(found))
    usable = found.usable(config.data.max_bad_fraction)
    progress.message(f"{'usable' if usable else 'NOT usable'}; see {folder / 'index.html'}")
    return usable


def train(config: Config, stage: str, progress: TrainProgress) -> None:
    """One stage, or all of them in order; finished runs are not done again."""
    for name in STAGES if stage == "all" else (stage,):
        _train_stage(config, name, progress)


def _train_stage(config: Config, stage: str, progress: TrainProgress) -> None:
    from unimoe_ray.training.trainer import run_stage

    info = model_info(config)
    trained = run_stage(
        config,
        stage,
        info,
        preparing.source(config, "train", encode_settings(config)),
        preparing.tokenizer_path(config),
        workers=cluster.workers(config),
        use_gpu=cluster.uses_gpu(config),
        follow=follow_runs(config.run_dir, progress),
    )
    for label in trained:
        progress.done(label)
    if not trained and getattr(config.stages, stage):
        progress.message(f"stage {stage}: finished already")


def follow_runs(run_dir: Path, progress: TrainProgress) -> Callable[[Path, list[str]], None]:
    """For ``run_stage``: shows the steps, the findings and the failures of its runs, a traceback once."""
    files = ("metrics.jsonl", "findings.jsonl", "events.jsonl")
    lines, findings, events = (follow_metrics(run_dir / name) for name in files)
    shown: set[str] = set()

    def follow(_: Path, labels: list[str]) -> None:
        for line in lines():
            if line["run"] in labels:
                progress.update(line["run"], line, line["steps"])
        for finding in findings():
            if finding["run"] in labels:
                progress.message(f"{finding['run']}, step {finding['step']}: {finding['text']}")
        for event in events():
            if event["run"] in labels and "text" in event:
                progress.message(f"{event['run']}: {event['text']}")
                if (traceback := event.get("traceback")) and traceback not in shown:
                    shown.add(traceback)
                    progress.message(traceback)

    return follow


def model_info(config: Config) -> ModelInfo:
    """What the dense model of this run is made of. Needs prepared data."""
    preparing.source(config, "train")
    towers = load_towers(config)
    tokens = load_tokenizer(preparing.tokenizer_path(config)).get_vocab_size()
    llama, legacy = None, True
    if config.model.language.pretrained is not None:
        language = with_checkpoint(config).model.language
        llama = pretrained_config(language)
        legacy = load_pretrained_tokenizer(language.pretrained, config.data.template).legacy
        if tokens > llama.vocab_size:
            raise UnimoeError(f"{language.pretrained}: has {tokens} tokens, but embeddings of {llama.vocab_size}")
    return ModelInfo(
        model=config.model.model_dump(mode="json"),
        vocab_size=tokens if llama is None else llama.vocab_size,
        feature_dims={m: towers[TOWER_OF[m]].feature_dim for m in MODALITIES},
        sparse=False,
        towers={m: towers[TOWER_OF[m]].fingerprint() for m in MODALITIES},
        random_towers=config.mini.random_towers,
        llama=None if llama is None else json.loads(llama.to_json_string()),
        template=config.data.template,
        legacy=legacy,
    )


def with_checkpoint(config: Config, say: Callable[[str], None] | None = None) -> Config:
    """``model.language.pretrained`` as a folder or hub name."""
    name = config.model.language.pretrained
    if name is None:
        return config
    language = config.model.language.model_copy(update={"pretrained": checkpoint_of(name, say)})
    return config.model_copy(update={"model": config.model.model_copy(update={"language": language})})


def fingerprint(config: Config, modality: str, tower: str) -> str:
    """Stored features depend on the tower and, for videos, on how many frames are taken."""
    return f"f{config.model.video.frames}-{tower}" if modality == "video" else tower


def evaluate(
    config: Config,
    progress: TrainProgress,
    *,
    split: str = "test",
    tasks: list[str] | None = None,
    stage: str | None = None,
    routing_file: Path | None = None,
) -> Evaluation:
    """Answers of the run's last finished model on a held-out split; the experts of its prompts' tokens into
    ``routing_file``."""
    return evaluating.evaluate(
        config,
        model_dir=evaluating.final_model(config, stage),
        split=split,
        tasks=tasks,
        shards=cluster.workers(config),
        on_progress=lambda done, total: progress.count("answering held-out questions", done, total),
        routing_file=routing_file,
    )


def evaluate_benchmark(
    config: Config, progress: TrainProgress, task: benchmarking.Task, *, stage: str | None = None
) -> benchmarking.Result:
    """Answers of the run's last finished model to a benchmark's questions, and their score."""
    model_dir = evaluating.final_model(config, stage)
    ask = benchmarking.ray_workers(
        config, model_dir, task.decoding, workers=cluster.workers(config), use_gpu=cluster.uses_gpu(config)
    )
    what = f"answering {task.benchmark.title}"
    result = benchmarking.run_benchmark(
        config, model_dir, task, ask, lambda done, total: progress.count(what, done, total)
    )
    progress.message(
        f"{result.questions - len(result.unusable)} of {result.questions} questions answered "
        f"({result.asked} asked now, {result.cut} answers cut off at {task.decoding.max_new_tokens} tokens)"
    )
    for fault in result.unusable[:SHOWN_FAULTS]:
        progress.message(f"unusable: {fault['id']}: {fault['reason']}")
    if len(result.unusable) > SHOWN_FAULTS:
        progress.message(
            f"... and {len(result.unusable) - SHOWN_FAULTS} more, all in {result.folder / 'unusable.jsonl'}"
        )
    return result


def stamp(config: Config, seconds: float) -> dict[str, Any]:
    """What identifies an evaluation: model, towers, suite, seed, time."""
    kind = "random" if config.mini.random_towers else "pretrained"
    return {
        "towers": dict.fromkeys(config.model.towers.model_dump(), kind),
        "suite": mini.suite_hash(config),
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "model": checkpoint.recipe(evaluating.final_model(config)),
    }


def earlier_evaluation(config: Config) -> dict[str, Any] | None:
    """``eval.json`` of the run, if it is of the present model."""
    path = config.run_dir / "eval.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("model") == checkpoint.recipe(evaluating.final_model(config)) else None
