"""The official JSON conversation format, validated record by record."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

PLACEHOLDER = re.compile(r"<(image|video|audio|speech)>")
_SURROGATES = re.compile("[\ud800-\udfff]")
_IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
Kind = Literal["image", "video", "audio", "speech"]
Locate = Callable[[str, str], str]


class BadSample(Exception):
    """The reason why a record can't be used; it goes to quarantine, the run goes on."""


def _is_unicode(value: Any) -> Any:
    """JSON can hold half of a surrogate pair, which no file or tokenizer takes. Bytes of a file that are not UTF-8
    come as such halves (Python's surrogateescape)."""
    if isinstance(value, str) and not value.isascii() and (found := _SURROGATES.findall(value)):
        if all("\udc80" <= character <= "\udcff" for character in found):
            raise ValueError("has bytes that are not UTF-8")
        raise ValueError("has half of a surrogate pair, which is no character")
    return value


Text = Annotated[str, AfterValidator(_is_unicode)]


class Turn(BaseModel):
    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: Text


class _Record(BaseModel):
    """``image, audio, speech, voice``: a path or a list of paths. ``video``: a video file, a list of image files
    (ONE video), a list of video files, or a list of lists of image files. Unknown keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: Annotated[str | int | None, AfterValidator(_is_unicode)] = None
    task: Text = "default"
    conversations: list[Turn] = Field(min_length=1)
    image: str | list[str] = Field(default_factory=list)
    audio: str | list[str] = Field(default_factory=list)
    speech: str | list[str] = Field(default_factory=list)
    voice: str | list[str] = Field(default_factory=list)
    video: str | list[str] | list[list[str]] = Field(default_factory=list)

    @field_validator("image", "audio", "speech", "voice", "video")
    @classmethod
    def _paths(cls, value: str | list) -> str | list:
        if isinstance(value, list):
            if [] in value:
                raise ValueError("a video without frames")
            for entry in value:
                cls._paths(entry)
        elif not value:
            raise ValueError("an empty path")
        elif "\0" in value:
            raise ValueError("a path with a null character")
        return _is_unicode(value)


@dataclass(frozen=True)
class Media:
    """One media file of a sample; a video given as frame images has several paths."""

    kind: Kind
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A valid record. ``turns`` alternate question and answer; ``media`` follow their placeholders' order."""

    id: str
    task: str
    turns: tuple[tuple[str, str], ...]
    media: tuple[Media, ...]
    extra: dict[str, Any]

    @property
    def group(self) -> str:
        """The modality group: the kinds of media in it, such as ``image+speech``, or ``text``."""
        return "+".join(sorted({m.kind for m in self.media})) or "text"


def parse_record(
    record: Any,
    index: int,
    voice_as: Kind = "speech",
    allow_empty_answer: bool = False,
    *,
    held_out: bool = False,
    task: str | None = None,
    locate: Locate = lambda field, path: path,
) -> Sample:
    """One JSON record to a Sample. Raises BadSample with a one-line reason.

    index stands for a missing id, ``task`` for a missing task. locate(field, path) gives a media file's location.
    Official evaluation records (``held_out``) leave the last answer empty and have it in ``gt`` or ``answer``, and
    their id in ``question_id``.
    """
    try:
        parsed = _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadSample(f"{_where(first['loc'], record)}: {first['msg'].removeprefix('Value error, ')}") from None
    extra = parsed.model_extra or {}
    if held_out:
        _fill_answer(parsed.conversations[-1], extra)
    turns = _pair_turns(parsed.conversations, allow_empty_answer)
    media = _match_placeholders(turns, _files(parsed, voice_as, locate))
    sample_id = next((i for i in (parsed.id, extra.get("question_id")) if isinstance(i, str | int)), index)
    name = parsed.task if task is None or "task" in parsed.model_fields_set else task
    return Sample(_unicode_or_bad("id", str(sample_id)), name, turns, media, extra)


def _where(loc: tuple[str | int, ...], value: Any) -> str:
    """The place of an error; pydantic adds the names of types where several are allowed."""
    parts = []
    for part in loc:
        if not isinstance(value, dict) and not (isinstance(value, list) and part in range(len(value))):
            break
        parts.append(str(part))
        value = value.get(part) if isinstance(value, dict) else value[part]
    return ".".join(parts) or "record"


def _fill_answer(last: Turn, extra: dict[str, Any]) -> None:
    expected = extra.get("gt", extra.get("answer"))
    if last.speaker == "gpt" and not last.value.strip() and isinstance(expected, str):
        last.value = _unicode_or_bad("gt", expected)


def _unicode_or_bad(field: str, text: str) -> str:
    try:
        return _is_unicode(text)
    except ValueError as error:
        raise BadSample(f"{field}: {error}") from None


def _pair_turns(conversation: list[Turn], allow_empty_answer: bool) -> tuple[tuple[str, str], ...]:
    if len(conversation) % 2 or any(t.speaker != ("human", "gpt")[i % 2] for i, t in enumerate(conversation)):
        raise BadSample("conversations: turns must alternate human and gpt, human first, gpt last")
    pairs = tuple((q.value, a.value) for q, a in zip(conversation[::2], conversation[1::2], strict=True))
    for number, (_, answer) in enumerate(pairs, start=1):
        if not answer.strip() and not allow_empty_answer:
            raise BadSample(f"conversations: answer {number} is empty")
        if PLACEHOLDER.search(answer):
            raise BadSample(f"conversations: answer {number} has a media placeholder")
    return pairs


def _files(record: _Record, voice_as: Kind, locate: Locate) -> dict[str, list[Media]]:
    """Files by the placeholder that they answer."""

    def each(field: str, kind: Kind) -> list[Media]:
        value = getattr(record, field)
        return [Media(kind, (locate(field, path),)) for path in ([value] if isinstance(value, str) else value)]

    if record.voice and record.audio:
        raise BadSample("voice and audio are both given; <audio> placeholders would be ambiguous")
    files = {name: each(name, name) for name in ("image", "audio", "speech")}
    files["audio"] += each("voice", voice_as)
    files["video"] = [Media("video", tuple(locate("video", path) for path in paths)) for paths in _videos(record.video)]
    return files


def _videos(value: str | list[str] | list[list[str]]) -> list[list[str]]:
    """The files of each video."""
    if isinstance(value, str):
        return [[value]]
    if value and isinstance(value[0], list):
        return value
    return [value] if value and all(_is_image(path) for path in value) else [[path] for path in value]


def _is_image(path: str) -> bool:
    return path.startswith("data:image/") or path.lower().endswith(_IMAGE_NAMES)


def _match_placeholders(turns: tuple[tuple[str, str], ...], files: dict[str, list[Media]]) -> tuple[Media, ...]:
    left = {name: list(items) for name, items in files.items()}
    media = []
    for question, _ in turns:
        for name in PLACEHOLDER.findall(question):
            if not left[name]:
                raise BadSample(f"more <{name}> placeholders than files ({len(files[name])})")
            media.append(left[name].pop(0))
    for name, rest in left.items():
        if rest:
            raise BadSample(f"{len(files[name])} files for {len(files[name]) - len(rest)} <{name}> placeholders")
    return tuple(media)
