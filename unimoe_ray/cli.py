"""The command line: ``unimoe prepare | train | eval | chat | serve | export | ...``; ``--help`` lists them all."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from unimoe_ray import __version__, config
from unimoe_ray.config import Config
from unimoe_ray.config.training import STAGES
from unimoe_ray.errors import UnimoeError, UsageError

EXPORT_FORMATS = ("mixtral", "hf", "official")
DTYPES = ("fp32", "bf16", "fp16")


def main(arguments: list[str] | None = None) -> None:
    """Exit code 0: done; 1: failed, with one line why; 2: bad usage or configuration."""
    parsed = _parse(arguments)
    try:
        sys.exit(parsed.run(parsed) or 0)
    except UnimoeError as error:
        print(f"unimoe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"unimoe: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("unimoe: stopped", file=sys.stderr)
        sys.exit(1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments that may be absent only before the first option; here they may follow it."""
    parser = _parser()
    parsed, late = parser.parse_known_args(arguments)
    if late and not any(text.startswith("-") for text in late):
        if hasattr(parsed, "overrides"):
            parsed.overrides, late = [*parsed.overrides, *late], []
        elif getattr(parsed, "question", "") is None:
            parsed.question, *late = late
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimoe", description="Uni-MoE: train, evaluate and talk to a multimodal MoE."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    prepare = _with_config(commands.add_parser("prepare", help="encode media, tokenise conversations"))
    prepare.add_argument(
        "--check", action="store_true", help="only look the data over: counts, lengths, repeats, broken files"
    )
    prepare.set_defaults(run=_prepare)

    train = commands.add_parser("train", help="train a stage, or all of them")
    train.add_argument("stage", choices=[*STAGES, "all"], metavar="STAGE", help=f"{', '.join(STAGES)} or all")
    _with_config(train).set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="answer a run's held-out questions, or those of a benchmark")
    _with_run(evaluate)
    evaluate.add_argument("--task", action="append", metavar="NAME", help="only this task (repeatable)")
    evaluate.add_argument("--split", metavar="SPLIT", help="test (default) or dev; of a benchmark, as it calls them")
    evaluate.add_argument(
        "--stage", choices=["base", "align", "tune"], help="the model after this stage (default: last)"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    evaluate.add_argument(
        "--routing", type=Path, metavar="FILE", help="write the experts and weights of every prompt token (Parquet)"
    )
    published = evaluate.add_argument_group("published benchmarks")
    published.add_argument("--benchmark", metavar="NAME", help="vqav2, mmbench, clotho, ...; 'list' shows all")
    published.add_argument("--data", type=Path, metavar="DIR", help="the benchmark's own files")
    published.add_argument("--media", type=Path, metavar="DIR", help="its pictures, sounds, videos (default: --data)")
    published.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    published.add_argument(
        "--decoding", choices=["greedy", "published"], default="greedy", help="as the paper's code decodes, or greedy"
    )
    evaluate.set_defaults(run=_eval)

    analysing = commands.add_parser("analyse", help="what a run's connectors and experts do; into its report")
    _with_run(analysing)
    analysing.add_argument(
        "--samples", type=int, default=60, metavar="N", help="held-out questions of each task (default: 60)"
    )
    analysing.set_defaults(run=_analyse)

    chat = commands.add_parser("chat", help="talk to a run's model; without a question, interactively")
    _with_run(chat)
    chat.add_argument("question", nargs="?", help="one question; without it a conversation starts")
    for kind in ("image", "audio", "speech", "video"):
        chat.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help=f"attach {kind} (repeatable)")
    chat.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    chat.set_defaults(run=_chat)

    serve = commands.add_parser("serve", help="answer over HTTP: an OpenAI-compatible endpoint and a page")
    _with_run(serve)
    serve.add_argument("--port", type=int, metavar="N", help="serving.port (default: 8000)")
    serve.add_argument("--host", metavar="ADDRESS", help="serving.host (default: 127.0.0.1, this machine only)")
    serve.add_argument("--write-config", type=Path, metavar="FILE", help="write a Serve config file (YAML) and stop")
    serve.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    serve.add_argument("overrides", nargs="*", metavar="serving.sub=value", help="configuration overrides")
    serve.set_defaults(run=_serve)

    export = commands.add_parser("export", help="write a run's model for other software")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, such as runs/mini, or model folder")
    export.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="what reads it")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make")
    export.set_defaults(run=_export)

    importer = commands.add_parser("import", help="make a model folder of a published checkpoint")
    importer.add_argument("--from", dest="form", choices=["official"], required=True, help="what wrote it")
    importer.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="base checkpoint, then what tunes it")
    importer.add_argument("--to", type=Path, required=True, metavar="OUT", help="model folder to make")
    importer.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    importer.set_defaults(run=_import)

    placing = commands.add_parser("plan-experts", help="which rank would hold which experts, and why")
    placing.add_argument(
        "words", nargs="*", metavar="RUN|FILE|key.sub=value",
        help="run folder, metrics.jsonl or JSON loads ([layer][expert], or those by kind); configuration overrides",
    )  # fmt: skip
    placing.add_argument("--config", default="mini", metavar="PRESET|FILE", help="sizes, without a run (default: mini)")
    placing.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks that share the experts (default: 2)")
    placing.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that the ranks lie on (default: 1)")
    placing.add_argument("--slots", type=int, metavar="N", help="experts of a layer that fit on a rank")
    placing.add_argument("--replicas", action="store_true", help="fill spare slots with second places of hot experts")
    placing.add_argument(
        "--reads", action="append", default=[], metavar="NODE=KIND,...", help="kinds of tokens read there (repeatable)"
    )
    placing.add_argument("--json", action="store_true", help="print one JSON object")
    placing.set_defaults(run=_plan_experts)

    report = commands.add_parser("report", help="write report/index.html of a run")
    _with_run(report)
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="check this machine and say what to do about each finding")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    from unimoe_ray.checkpoint import commands as checkpoint
    from unimoe_ray.kuberay import commands as kubernetes
    from unimoe_ray.submission import commands as submission

    checkpoint.add_to(commands)
    submission.add_to(commands)
    kubernetes.add_to(commands)
    return parser


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--config", default="mini", metavar="PRESET|FILE", help="preset name or YAML file (default: mini)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    return parser


