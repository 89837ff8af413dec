"""The paper's benchmarks, read from local copies of their own files."""

from __future__ import annotations

from pathlib import Path

from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation.benchmarks import options, pictures, sounds, videos
from unimoe_ray.evaluation.benchmarks.base import Answered, Benchmark, Decoding, Question
from unimoe_ray.evaluation.benchmarks.files import Folder

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for module in (pictures, options, sounds, videos) for benchmark in module.BENCHMARKS
}

__all__ = ["BENCHMARKS", "Answered", "Benchmark", "Decoding", "Folder", "Question", "find_benchmark", "open_folder"]


def find_benchmark(name: str, split: str | None = None) -> tuple[Benchmark, str]:
    """A benchmark and its split. Raises UsageError naming what is allowed."""
    if name not in BENCHMARKS:
        raise UsageError(f"benchmark '{name}' does not exist; allowed: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if split is not None and split not in benchmark.splits:
        raise UsageError(f"{name} has no split '{split}'; allowed: {', '.join(benchmark.splits)}")
    return benchmark, split or benchmark.splits[0]


def open_folder(benchmark: Benchmark, data: Path, media: Path | None = None) -> Folder:
    """Raises UsageError for a folder that is not there."""
    for path in filter(None, (data, media)):
        if not path.is_dir():
            raise UsageError(f"{benchmark.name}: {path}: no such folder; it is to have {benchmark.files}")
    return Folder(benchmark.name, data.resolve(), (media or data).resolve())
