"""From chat messages to turns with media placeholders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import ApiError
from serve.openai_api import AudioPart, ChatRequest, ImagePart, InputAudioPart, Message, Part, TextPart, VideoPart
from unimoe_ray.config.serving import LimitsConfig
from unimoe_ray.data.prompt import plain_text
from unimoe_ray.inference.request import SamplingParams

MAX_TEXT = 1_000_000  # characters of all texts; to find that a model can't take 50 MB, it would take minutes
_SOUNDS = {"speech": "speech", "sound": "audio"}


@dataclass(frozen=True)
class MediaPart:
    """kind: image, video, audio or speech; name: its place in the request; one of ``url`` and ``base64`` is given."""

    kind: str
    name: str
    url: str | None = None
    base64: str | None = None


@dataclass(frozen=True)
class Conversation:
    """turns: (question with placeholders, answer), the last answer empty; media in the order of the placeholders."""

    turns: tuple[tuple[str, str], ...]
    media: tuple[MediaPart, ...]


def read_conversation(request: ChatRequest, voice_as: str, limits: LimitsConfig) -> Conversation:
    """Questions and answers in turn. Instructions (system, developer) go before the question that follows them.
    ``voice_as``: the kind of sounds that do not say theirs. Raises ApiError 400."""
    if len(request.messages) > limits.max_messages:
        raise _bad(f"{len(request.messages)} messages; at most {limits.max_messages} are allowed", "messages")
    turns: list[tuple[str, str]] = []
    media: list[MediaPart] = []
    question: list[str] = []
    is_asked = False  # by a user, not by instructions alone
    for number, message in enumerate(request.messages):
        where = f"messages.{number}.content"
        if message.role != "assistant":
            texts = _question(message, where, voice_as, media)
            is_asked |= message.role == "user" and any(text.strip() for text in texts)
            question += texts
            continue
        answer = _text_only(message, where)
        if question:
            turns.append(("\n".join(question), answer))
            question, is_asked = [], False
        elif turns:  # An answer in several messages.
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{answer}")
        else:
            raise _bad("the conversation begins with an answer; a user message must come first", where)
    if request.messages[-1].role != "user":
        raise _bad("the last message must be the user's", f"messages.{len(request.messages) - 1}.role")
    if not is_asked:
        raise _bad("nothing to answer: give text or a media file", f"messages.{len(request.messages) - 1}.content")
    if len(media) > limits.max_media:
        raise _bad(f"{len(media)} media files; at most {limits.max_media} are allowed", "messages")
    turns.append(("\n".join(question), ""))
    if (size := sum(len(text) for turn in turns for text in turn)) > MAX_TEXT:
        raise _bad(f"{size} characters of text; at most {MAX_TEXT} are allowed", "messages")
    return Conversation(tuple(turns), tuple(media))


def sampling_params(request: ChatRequest) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=request.stops(),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
    )


def _question(message: Message, where: str, voice_as: str, media: list[MediaPart]) -> list[str]:
    """The texts of a question, placeholders for its files, which are added to ``media``."""
    if isinstance(message.content, str):
        return [plain_text(message.content)]
    texts = []
    for number, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts.append(plain_text(part.text))
            continue
        if message.role != "user":
            raise _bad(f"media belong to the user's messages, not to those of '{message.role}'", f"{where}.{number}")
        media.append(_READERS[type(part)](part, f"{where}.{number}", voice_as))
        texts.append(f"<{media[-1].kind}>")
    return texts


def _text_only(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return plain_text(message.content)
    for number, part in enumerate(message.content):
        if not isinstance(part, TextPart):
            raise _bad("an answer holds text only", f"{where}.{number}")
    return plain_text("\n".join(part.text for part in message.content))


def _sound(kind: str | None, voice_as: str) -> str:
    return voice_as if kind is None else _SOUNDS[kind]


_READERS: dict[type, Callable[[Part, str, str], MediaPart]] = {
    ImagePart: lambda part, name, _: MediaPart("image", name, url=part.image_url.url),
    VideoPart: lambda part, name, _: MediaPart("video", name, url=part.video_url.url),
    AudioPart: lambda part, name, voice: MediaPart(_sound(part.audio_url.kind, voice), name, url=part.audio_url.url),
    InputAudioPart: lambda part, name, voice: MediaPart(
        _sound(part.input_audio.kind, voice), name, base64=part.input_audio.data
    ),
}


def _bad(message: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param, "invalid_value")