def _with_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, such as runs/mini")


def _job(arguments: argparse.Namespace, work: Callable, comments: Callable[[Config], str] | None = None) -> int:
    """``comments`` follow the configuration that a dry run prints."""
    settings = config.load(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(config.dump(settings), end="")
        if comments is not None:
            print(comments(settings), end="")
        return 0
    from unimoe_ray import pipeline

    with pipeline.session(settings) as progress:
        work(settings, progress)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.dry_run:
        return _check(arguments)

    def work(settings: Config, progress) -> None:
        from unimoe_ray import pipeline

        pipeline.prepare(settings, progress)

    def comments(settings: Config) -> str:
        from unimoe_ray.store_table import store_table

        return "".join(f"# {line}\n" for line in store_table(settings))

    return _job(arguments, work, comments)


def _check(arguments: argparse.Namespace) -> int:
    """Exit code 1 if the data can't be prepared as they are. Needs no cluster."""
    settings = config.load(arguments.config, arguments.overrides)
    from rich.console import Console

    from unimoe_ray import pipeline
    from unimoe_ray.progress import TrainProgress

    with pipeline.open_run(settings), TrainProgress(Console()) as progress:
        return 0 if pipeline.check(settings, progress) else 1


def _train(arguments: argparse.Namespace) -> int:
    def work(settings: Config, progress) -> None:
        from unimoe_ray import pipeline

        pipeline.prepare(settings, progress)
        pipeline.train(settings, arguments.stage, progress)

    def comments(settings: Config) -> str:
        from unimoe_ray.parameter_table import parameter_table

        return "".join(f"# {line}\n" for line in parameter_table(settings))

    return _job(arguments, work, comments)


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.benchmark is not None:
        return _eval_benchmark(arguments)
    settings = config.load_run(arguments.run_folder)
    for name in ("data", "media", "limit"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} belongs to --benchmark")
    split = arguments.split or "test"
    if split not in ("test", "dev"):
        raise UsageError(f"--split {split}: allowed: test, dev")
    if arguments.routing and not arguments.routing.absolute().parent.is_dir():
        raise UsageError(f"--routing {arguments.routing}: there is no folder {arguments.routing.parent}")
    from rich.console import Console

    from unimoe_ray import cluster, pipeline
    from unimoe_ray.evaluation.evaluate import write_evaluation
    from unimoe_ray.progress import TrainProgress
    from unimoe_ray.tables import accuracy_table

    started = time.perf_counter()
    with cluster.connect(settings), TrainProgress(Console(stderr=True)) as progress:
        result = pipeline.evaluate(
            settings,
            progress,
            split=split,
            tasks=arguments.task,
            stage=arguments.stage,
            routing_file=arguments.routing,
        )
    stamp = pipeline.stamp(settings, time.perf_counter() - started)
    if not (arguments.task or arguments.stage or split != "test"):
        write_evaluation(settings.run_dir, result, stamp)
    if arguments.json:
        print(json.dumps({"tasks": result.tasks} | stamp))
    else:
        Console().print(accuracy_table(settings, result.tasks))
    return 0


def _eval_benchmark(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from unimoe_ray.evaluation.benchmarks import BENCHMARKS, find_benchmark, open_folder

    if arguments.benchmark == "list":
        for known in BENCHMARKS.values():
            print(f"{known.name:15} {known.title}; {'|'.join(known.splits)}\n{'':15} {known.files}")
        return 0
    settings = config.load_run(arguments.run_folder)
    for name in ("task", "routing"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} does not go with --benchmark")
    benchmark, split = find_benchmark(arguments.benchmark, arguments.split)
    if arguments.data is None:
        raise UsageError(f"--benchmark {benchmark.name} needs --data DIR, a folder with {benchmark.files}")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}: allowed: from 1")
    folder = open_folder(benchmark, arguments.data, arguments.media)
    from unimoe_ray import cluster, pipeline
    from unimoe_ray.evaluation.benchmark import Task, decoding_of
    from unimoe_ray.progress import TrainProgress
    from unimoe_ray.tables import benchmark_table

    task = Task(benchmark, folder, split, decoding_of(benchmark, arguments.decoding), arguments.limit)
    with cluster.connect(settings), TrainProgress(Console(stderr=True)) as progress:
        result = pipeline.evaluate_benchmark(settings, progress, task, stage=arguments.stage)
        for path in result.submission:
            progress.message(f"for the benchmark's own scoring: {path}")
    if arguments.json:
        print((result.folder / "result.json").read_text(encoding="utf-8"))
    else:
        Console().print(benchmark_table(settings, task, result))
    return 0


def _analyse(arguments: argparse.Namespace) -> int:
    """Needs no cluster."""
    settings = config.load_run(arguments.run_folder)
    if arguments.samples < 1:
        raise UsageError(f"--samples {arguments.samples}: allowed: from 1")
    from unimoe_ray.analysis.analyse import analyse, write_analysis
    from unimoe_ray.report import write_report

    found = analyse(settings, arguments.samples, lambda text: print(f"unimoe: {text}", file=sys.stderr))
    print(write_analysis(settings.run_dir, found))
    print(write_report(settings.run_dir))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    settings = config.load_run(arguments.run_folder)
    for kind in ("image", "audio", "speech", "video"):
        for path in getattr(arguments, kind):
            if not Path(path).is_file():
                raise UnimoeError(f"--{kind} {path}: no such file")
    from unimoe_ray.chat import Conversation
    from unimoe_ray.data.schema import Media
    from unimoe_ray.evaluation.evaluate import final_model

    attached = [
        Media(kind, (path,)) for kind in ("image", "video", "audio", "speech") for path in getattr(arguments, kind)
    ]
    if arguments.question is None and arguments.json:
        raise UsageError("--json needs a question")
    conversation = Conversation(settings, final_model(settings))
    if arguments.question is not None:
        reply = conversation.ask(arguments.question, attached)
        if conversation.note:
            print(f"unimoe: {conversation.note}", file=sys.stderr)
        print(json.dumps({"question": arguments.question, "answer": reply}) if arguments.json else reply)
        return 0
    from unimoe_ray.repl import interact

    interact(conversation, attached)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    given = [f"serving.{key}={getattr(arguments, key)}" for key in ("host", "port") if getattr(arguments, key)]
    settings = config.load_run(arguments.run_folder, [*arguments.overrides, *given])
    if arguments.dry_run:
        print(config.dump(settings), end="")
        return 0
    if arguments.write_config:
        from serve.app import write_config

        write_config(settings, arguments.write_config)
        print(arguments.write_config)
        return 0
    from rich.console import Console

    from serve import launch

    launch.run(settings, Console())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from unimoe_ray import convert

    convert.export(arguments.run_folder, arguments.format, arguments.to)
    print(arguments.to)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from unimoe_ray import convert

    def show(done: int, total: int) -> None:
        print(f"unimoe: file {done + 1} of {total}", file=sys.stderr)

    report = convert.import_official(arguments.folders, arguments.to, show, convert.DTYPES[arguments.dtype])
    for line in convert.summary(report):
        print(line)
    print(arguments.to)
    return 0


def _plan_experts(arguments: argparse.Namespace) -> int:
    from unimoe_ray.plan_experts import plan_experts

    planned = plan_experts(
        arguments.words,
        arguments.config,
        ranks=arguments.ranks,
        nodes=arguments.nodes,
        slots=arguments.slots,
        replicas=arguments.replicas,
        reads=arguments.reads,
    )
    print(json.dumps(planned.as_json()) if arguments.json else "\n".join(planned.lines()))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from unimoe_ray.report import write_report

    print(write_report(arguments.run_folder))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from unimoe_ray import doctor

    return doctor.run(arguments.json)


if __name__ == "__main__":
    main()
