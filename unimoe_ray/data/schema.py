"""The official JSON conversation format, validated record by record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

PLACEHOLDER = re.compile(r"<(image|video|audio|speech)>")
Kind = Literal["image", "video", "audio", "speech"]


class BadSample(Exception):
    """The reason why a record can't be used; it goes to quarantine, the run goes on."""


def _is_unicode(value: Any) -> Any:
    """JSON can hold half of a surrogate pair, which no file or tokenizer takes."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
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
    image: str | list[str] = []
    audio: str | list[str] = []
    speech: str | list[str] = []
    voice: str | list[str] = []
    video: str | list[str] | list[list[str]] = []

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


def parse_record(record: Any, index: int, voice_as: Kind = "speech", allow_empty_answer: bool = False) -> Sample:
    """One JSON record to a Sample. Raises BadSample with a one-line reason."""
    try:
        parsed = _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        raise BadSample(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    turns = _pair_turns(parsed.conversations, allow_empty_answer)
    media = _match_placeholders(turns, _files(parsed, voice_as))
    sample_id = str(index if parsed.id is None else parsed.id)
    return Sample(sample_id, parsed.task, turns, media, parsed.model_extra or {})


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


def _files(record: _Record, voice_as: Kind) -> dict[str, list[Media]]:
    """Files by the placeholder that they answer."""

    def each(kind: Kind, value: str | list[str]) -> list[Media]:
        return [Media(kind, (path,)) for path in ([value] if isinstance(value, str) else value)]

    if record.voice and record.audio:
        raise BadSample("voice and audio are both given; <audio> placeholders would be ambiguous")
    files = {name: each(name, getattr(record, name)) for name in ("image", "audio", "speech")}
    files["audio"] += each(voice_as, record.voice)
    files["video"] = _videos(record.video)
    return files


def _videos(value: str | list[str] | list[list[str]]) -> list[Media]:
    if isinstance(value, str):
        return [Media("video", (value,))]
    if value and isinstance(value[0], list):
        return [Media("video", tuple(frames)) for frames in value]
    if value and all(_is_image(path) for path in value):
        return [Media("video", tuple(value))]
    return [Media("video", (path,)) for path in value]


def _is_image(path: str) -> bool:
    return path.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"))


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
