"""Tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from unimoe_ray.config import Config


def accuracy_table(config: Config, tasks: dict[str, dict[str, float]]) -> Table:
    """``tasks`` as in ``eval.json``: accuracy beside the majority answer; says so where towers have random weights."""
    title = f"{config.name}: held-out answers, greedy, exact match"
    if config.mini.random_towers:
        title += " (towers with RANDOM weights)"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for column in ("accuracy", "majority", "answers"):
        table.add_column(column, justify="right")
    for task, score in tasks.items():
        table.add_row(task, f"{score['accuracy']:.3f}", f"{score['majority']:.3f}", str(score["n"]))
    return table
