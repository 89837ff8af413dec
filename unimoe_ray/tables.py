"""Tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from unimoe_ray.config import Config
from unimoe_ray.data.check import Checked
from unimoe_ray.evaluation.benchmark import Result, Task
from unimoe_ray.report.check import quantile

RANDOM_TOWERS = " (towers with RANDOM weights)"


def accuracy_table(config: Config, tasks: dict[str, dict[str, float]]) -> Table:
    """``tasks`` as in ``eval.json``: accuracy beside the majority answer; says so where towers have random weights."""
    title = f"{config.name}: held-out answers, greedy, exact match"
    if config.mini.random_towers:
        title += RANDOM_TOWERS
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for column in ("accuracy", "majority", "answers"):
        table.add_column(column, justify="right")
    for task, score in tasks.items():
        table.add_row(task, f"{score['accuracy']:.3f}", f"{score['majority']:.3f}", str(score["n"]))
    return table


def benchmark_table(config: Config, task: Task, result: Result) -> Table:
    """Figures times 100, with 95 % intervals over groups of questions; says which questions they leave out."""
    how = "greedy" if not task.decoding.temperature else f"sampled at temperature {task.decoding.temperature:g}"
    title = f"{config.name}: {task.benchmark.title}, {task.split}, {how}"
    if task.limit is not None:
        title += f" (the first {task.limit} questions only)"
    if result.unusable:
        title += f" (WITHOUT {len(result.unusable)} of {result.questions} questions that could not be asked)"
    if config.mini.random_towers:
        title += RANDOM_TOWERS
    table = Table(title=title, title_justify="left")
    table.add_column("figure, x 100")
    for column in ("value", "95 % interval", "questions"):
        table.add_column(column, justify="right")
    for figure in result.figures:
        low, value, high = (f"{100 * figure[key]:.2f}" for key in ("low", "value", "high"))
        table.add_row(figure["name"], value, f"{low} to {high}", str(figure["n"]))
    return table


def check_summary(found: Checked) -> str:
    """The counts of a data check, a line each."""
    splits = [f"{split} {sum(tasks.values())} samples" for split, tasks in found.samples.items()]
    groups = [f"{group} {count}" for group, count in sorted(found.groups.items())]
    media = [f"{kind} {count}" for kind, count in sorted(found.media.items())]
    lengths = [f"{label} {quantile(found.lengths, q)}" for label, q in (("median", 0.5), ("95 %", 0.95), ("most", 1.0))]
    lines = [
        f"{found.records} records: {', '.join(splits)}, {found.bad} bad",
        f"modality groups: {', '.join(groups) or 'none'}",
        f"media files: {', '.join(media) or 'none'}; {found.copies} with the content of another one",
        f"tokens of a sample: {', '.join(lengths)}; {found.shortened} shortened",
        f"samples that repeat another one: {found.repeated}",
        *(f"bad: {count} x {reason}" for reason, count in found.reasons.most_common(10)),
    ]
    return "\n".join(lines)
