"""From JSON records and media files to prepared samples and stored features, with bad data in quarantine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unimoe_ray.config import Config
from unimoe_ray.data.encode import EncodeSettings, encode_missing
from unimoe_ray.data.pretrained import PretrainedTokenizer, load_pretrained_tokenizer
from unimoe_ray.data.samples import PreparedSample, Source, write_samples
from unimoe_ray.data.schema import BadSample, Media, Sample, parse_record
from unimoe_ray.data.shorten import Shortened, shorten
from unimoe_ray.data.store import FeatureStore, content_key, partition_dir
from unimoe_ray.data.template import Template, make_template
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from unimoe_ray.errors import UnimoeError

SPLITS = ("train", "dev", "test")
# Samples of dev and test end where the answer is to begin; these are dev's with it, for a loss while training.
VALIDATION = "validation"
SHORTENED = "shortened.jsonl"


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


def source(config: Config, split: str) -> Source:
    """Where one split's prepared samples and features lie. Raises UnimoeError when they were not prepared."""
    path = data_dir(config) / "prepared.json"
    if not path.is_file():
        raise UnimoeError(
            f"{data_dir(config)}: no prepared data; run 'unimoe prepare' with the same configuration first"
        )
    return Source(str((data_dir(config) / f"{split}.arrow").resolve()), json.loads(path.read_text())["partitions"])


def prepare(
    config: Config,
    root: Path,
    settings: EncodeSettings,
    soft_tokens: Callable[[str, list[int]], int],
    workers: int,
    on_progress: Callable[[str, int, int], None],
) -> Prepared:
    """Validate, encode and tokenise the three splits below ``root``. What is already there is not done again.

    soft_tokens(kind, window lengths) tells how many soft tokens a file becomes.
    Raises UnimoeError past ``data.max_bad_fraction``.
    """
    language = config.model.language
    pretrained = None
    if language.pretrained is not None:
        pretrained = load_pretrained_tokenizer(language.pretrained, config.data.template)
    stamp = _stamp(config, root, settings, pretrained)
    done = data_dir(config) / "prepared.json"
    if done.is_file():
        found = json.loads(done.read_text())
        files = [data_dir(config) / f"{split}.arrow" for split in (*SPLITS, VALIDATION)]
        there = all(Path(path).exists() for path in (*files, *found["partitions"].values()))
        if found["stamp"] == stamp and there:
            return Prepared(**found["summary"] | {"encoded": 0})
    # From here on the files below belong to neither the old nor the new configuration, until all are written.
    done.unlink(missing_ok=True)

    quarantine: list[dict[str, Any]] = []
    samples: dict[str, list[Sample]] = {}
    for split in SPLITS:
        samples[split] = _read_split(root / f"{split}.json", split, config, quarantine)
    records = sum(map(len, samples.values())) + len(quarantine)
    media: dict[str, Media] = {}
    names = {split: _name_media(split, items, media, quarantine) for split, items in samples.items()}
    broken, encoded = encode_missing(media, settings, workers, lambda n, of: on_progress("encoding media", n, of))

    template = _template(config, samples["train"], pretrained)
    partitions = {kind: str(partition_dir(Path(settings.root), kind, f)) for kind, f in settings.fingerprints.items()}
    stores = {kind: FeatureStore(Path(folder)) for kind, folder in partitions.items()}
    summary = Prepared(media=len(media), encoded=encoded)
    used: set[str] = set()
    shortened: list[dict[str, str]] = []
    for split, items in samples.items():
        rows, answered = [], []
        for sample in items:
            reason = _broken_media(names[split].get(sample.id), broken)
            if sample.id not in names[split]:
                continue
            if reason:
                quarantine.append({"split": split, "id": sample.id, "reason": reason})
                continue
            counts = _soft_tokens(names[split][sample.id], stores, soft_tokens)
            tokenise = partial(_tokenise, names[split][sample.id], counts, template, split != "train")
            row = tokenise(sample)
            answer = 0 if split == "train" else config.evaluation.max_new_tokens
            if row.length + answer > language.max_positions:
                found = _shorter(config, sample, tokenise, answer, keep_turns=split == "train")
                if found is None:
                    kept = f" and {answer} kept for the answer" if answer else ""
                    limit = language.max_positions
                    reason = f"{row.length} tokens with media{kept}; model.language.max_positions is {limit}"
                    quarantine.append({"split": split, "id": sample.id, "reason": reason})
                    continue
                sample = found.sample
                row = tokenise(sample)
                shortened.append({"split": split, "id": sample.id, "what": found.note})
            rows.append(row)
            if split == "dev":
                whole = _tokenise(names[split][sample.id], counts, template, False, sample)
                answered += [whole] if whole.length <= language.max_positions else []
        write_samples(data_dir(config) / f"{split}.arrow", rows)
        if split == "dev":
            write_samples(data_dir(config) / f"{VALIDATION}.arrow", answered)
        used |= {name.split("/")[0] for row in rows for name in row.media}
        summary.samples[split] = dict(sorted(Counter(row.task for row in rows).items()))
    summary.quarantined, summary.shortened = len(quarantine), len(shortened)
    _write_lines(config.run_dir / SHORTENED, shortened)
    _quarantine(config, quarantine, records)
    partitions = {kind: partitions[kind] for kind in sorted(used)}
    temporary = done.with_name(f".{done.name}")
    temporary.write_text(json.dumps({"stamp": stamp, "partitions": partitions, "summary": asdict(summary)}, indent=1))
    temporary.replace(done)
    return summary


