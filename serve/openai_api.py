"""The chat completions API: what a request may hold, and the objects of the answer.

What is not supported is refused by name. Extensions: parts ``audio_url`` and ``video_url`` (as vLLM has them), ``kind``
of a sound, ``top_k``, and ``expert_load``.
"""

from __future__ import annotations

import difflib
import json
import time
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from serve.errors import ApiError

# A body of small values would take a hundred times its size in memory. Commas and brackets in texts count too.
MAX_VALUES = 100_000
# Parameters of the real API that this server does not have; others that it does not know are likelier typing errors.
KNOWN_ELSEWHERE = frozenset(
    (
        *("audio", "best_of", "function_call", "functions", "include_obfuscation", "logit_bias", "metadata", "min_p"),
        *("modalities", "name", "parallel_tool_calls", "prediction", "prompt_cache_key", "reasoning_effort", "refusal"),
        *("repetition_penalty", "safety_identifier", "service_tier", "store", "tool_call_id", "tool_calls"),
        *("tool_choice", "tools", "verbosity", "web_search_options"),
    )
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(description="data: URL, or a remote URL of an allowed host")
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    url: str


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoUrl


SoundKind = Annotated[
    Literal["speech", "sound"] | None,
    Field(description="what kind of sound it is, and so which encoder hears it; the server's default if not given"),
]


class AudioUrl(Strict):
    url: str
    kind: SoundKind = None


class AudioPart(Strict):
    type: Literal["audio_url"]
    audio_url: AudioUrl


class InputAudio(Strict):
    data: str = Field(description="base64")
    format: Literal["wav", "mp3", "flac", "ogg", "m4a", "webm", "mp4"]
    kind: SoundKind = None


class InputAudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart | InputAudioPart, Field(discriminator="type")]


def _form(value: Any) -> str | None:
    return {list: "several", str: "one"}.get(type(value))


def _one_or(several: str) -> Discriminator:
    """A string or a list, told apart by their type, so that an error is about the one that it is."""
    return Discriminator(
        _form, custom_error_type="form", custom_error_message=f"Input should be a string or a list of {several}"
    )


Content = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[Part], Field(min_length=1), Tag("several")], _one_or("parts")
]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopString, Tag("one")] | Annotated[list[StopString], Field(max_length=4), Tag("several")],
    _one_or("strings"),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions. A parameter that is null has its default."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="default: what the context has room for")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    temperature: float | None = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(0, ge=0, le=2**31, description="0: all")
    n: int | None = Field(1, ge=1, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = Field(None, description="up to 4 strings before which the answer ends")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, max_length=256, description="written to the server's log beside the request id")
    expert_load: bool | None = Field(
        False, description="report which experts the tokens of each modality were routed to"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in body.items() if value is not None or name not in optional}

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are both given and differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse_chat(body: bytes) -> ChatRequest:
    """Raises ApiError 400 that names the part of the request at fault."""
    letters = np.frombuffer(body, np.uint8)
    if sum(np.count_nonzero(letters == sign) for sign in b",[{") > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} commas and brackets", code="invalid_json")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False, include_input=False)[0], body) from None


def _explain(error: Any, body: bytes) -> ApiError:
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    param = _path(error["loc"], json.loads(body), error["type"] in ("missing", "extra_forbidden"))
    name = str(error["loc"][-1]) if param else ""
    message = error["msg"].removeprefix("Value error, ")[:500]
    if error["type"] == "extra_forbidden":
        message = f"'{name}' is not supported by this server" if name in KNOWN_ELSEWHERE else _unknown(name, param)
        return ApiError(400, message, param[:200], "unsupported_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param, "missing_required_parameter")
    return ApiError(400, f"{param}: {message}" if param else message, param or None, "invalid_value")


def _unknown(name: str, param: str) -> str:
    near = difflib.get_close_matches(name[:80], ChatRequest.model_fields, n=1) if name == param else []
    return f"unknown parameter '{param[:200]}'" + (f"; did you mean '{near[0]}'?" if near else "")


def _path(loc: tuple[int | str, ...], here: Any, is_name: bool) -> str:
    """The dotted place in the body; pydantic puts the names of union members between its parts. ``is_name``: the last
    part is the name of a parameter, there or missing."""
    parts = []
    for number, part in enumerate(loc):
        inside = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if inside or (is_name and number == len(loc) - 1):
            parts.append(str(part))
            here = here[part] if inside else None
    return ".".join(parts)


def completion(request_id: str, model: str, **rest: Any) -> dict[str, Any]:
    """The outer object of an answer in one piece."""
    head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "created": int(time.time()), "model": model}
    return head | rest


def chunk(request_id: str, model: str, created: int, choices: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """One event of a streamed answer."""
    head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion.chunk", "created": created, "model": model}
    return head | {"choices": choices} | rest


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "unimoe_ray"}
