"""From records and media files to prepared samples and stored features, with bad data in quarantine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from unimoe_ray.config import Config
from unimoe_ray.config.data import SPLITS, DataConfig, SourceConfig
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.encode import EncodeSettings, SoftTokens, count_tokens, encode_missing
from unimoe_ray.data.gather import Progress, Tokenised, make_run_template, read_into, tokenised
from unimoe_ray.data.locations import shown
from unimoe_ray.data.pretrained import PretrainedTokenizer, load_pretrained_tokenizer
from unimoe_ray.data.samples import SampleWriter, Source, Span
from unimoe_ray.data.schema import Sample
from unimoe_ray.data.sizes import chosen, store_sizes
from unimoe_ray.data.sources import RecordFile, fingerprint, record_files
from unimoe_ray.data.store import mended
from unimoe_ray.data.stream import Stream, write_places
from unimoe_ray.errors import UnimoeError

# Samples of dev and test end where the answer is to begin; these are dev's with it, for a loss while training.
VALIDATION = "validation"
SHORTENED = "shortened.jsonl"
PLACES = "media.arrow"  # where media lie that are streamed


@dataclass
class Prepared:
    """What ``prepare`` left: samples per split and task, quarantined and shortened records (``SHORTENED`` says how),
    media files encoded this time."""

    samples: dict[str, dict[str, int]] = field(default_factory=dict)
    quarantined: int = 0
    shortened: int = 0
    media: int = 0
    encoded: int = 0


def data_dir(config: Config) -> Path:
    return config.run_dir / "prepared"


def tokenizer_path(config: Config) -> Path:
    return data_dir(config) / "tokenizer.json"


def source(config: Config, split: str, settings: EncodeSettings | None = None) -> Source:
    """Where one split's prepared samples and features lie. ``settings`` make those features that are streamed, which
    are the train split's only: held-out ones are read by processes that have no towers, and again and again.

    Raises UnimoeError when they were not prepared.
    """
    path = data_dir(config) / "prepared.json"
    if not path.is_file():
        raise UnimoeError(
            f"{data_dir(config)}: no prepared data; run 'unimoe prepare' with the same configuration first"
        )
    found = json.loads(path.read_text())
    spans = tuple(Span(*span) for span in found.get("spans", {}).get(split, ()))
    folder, stream = data_dir(config).resolve(), None
    if settings is not None and split == "train" and found.get("streamed"):
        stream = Stream(str(folder / PLACES), replace(settings, gpu=config.data.stream_gpus > 0, threads=1))
    return Source(str(folder / f"{split}.arrow"), found["partitions"], spans, stream)


def prepare(
    config: Config,
    sources: list[SourceConfig],
    settings: EncodeSettings,
    soft_tokens: SoftTokens,
    workers: int,
    on_progress: Progress,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Validate, encode and tokenise the records of ``sources``. What is already there is not done again, and it may be
    killed at any time. One at a time may use a run folder; any number share the feature store.

    soft_tokens(kind, window lengths) tells how many soft tokens a file becomes; ``say`` gets what is worth a line.
    Raises UsageError for sources that can't be read, UnimoeError past ``data.max_bad_fraction``.
    """
    language = config.model.language
    pretrained = None
    if language.pretrained is not None:
        pretrained = load_pretrained_tokenizer(language.pretrained, config.data.template)
    files = record_files(sources)
    stamp = _stamp(config, files, settings, pretrained)
    done = data_dir(config) / "prepared.json"
    if done.is_file():
        found = json.loads(done.read_text())
        arrows = [data_dir(config) / f"{split}.arrow" for split in (*SPLITS, VALIDATION)]
        # ``mended`` is not in the files of earlier versions, whose store need only be there.
        whole = {path: mended(Path(path)) for path in found["partitions"].values()}
        there = all(path.exists() for path in arrows) and -1 not in whole.values()
        if found["stamp"] == stamp and there and found.get("mended", whole) == whole:
            return Prepared(**found["summary"] | {"encoded": 0})
    # From here on the files below belong to neither the old nor the new configuration, until all are written.
    done.unlink(missing_ok=True)
    for left in data_dir(config).glob(".*"):  # by a run that was killed
        left.unlink()

    partitions = {kind: settings.partition(kind) for kind in settings.fingerprints}
    with Catalog(data_dir(config) / ".catalog.sqlite", config.data.max_bytes) as catalog:
        records = read_into(catalog, files, config, on_progress)
        summary = Prepared(media=catalog.count("media"))
        # Encoding takes long: if there is too much wrong already, it is not begun.
        quarantine(config, catalog, records)
        todo = data_dir(config) / ".todo.arrow"
        gigabytes = sum(size.bytes(config.data.store_dtype) for size in store_sizes(catalog, settings)) / 1e9
        streamed = chosen(config.data.features, gigabytes, config.data.store_max_gb) == "stream"
        if streamed:
            say(
                f"features are made on the fly, as data.features={config.data.features}: stored, they would be "
                f"{gigabytes:.3f} GB (data.store_max_gb={config.data.store_max_gb:g})"
            )
            count_tokens(catalog, settings, soft_tokens, workers, todo, on_progress)
            write_places(data_dir(config) / PLACES, catalog.places())
        summary.encoded = encode_missing(catalog, settings, soft_tokens, workers, todo, on_progress, say)
        template = make_run_template(config, catalog, pretrained, tokenizer_path(config))
        spans: dict[str, list[Span]] = {}
        used: set[str] = set()
        weights = [source.weight for source in sources]
        with open(config.run_dir / SHORTENED, "w", encoding="utf-8") as shortened:
            for split in SPLITS:
                rows = tokenised(config, catalog, split, template, catalog.tokens)
                spans[split], tasks, kinds, notes = _write_split(config, split, rows, weights)
                shortened.writelines(json.dumps(note) + "\n" for note in notes)
                summary.shortened += len(notes)
                summary.samples[split] = dict(sorted(tasks.items()))
                used |= kinds
        quarantine(config, catalog, records)
        summary.quarantined = catalog.count("bad")
    found = {
        "stamp": stamp,
        "streamed": streamed,
        "partitions": {kind: str(partitions[kind]) for kind in sorted(used)},
        "mended": {str(partitions[kind]): mended(partitions[kind]) for kind in sorted(used)},
        "spans": {split: [astuple(span) for span in spans[split]] for split in SPLITS},
        "summary": asdict(summary),
    }
    temporary = done.with_name(f".{done.name}")
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(done)
    return summary


