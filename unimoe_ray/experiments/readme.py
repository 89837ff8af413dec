"""Figures of an experiment in README: ``make readme`` puts them between the markers

    <!-- ablation: benchmarks/results/ablate.json -->
    <!-- /ablation -->

out of the file that the first one names, so that none is typed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimoe_ray.errors import UnimoeError
from unimoe_ray.report.ablation import SPECIALIST, amount
from unimoe_ray.report.words import short

MARKED = re.compile(r"(<!-- ablation: (\S+) -->\n)(.*?)(<!-- /ablation -->)", re.DOTALL)
SPLITS = {"dev": "development", "test": "held-out"}


def updated(text: str, root: Path) -> str:
    """``text`` with its blocks made anew. Raises UnimoeError for a source that can't be read."""

    def block(match: re.Match[str]) -> str:
        path = root / match[2]
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnimoeError(f"{path}: {error}") from None
        return f"{match[1]}{ablation_block(found)}{match[4]}"

    return MARKED.sub(block, text)


def ablation_block(found: Mapping[str, Any]) -> str:
    """Claims with verdicts, and arms; ``found``: as ``results.collect`` has it."""
    questions, seeds = sum(found["questions"].values()), len(found["seeds"])
    lines = [
        f"{found['finished']} of {found['planned']} planned runs ({seeds} seeds), {questions:,} questions of the "
        f"{SPLITS[found['split']]} split; means over seeds with 95 % intervals (Student).",
        "",
        "| claim | verdict | difference | seeds | the paper's own |",
        "|---|---|---|---|---|",
    ]
    for claim in found["claims"]:
        scale, digits = (100, 1) if claim["unit"] == "points" else (1, 0)
        difference = f"{amount(claim, scale, digits, signed=True)} {claim['unit']}"
        own = claim["paper"]["difference"]
        paper = "–" if own is None else f"{own:+.1f}"
        lines.append(f"| {claim['text']} | {claim['verdict']} | {difference} | {claim['seeds']} | {paper} |")
    for claim in found["not judged"]:
        lines.append(f"| {claim['text']} | not judged | – | 0 | – |")
    lines += [
        "",
        "| arm | accuracy, % | worst drop, points | steps to 90 % | active | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        if name.startswith(SPECIALIST) or not arm["by seed"]:
            continue
        figures, active = arm["figures"], arm["cost"]["active"]
        cells = (
            amount(figures["accuracy"], 100),
            amount(figures["worst drop"], 100),
            amount(figures["steps to 90 %"], 1, 0),
            short(active) if active else "–",
            len(arm["by seed"]),
        )
        lines.append(f"| {arm['about']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    try:
        text = path.read_text(encoding="utf-8")
        new = updated(text, path.parent)
    except (UnimoeError, OSError) as error:
        print(f"unimoe: {error}", file=sys.stderr)
        sys.exit(1)
    path.write_text(new, encoding="utf-8")
    print(f"{path}: {len(MARKED.findall(text))} blocks, {'changed' if new != text else 'nothing changed'}")


if __name__ == "__main__":
    main()
