"""The page: what was trained, how well it answers, how its experts are used, and what it says."""

from __future__ import annotations

import shutil
import time
from importlib import resources
from pathlib import Path

from unimoe_ray import __version__
from unimoe_ray.errors import UnimoeError
from unimoe_ray.report.analysis import analysis
from unimoe_ray.report.answers import answers
from unimoe_ray.report.experts import experts, findings
from unimoe_ray.report.html import Html, tag
from unimoe_ray.report.read import RunData, read_run
from unimoe_ray.report.sections import accuracy, headline, losses, quarantine, stages
from unimoe_ray.report.timeline import timeline
from unimoe_ray.report.words import date


def write_report(run_dir: Path | str) -> Path:
    """Write ``report/index.html`` of a run folder, with the media that it shows beside it, and return its path.

    What the run does not have yet is left out with a line that says so. Raises UnimoeError where there is no such
    run folder or nothing can be written into it.
    """
    folder = Path(run_dir)
    data = read_run(folder)
    report = folder / "report"
    staged = report / ".media"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        page = _page(data, staged)
        shutil.rmtree(report / "media", ignore_errors=True)
        staged.rename(report / "media")
        temporary = report / ".index.html"
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(report / "index.html")
    except OSError as error:
        raise UnimoeError(f"{error.filename or report}: {error.strerror or error}") from error
    return report / "index.html"


def _page(data: RunData, media: Path) -> str:
    name = data.folder.resolve().name
    sections = [
        ("accuracy", "Accuracy", accuracy(data)),
        ("loss", "Loss", losses(data)),
        ("findings", "Findings", findings(data)),
        ("experts", "Experts", experts(data)),
        ("analysis", "Analysis", analysis(data)),
        ("stages", "Stages", stages(data)),
        ("timeline", "Timeline", timeline(data)),
        ("answers", "Answers", answers(data, media)),
        ("data", "Left out", quarantine(data)),
    ]
    links = tag("nav", [tag("a", title, href=f"#{key}") for key, title, _ in sections], aria_label="Contents")
    body = [
        tag("header", tag("p", "Uni-MoE run report", class_="kicker"), tag("h1", name), headline(data)),
        links,
        tag(
            "main",
            [tag("p", note, class_="notice") for note in data.notes],
            [tag("section", tag("h2", title), content, id=key) for key, title, content in sections],
        ),
        tag(
            "footer",
            f"Made by unimoe_ray {__version__} on {date(time.time())} from the files of this run: ",
            tag("a", "config.yaml", href="../config.yaml"),
            ", ",
            tag("a", "metrics.jsonl", href="../metrics.jsonl"),
            ".",
        ),
        tag("script", Html(_asset("report.js"))),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: Uni-MoE run report"),
        tag("style", Html(_asset("report.css"))),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en") + "\n"


def _asset(name: str) -> str:
    return resources.files("unimoe_ray.report").joinpath(name).read_text(encoding="utf-8")
