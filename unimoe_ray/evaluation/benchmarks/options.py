"""Questions with options A, B, ...: MMBench, SEED-Bench, and the spoken ones of Uni-MoE, which come in its own JSON
format: MMBench-Audio, RACE-Audio, English High School Listening."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unimoe_ray.data.schema import PLACEHOLDER, BadSample, Media, parse_record
from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation.benchmarks import files, scores, submit
from unimoe_ray.evaluation.benchmarks.base import GREEDY, SAMPLED, SHORT, Answered, Benchmark, Question
from unimoe_ray.evaluation.benchmarks.files import Entry, Folder
from unimoe_ray.evaluation.choices import choose, letters, options_in

# Of MMBench: rows from here on are other rows with their options moved round.
MOVED = 1_000_000
# A shorter picture is the index of the row that has it.
_SHORTEST_PICTURE = 64
_COLUMNS = "ABCDEFGH"
_FIELDS = {"image": "image", "voice": "audio"}


def _mmbench(folder: Folder, split: str) -> Iterator[Question]:
    pictures: dict[int, str] = {}
    for row in files.table(folder.one(f"mmbench_{split}*.tsv", f"MMBench_{split.upper()}*.tsv"), "\t"):
        index, cell = row.number("index"), row.text("image")
        if len(cell) <= _SHORTEST_PICTURE:
            cell = pictures.get(row.number("image"), "")
            if not cell:
                raise UsageError(f"{row.file}, {row.where}: the row {row['image']}, whose picture it has, is not above")
        elif index < MOVED:
            pictures[index] = cell
        options = _options(row)
        answer = row.values.get("answer", "")
        yield Question(
            str(index),
            mmbench_prompt(row.text("question"), options, row.values.get("hint", "")),
            (Media("image", (f"data:image/jpeg;base64,{cell}",)),),
            (answer,) if answer else (),
            group=str(index % MOVED),
            options=options,
            facts={"asked": index % MOVED, "first": index < MOVED}
            | {key: row.values.get(key, "") for key in ("question", "category", "l2-category")},
        )


def mmbench_prompt(question: str, options: tuple[str, ...], hint: str) -> str:
    """As in Uni-MoE's data_sample/MMBench1.1.json."""
    listed = "\n".join(f"{letter}.{option}" for letter, option in zip(letters(len(options)), options, strict=True))
    first = f"Hint: {hint}\n" if _is_there(hint) else ""
    return (
        f"<image>\n{first}Look at the image and select the correct answer to the following question:\n{question}\n"
        f"Options:\n{listed}\n{SHORT}"
    )


def _options(row: Entry) -> tuple[str, ...]:
    row.text("A")
    options = [row.values.get(letter, "") for letter in _COLUMNS]
    while options and not _is_there(options[-1]):
        options.pop()
    return tuple(options)


def _is_there(cell: str) -> bool:
    return cell.strip().lower() not in ("", "nan")


def _seed(folder: Folder, split: str) -> Iterator[Question]:
    """Videos are files named by ``data_id``, cut to the segment; or, as LLaVA-1.5 takes them, one frame of each."""
    image = folder.media_in("SEED-Bench-image")
    frames = folder.media_in("SEED-Bench-video-image")
    has_frames = (folder.media / "SEED-Bench-video-image").is_dir()
    video = folder.media_in("SEED-Bench-video")
    for entry in files.json_list(folder.one("SEED-Bench.json"), "questions"):
        kind = entry.text("data_type")
        if split != "all" and kind != split:
            continue
        name = str(entry["question_id"])
        options = tuple(entry.text(f"choice_{letter}") for letter in "abcd")
        if kind == "image":
            media = Media("image", (image(entry.text("data_id")),))
        elif has_frames:
            media = Media("image", (frames(f"{name}.png"),))
        else:
            media = Media("video", (video(entry.text("data_id")),))
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        yield Question(
            name,
            f"<{media.kind}>\n{entry.text('question')}\n{listed}\n"
            "Answer with the option's letter from the given choices directly.",
            (media,),
            (entry.text("answer"),),
            group=entry.text("data_id"),
            options=options,
            facts={"type": entry["question_type_id"]},
        )


def _spoken(*patterns: str) -> Callable[[Folder, str], Iterator[Question]]:
    """Files of Uni-MoE's own records, one or several; ``category`` of a record, else its file, is its subset."""

    def read(folder: Folder, split: str) -> Iterator[Question]:
        found = folder.many(*patterns)
        for file in found:
            for index, entry in enumerate(files.json_list(file)):
                yield _official(entry, index, folder.media, file.stem if len(found) > 1 else "")

    return read


