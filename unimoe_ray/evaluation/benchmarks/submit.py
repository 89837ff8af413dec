"""The files that benchmarks' servers, scripts and judges take."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from unimoe_ray.evaluation.benchmarks.base import Answered
from unimoe_ray.evaluation.choices import choose

Submit = Callable[[Path, Sequence[Answered]], list[Path]]


def json_of(name: str, record: Callable[[Answered], dict[str, Any]]) -> Submit:
    """A JSON list."""

    def write(folder: Path, answered: Sequence[Answered]) -> list[Path]:
        text = json.dumps([record(a) for a in answered], indent=1, ensure_ascii=False)
        return [_write(folder / name, [text, "\n"])]

    return write


def json_map(name: str, value: Callable[[Answered], Any]) -> Submit:
    """A JSON object: question id to value."""

    def write(folder: Path, answered: Sequence[Answered]) -> list[Path]:
        text = json.dumps({a.question.id: value(a) for a in answered}, indent=1, ensure_ascii=False)
        return [_write(folder / name, [text, "\n"])]

    return write


def json_lines(name: str, record: Callable[[Answered], dict[str, Any]], by: str | None = None) -> Submit:
    """A JSON object a line; a file for each value of a fact, whose place in ``name`` is ``{}``."""

    def write(folder: Path, answered: Sequence[Answered]) -> list[Path]:
        values = list(dict.fromkeys(a.question.facts[by] for a in answered)) if by else [None]
        return [
            _write(
                folder / name.format(value),
                (
                    json.dumps(record(a), ensure_ascii=False) + "\n"
                    for a in answered
                    if by is None or a.question.facts[by] == value
                ),
            )
            for value in values
        ]

    return write


def csv_of(name: str, header: tuple[str, ...], row: Callable[[Answered], tuple[str, ...]]) -> Submit:
    def write(folder: Path, answered: Sequence[Answered]) -> list[Path]:
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(row(a) for a in answered)
        return [folder / name]

    return write


def mmbench(folder: Path, answered: Sequence[Answered]) -> list[Path]:
    """MMBench's server takes a sheet with the answers beside the questions; predictions are letters where they can be
    read, else the whole answer, for its own reading."""
    book = Workbook(write_only=True)
    sheet = book.create_sheet("predictions")
    options = ("A", "B", "C", "D")
    columns = ("index", "question", *options, "prediction", "category", "l2-category")
    sheet.append(columns)
    for a in answered:
        question = a.question
        values = dict(zip(options, question.options, strict=False)) | question.facts | {"index": int(question.id)}
        values["prediction"] = choose(a.answer, question.options) or a.answer
        sheet.append([_cell(values.get(column, "")) for column in columns])
    path = folder / "mmbench.xlsx"
    book.save(path)
    return [path]


def _cell(value: Any) -> Any:
    return ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value


def _write(path: Path, lines: Iterable[str]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return path
