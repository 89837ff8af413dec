"""A data set looked over without encoding or training: what is in it, how long it is, what repeats, what is broken."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from unimoe_ray.config import Config
from unimoe_ray.config.data import SPLITS, SourceConfig
from unimoe_ray.data.catalog import Catalog, Repeat
from unimoe_ray.data.features import decode_media
from unimoe_ray.data.gather import Progress, make_run_template, read_into, tokenised
from unimoe_ray.data.locations import BadMedia, shown
from unimoe_ray.data.pretrained import load_pretrained_tokenizer
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.sources import record_files

# soft_tokens(kind, decoded file): how many soft tokens it becomes.
SoftTokens = Callable[[str, Any], int]
EXAMPLES = 3  # of each modality group
REPEATS = 20
_NUMBERS = re.compile(r"\d+")


@dataclass
class Checked:
    """What ``check`` found.

    samples: usable ones by split and task; groups: by modality group; media: files used, by kind; lengths: how many
    samples have a number of tokens, media included; shortened: samples too long as they are; repeats: samples that
    repeat another one, in any split; copies: media files with the content of another one; reasons: why records can't
    be used, numbers and names left out.
    """

    records: int = 0
    samples: dict[str, Counter[str]] = field(default_factory=dict)
    groups: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    repeated: int = 0
    repeats: list[Repeat] = field(default_factory=list)
    copies: int = 0
    shortened: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def usable(self, max_bad_fraction: float) -> bool:
        """Whether ``prepare`` would accept the data, and there is something to train on."""
        return self.bad <= max_bad_fraction * self.records and any(self.samples.get("train", {}).values())


def check(
    config: Config,
    sources: list[SourceConfig],
    soft_tokens: SoftTokens,
    folder: Path,
    on_progress: Progress,
    on_bad: Callable[[dict[str, str]], None],
) -> Checked:
    """Read every record, decode every media file, count tokens as ``prepare`` would. ``folder`` is for scratch files.

    on_bad gets the quarantine entries. Memory does not grow with the data. Raises UsageError for sources that can't
    be read.
    """
    found = Checked()
    language = config.model.language
    pretrained = None
    if language.pretrained is not None:
        pretrained = load_pretrained_tokenizer(language.pretrained, config.data.template)
    with Catalog(folder / ".catalog.sqlite", config.data.max_bytes) as catalog:
        found.records = read_into(catalog, record_files(sources), config, on_progress)
        tokens = _decode_all(config, catalog, soft_tokens, found, on_progress)
        scratch = folder / ".tokenizer.json"
        template = make_run_template(config, catalog, pretrained, scratch)
        scratch.unlink()
        for split in SPLITS:
            found.samples[split] = Counter()
            for item in tokenised(config, catalog, split, template, tokens):
                _add(found, split, item.placed.sample, item.row)
                found.shortened += item.note is not None
        found.lengths = Counter(dict(sorted(found.lengths.items())))
        found.longest = max(found.lengths, default=0)
        found.repeated, found.repeats = catalog.repeats(REPEATS)
        found.copies = catalog.copies()
        for entry in catalog.bad():
            found.bad += 1
            found.reasons[_kind_of(entry)] += 1
            on_bad(entry)
    found.reasons = Counter(dict(found.reasons.most_common()))
    return found


def _decode_all(
    config: Config, catalog: Catalog, soft_tokens: SoftTokens, found: Checked, on_progress: Progress
) -> Callable[[str], int]:
    """Decodes each file once, in threads (the decoders work outside of Python's lock), a bounded number at a time."""

    def examine(name: str, media: Media) -> tuple[str, int, str | None]:
        try:
            decoded = decode_media(media, config.model.video.frames, config.data)
            return name, soft_tokens(media.kind, decoded), None
        except BadMedia as error:
            return name, 0, str(error)

    total, done = catalog.count("media"), 0
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        todo = (pool.submit(examine, name, item) for page in catalog.media() for name, item in page.items())
        for name, tokens, fault in _in_order(todo, 4 * threads):
            catalog.mark(name, tokens, fault)
            found.media[name.partition("/")[0]] += 1
            done += 1
            on_progress("decoding media", done, total)
    return catalog.tokens


def _in_order(futures: Iterator[Future], ahead: int) -> Iterator[Any]:
    """Results in order, with at most ``ahead`` calls under way."""
    under_way = deque(islice(futures, ahead))
    while under_way:
        yield under_way.popleft().result()
        under_way.extend(islice(futures, 1))


def _add(found: Checked, split: str, sample: Sample, row: PreparedSample) -> None:
    found.samples[split][row.task] += 1
    found.groups[row.group] += 1
    found.lengths[row.length] += 1
    if found.groups[row.group] <= EXAMPLES:
        question, answer = sample.turns[-1]
        found.examples.append(
            {
                "split": split,
                "id": row.id,
                "task": row.task,
                "group": row.group,
                "tokens": row.length,
                "question": question,
                "answer": answer,
                "media": [{"kind": item.kind, "path": shown(item.paths[0])} for item in sample.media],
            }
        )


def _kind_of(entry: dict[str, str]) -> str:
    """A reason without what differs from record to record: the file before the colon, quoted names and numbers."""
    reason = entry["reason"]
    head, colon, rest = reason.partition(": ")
    if colon and ("/" in head or "://" in head or head.startswith("data:")):
        reason = rest
    return _NUMBERS.sub("N", re.sub(r"'[^']*'", "'...'", reason))