def _official(entry: Entry, index: int, media: Path, prefix: str) -> Question:
    """A record of the official evaluation format. Media without a placeholder come first, a line each."""

    def locate(field: str, path: str) -> str:
        if field == "image" and len(path) >= 200:  # the file itself, as base64
            return f"data:image/jpeg;base64,{path}"
        return path if Path(path).is_file() else str(media / path.lstrip("/"))

    record = dict(entry.values)
    record["conversations"] = _with_placeholders(entry)
    said = [value for key in ("gt", "answer") if (value := record.pop(key, None))]
    try:
        sample = parse_record(record, index, "speech", allow_empty_answer=True, locate=locate)
    except BadSample as error:
        raise UsageError(f"{entry.file}, {entry.where}: {error}") from None
    if len(sample.turns) != 1:
        raise UsageError(f"{entry.file}, {entry.where}: {len(sample.turns)} questions; one is wanted")
    prompt, given = sample.turns[0]
    options = options_in(prompt)
    wanted = said[0] if said else given
    references = tuple(str(x) for x in wanted) if isinstance(wanted, list) else ((str(wanted),) if wanted else ())
    if options and references:
        chosen = tuple(choose(reference, options) for reference in references)
        if None in chosen:
            raise UsageError(f"{entry.file}, {entry.where}: the answer {references[0]!r} is none of the options")
        references = chosen
    category = record.get("category")
    subset = category[0] if isinstance(category, list) and category else category
    recording = next((item.paths[0] for item in sample.media if item.kind == "speech"), sample.id)
    return Question(
        f"{prefix}-{sample.id}" if prefix else sample.id,
        prompt,
        sample.media,
        references,
        group=recording,
        options=options,
        facts={"subset": str(subset or entry.file.stem)},
    )


def _count(media: Any) -> int:
    """Files in a field: one as text, several as a list."""
    return len(media) if isinstance(media, list) else int(bool(media))


def _with_placeholders(entry: Entry) -> Any:
    conversations = entry["conversations"]
    if not (isinstance(conversations, list) and conversations and isinstance(conversations[0], Mapping)):
        return conversations
    first = conversations[0]
    text = first.get("value")
    if not isinstance(text, str) or PLACEHOLDER.search(text):
        return conversations
    missing = [f"<{placeholder}>\n" * _count(entry.values.get(field)) for field, placeholder in _FIELDS.items()]
    return [{**first, "value": "".join(missing) + text}, *conversations[1:]]


def _seed_result(a: Answered) -> dict[str, object]:
    return {"question_id": a.question.id, "prediction": choose(a.answer, a.question.options) or a.answer}


BENCHMARKS = (
    Benchmark(
        "mmbench",
        "MMBench",
        "mmbench_SPLIT_20230712.tsv or MMBench_SPLIT_*.tsv, with the pictures in it",
        ("dev", "test"),
        GREEDY,
        _mmbench,
        scores.choice_score(circular=True),
        submit.mmbench,
    ),
    Benchmark(
        "seed",
        "SEED-Bench",
        "SEED-Bench.json; SEED-Bench-image/, and SEED-Bench-video/ or SEED-Bench-video-image/ (QUESTION_ID.png)",
        ("all", "image", "video"),
        GREEDY,
        _seed,
        scores.choice_score("type"),
        submit.json_lines("seed.jsonl", _seed_result),
    ),
    Benchmark(
        "mmbench-audio",
        "MMBench-Audio, spoken questions",
        "*MMBench*.json in Uni-MoE's format (image, voice, conversations, answer)",
        ("test",),
        GREEDY,
        _spoken("*[mM][mM][bB]ench*.json", "*.json"),
        scores.choice_score(),
    ),
    Benchmark(
        "race-audio",
        "RACE-Audio, spoken passages",
        "*middle*.json, *high*.json in Uni-MoE's format (voice, conversations, answer or gt)",
        ("test",),
        SAMPLED,
        _spoken("*[rR][aA][cC][eE]*.json", "*.json"),
        scores.choice_score("subset"),
    ),
    Benchmark(
        "ehsl",
        "English High School Listening",
        "high_exam.json in Uni-MoE's format; recordings in audio/",
        ("test",),
        SAMPLED,
        _spoken("high_exam*.json", "*.json"),
        scores.choice_score("subset"),
    ),
)
