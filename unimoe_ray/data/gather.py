"""Records of the sources into the catalog, and out of it as tokenised samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from unimoe_ray.config import Config
from unimoe_ray.config.data import SPLITS
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.locations import BadMedia
from unimoe_ray.data.pretrained import PretrainedTokenizer
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.schema import BadSample, Sample
from unimoe_ray.data.shorten import shorten
from unimoe_ray.data.sources import BadRecord, Placed, RecordFile, read_samples
from unimoe_ray.data.template import Template, make_template
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer

AHEAD = 64  # records whose media are read while earlier ones are noted
# What is done, how much of it, and of how much (None: not known yet).
Progress = Callable[[str, int, int | None], None]


def read_into(catalog: Catalog, files: list[RecordFile], config: Config, on_progress: Progress) -> int:
    """All records of all files: samples into the catalog, with their media's content keys, others as bad ones.

    Returns how many records there are.
    """
    what, count = "reading records", 0
    for split in SPLITS:
        for file in (file for file in files if file.split == split):
            for item in _begun(read_samples(file, config.data.voice_as), catalog):
                count += 1
                if isinstance(item, BadRecord):
                    catalog.add_bad(split, item)
                else:
                    try:
                        catalog.add(split, item)
                    except (BadSample, BadMedia) as error:
                        catalog.add_bad(split, item.bad(str(error)))
                if count % 500 == 0:
                    on_progress(what, count, None)
    on_progress(what, count, count)
    return count


def _begun(items: Iterable[Placed | BadRecord], catalog: Catalog) -> Iterator[Placed | BadRecord]:
    """The items as they come; the media of some that follow are being read."""
    waiting: deque[Placed | BadRecord] = deque()
    for item in items:
        if isinstance(item, Placed):
            catalog.begin(item.sample)
        waiting.append(item)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class Tokenised:
    """A sample as ids. sample: as it was tokenised, shortened if ``note`` says how; whole: with the last answer, which
    a held-out ``row`` has not, if that fits."""

    placed: Placed
    sample: Sample
    row: PreparedSample
    whole: PreparedSample | None
    note: str | None


def tokenised(
    config: Config, catalog: Catalog, split: str, template: Template, count: Callable[[str], int]
) -> Iterator[Tokenised]:
    """The samples of a split as ids; those with broken media or too many tokens become bad ones of the catalog.

    count(name) tells how many soft tokens a media file becomes.
    """
    held_out = split != "train"
    kept = config.evaluation.max_new_tokens if held_out else 0
    limit = config.model.language.max_positions
    for entry in catalog.samples(split):
        placed, sample, note = entry.placed, entry.placed.sample, None
        if fault := catalog.fault(entry.names):
            catalog.add_bad(split, placed.bad(fault))
            continue
        counts = [count(name) for name in entry.names]
        encode = partial(_encode, entry.names, counts, template)
        row = encode(held_out, sample)
        if row.length + kept > limit:
            shorter = None
            if config.data.too_long == "shorten":
                fits = partial(_fits, encode, held_out, limit - kept)
                shorter = shorten(sample, fits, keep_turns=not held_out)
            if shorter is None:
                answer = f" and {kept} kept for the answer" if kept else ""
                why = f"{row.length} tokens with media{answer}; model.language.max_positions is {limit}"
                catalog.add_bad(split, placed.bad(why))
                continue
            sample, note = shorter.sample, shorter.note
            row = encode(held_out, sample)
        whole = encode(False, sample) if held_out else row
        yield Tokenised(placed, sample, row, whole if whole.length <= limit else None, note)


def _encode(
    names: list[str], counts: list[int], template: Template, prompt_only: bool, sample: Sample
) -> PreparedSample:
    """``names`` and ``counts``: of the whole sample's media; one that was shortened has the last of them."""
    gone = len(names) - len(sample.media)
    if prompt_only:
        ids, labels = template.encode_prompt(sample), []
    else:
        encoded = template.encode_sample(sample)
        ids, labels = encoded.ids, encoded.labels
    return PreparedSample(sample.id, sample.task, sample.group, ids, labels, names[gone:], counts[gone:])


def _fits(encode: Callable[[bool, Sample], PreparedSample], prompt_only: bool, room: int, part: Sample) -> bool:
    return encode(prompt_only, part).length <= room


def make_run_template(config: Config, catalog: Catalog, pretrained: PretrainedTokenizer | None, path: Path) -> Template:
    """With the pretrained language model's tokenizer or one trained on the texts, which is then saved at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pretrained is not None:
        pretrained.tokenizer.save(str(path))
        return make_template(config.data.template, *pretrained)
    texts = sorted({text for entry in catalog.samples("train") for turn in entry.placed.sample.turns for text in turn})
    train_tokenizer(texts, config.model.language.vocab_size).save(str(path))
    return make_template(config.data.template, load_tokenizer(path))