def read_records(path: Path) -> list[Any]:
    """A JSON list. Raises UnimoeError naming the file."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnimoeError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UnimoeError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise UnimoeError(f"{path}: must hold a JSON list of records, not {type(records).__name__}")
    return records


def resolve(sample: Sample, root: Path) -> Sample:
    """The sample with its media paths resolved against ``root``."""
    media = tuple(Media(m.kind, tuple(str(root / path) for path in m.paths)) for m in sample.media)
    return Sample(sample.id, sample.task, sample.turns, media, sample.extra)


def _read_split(path: Path, split: str, config: Config, quarantine: list[dict[str, Any]]) -> list[Sample]:
    samples: dict[str, Sample] = {}
    for index, record in enumerate(read_records(path)):
        try:
            sample = resolve(parse_record(record, index, config.data.voice_as), path.parent)
            if sample.id in samples:
                raise BadSample(f"id '{sample.id}' occurs twice")
            samples[sample.id] = sample
        except BadSample as error:
            shown = record.get("id", index) if isinstance(record, dict) else index
            quarantine.append({"split": split, "id": str(shown), "reason": str(error)})
    return list(samples.values())


def _name_media(
    split: str, samples: list[Sample], media: dict[str, Media], quarantine: list[dict[str, Any]]
) -> dict[str, list[str]]:
    """Content names ``<kind>/<sha256>`` of each sample's files; samples whose files can't be opened: quarantine."""
    keys: dict[tuple[str, ...], str] = {}
    names: dict[str, list[str]] = {}
    for sample in samples:
        try:
            for item in sample.media:
                if item.paths not in keys:
                    keys[item.paths] = content_key(item.paths)
        except OSError as error:
            quarantine.append({"split": split, "id": sample.id, "reason": f"{error.filename}: {error.strerror}"})
            continue
        names[sample.id] = [f"{item.kind}/{keys[item.paths]}" for item in sample.media]
        media.update(zip(names[sample.id], sample.media, strict=True))
    return names


def _broken_media(names: list[str] | None, broken: dict[str, str]) -> str | None:
    return next((broken[name] for name in names or () if name in broken), None)


def _template(config: Config, train: list[Sample], pretrained: PretrainedTokenizer | None) -> Template:
    """With the pretrained language model's tokenizer or one trained on the texts, which is then in the run folder."""
    path = tokenizer_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if pretrained is not None:
        pretrained.tokenizer.save(str(path))
        return make_template(config.data.template, *pretrained)
    texts = sorted({text for sample in train for turn in sample.turns for text in turn})
    train_tokenizer(texts, config.model.language.vocab_size).save(str(path))
    return make_template(config.data.template, load_tokenizer(path))


def _soft_tokens(
    names: list[str], stores: dict[str, FeatureStore], soft_tokens: Callable[[str, list[int]], int]
) -> list[int]:
    counts = []
    for name in names:
        kind, key = name.split("/")
        counts.append(soft_tokens(kind, stores[kind].lengths(key)))
    return counts


def _tokenise(
    names: list[str], counts: list[int], template: Template, prompt_only: bool, sample: Sample
) -> PreparedSample:
    """``names`` and ``counts``: of the whole sample's media; one that was shortened has the last of them."""
    gone = len(names) - len(sample.media)
    names, counts = names[gone:], counts[gone:]
    if prompt_only:
        ids, labels = template.encode_prompt(sample), []
    else:
        encoded = template.encode_sample(sample)
        ids, labels = encoded.ids, encoded.labels
    return PreparedSample(sample.id, sample.task, sample.group, ids, labels, names, counts)


def _shorter(
    config: Config, sample: Sample, tokenise: Callable[[Sample], PreparedSample], answer: int, *, keep_turns: bool
) -> Shortened | None:
    room = config.model.language.max_positions - answer
    if config.data.too_long == "refuse":
        return None
    return shorten(sample, lambda part: tokenise(part).length <= room, keep_turns=keep_turns)


def _quarantine(config: Config, entries: list[dict[str, Any]], total: int) -> None:
    path = config.run_dir / "quarantine.jsonl"
    _write_lines(path, entries)
    if total and len(entries) > config.data.max_bad_fraction * total:
        raise UnimoeError(
            f"{len(entries)} of {total} records are bad, more than data.max_bad_fraction="
            f"{config.data.max_bad_fraction}; reasons in {path} (first: {entries[0]['reason']})"
        )


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _stamp(config: Config, root: Path, settings: EncodeSettings, pretrained: PretrainedTokenizer | None) -> str:
    """A hash of all that decides what is prepared."""
    digest = hashlib.sha256()
    for split in SPLITS:
        path = root / f"{split}.json"
        if not path.is_file():
            raise UnimoeError(f"{path}: no such file; a data folder holds train.json, dev.json and test.json")
        digest.update(path.read_bytes())
    data, language = config.data, config.model.language
    parts = [
        *(data.voice_as, data.max_bad_fraction, data.max_pixels, data.max_seconds),
        *(language.vocab_size, language.max_positions, config.evaluation.max_new_tokens),
        config.model.video.model_dump(),
        settings.fingerprints,
        str(root),
    ]
    if data.too_long != "refuse":
        parts.append(data.too_long)
    if pretrained is not None:
        parts += [data.template, pretrained.tokenizer.to_str(), pretrained.legacy]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()
