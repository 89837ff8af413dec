"""Files that an experiment's figures are written to."""

from __future__ import annotations

from pathlib import Path

from unimoe_ray.experiments.cache import finished, write_cache
from unimoe_ray.experiments.plan import Experiment
from unimoe_ray.experiments.results import collect, markdown, to_json
from unimoe_ray.report.ablation import write_ablation_page


def cache_of(results: Path | None) -> Path | None:
    return None if results is None else results / "ablate-runs.jsonl"


def publish(experiment: Experiment, split: str, results: Path | None) -> tuple[Path, str]:
    """``results-SPLIT.json``, ``.md`` and ``.html`` of what is finished, in the folder of the runs; the page's path and
    the tables. results: a folder that gets the same figures (``ablate.json``), and outcomes of runs that need not be
    trained again (``ablate-runs.jsonl``)."""
    cache = cache_of(results)
    known = finished(experiment, split, cache)
    found = collect(experiment, split, known)
    experiment.out.mkdir(parents=True, exist_ok=True)
    page = experiment.out / f"results-{split}.html"
    figures, tables = to_json(found), markdown(found)
    page.with_suffix(".json").write_text(figures, encoding="utf-8")
    page.with_suffix(".md").write_text(tables, encoding="utf-8")
    write_ablation_page(page, experiment.base.name, found)
    if results is not None and known:
        results.mkdir(parents=True, exist_ok=True)
        (results / "ablate.json").write_text(figures, encoding="utf-8")
        write_cache(cache, experiment, split, known)
    return page, tables