def held_out_records(config: Config, split: str, rows: set[int]) -> dict[int, dict[str, Any]]:
    """What was asked in some rows of a held-out split, by row number: id, task, question, answer, media (kind, path).

    Raises UnimoeError where they are not there.
    """
    path = _asked_path(config, split)
    if not path.is_file():
        raise UnimoeError(f"{path}: not there; run 'unimoe prepare' with the same configuration first")
    with open(path, encoding="utf-8") as lines:
        return {row: json.loads(line) for row, line in enumerate(lines) if row in rows}


def _write_split(
    config: Config, split: str, rows: Iterator[Tokenised], weights: list[float]
) -> tuple[list[Span], Counter[str], set[str], list[dict[str, str]]]:
    """The prepared samples, of a held-out split also what was asked, of dev also with the answers.

    Returns which rows are of which source, the number of samples by task, the kinds of media, and what was shortened.
    """
    spans: list[Span] = []
    tasks: Counter[str] = Counter()
    kinds: set[str] = set()
    notes: list[dict[str, str]] = []
    folder, source = data_dir(config), None
    with ExitStack() as files:
        writer = files.enter_context(SampleWriter(folder / f"{split}.arrow"))
        answered = files.enter_context(SampleWriter(folder / f"{VALIDATION}.arrow")) if split == "dev" else None
        asked = files.enter_context(open(_asked_path(config, split), "w")) if split != "train" else None
        for number, item in enumerate(rows):
            writer.add(item.row)
            if answered is not None and item.whole is not None:
                answered.add(item.whole)
            if asked is not None:
                asked.write(json.dumps(_asked(item.placed.sample)) + "\n")
            if item.placed.source != source:
                source = item.placed.source
                spans.append(Span(number, weights[source]))
            tasks[item.row.task] += 1
            kinds |= {name.split("/")[0] for name in item.row.media}
            if item.note is not None:
                notes.append({"split": split, "id": item.row.id, "what": item.note})
    return spans, tasks, kinds, notes


def _asked(sample: Sample) -> dict[str, Any]:
    question, answer = sample.turns[-1]
    media = [{"kind": item.kind, "path": shown(item.paths[0])} for item in sample.media]
    return {"id": sample.id, "task": sample.task, "question": question, "answer": answer, "media": media}


def _asked_path(config: Config, split: str) -> Path:
    return data_dir(config) / f"{split}.jsonl"


def quarantine(config: Config, catalog: Catalog, records: int) -> None:
    """Write quarantine.jsonl of the run. Raises UnimoeError if too much of that many records is bad."""
    path = config.run_dir / "quarantine.jsonl"
    first = None
    with open(path, "w", encoding="utf-8") as file:
        for entry in catalog.bad():
            first = first or entry["reason"]
            file.write(json.dumps(entry) + "\n")
    bad = catalog.count("bad")
    if records and bad > config.data.max_bad_fraction * records:
        raise UnimoeError(
            f"{bad} of {records} records are bad, more than data.max_bad_fraction="
            f"{config.data.max_bad_fraction}; reasons in {path} (first: {first})"
        )


def _stamp(
    config: Config, files: list[RecordFile], settings: EncodeSettings, pretrained: PretrainedTokenizer | None
) -> str:
    """A hash of all that decides what is prepared."""
    data, language = config.data, config.model.language
    parts = [
        *(data.voice_as, data.max_bad_fraction, data.max_pixels, data.max_seconds, data.max_bytes),
        *(language.vocab_size, language.max_positions, config.evaluation.max_new_tokens),
        config.model.video.model_dump(),
        settings.fingerprints,
        fingerprint(files),
        [source.weight for source in data.sources],
    ]
    if data.too_long != "refuse":
        parts.append(data.too_long)
    if data.store_dtype != "fp16":
        parts.append(data.store_dtype)
    if (data.features, data.store_max_gb) != ("auto", DataConfig().store_max_gb):
        parts += [data.features, data.store_max_gb]
    if pretrained is not None:
        parts += [data.template, pretrained.tokenizer.to_str(), pretrained.legacy]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
