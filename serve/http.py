"""The HTTP side of the ingress: routes, keys, limits, server-sent events, the page. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.chat import MB, Chat, Event, server_sent
from serve.errors import ApiError
from serve.keys import ApiKeys, Caller, Limits, admit
from serve.openai_api import ChatRequest, model_object, parse_chat
from serve.proxy import BODY, SEED
from serve.tracing import Tracer, traceparent
from unimoe_ray import __version__
from unimoe_ray.config.serving import LimitsConfig

logger = logging.getLogger("ray.serve")
UI = Path(__file__).parent / "ui"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}


@dataclass(frozen=True)
class Endpoint:
    """What the routes need. healthy: None, or why no answer can be given; metrics: Prometheus text; answered: told the
    status of every answer."""

    model: str
    chat: Chat
    keys: ApiKeys
    rates: Limits
    tracer: Tracer
    limits: LimitsConfig
    healthy: Callable[[], Awaitable[str | None]]
    metrics: Callable[[], Awaitable[bytes]]
    answered: Callable[[int], None]


def build_app(endpoint: Endpoint) -> FastAPI:
    app = FastAPI(title="unimoe_ray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    created = int(time.time())
    asker = Depends(endpoint.keys.check)
    guarded = [asker]
    errors = _error_responses()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        _log(endpoint, request, error.status, error.message)
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        """Routes and methods that do not exist."""
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        answer = await api_error(request, ApiError(error.status_code, str(error.detail), code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        """The client went before its request was here; nobody reads this answer."""
        return await api_error(request, ApiError(400, "the request broke off"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        """A mistake of ours: Starlette raises the error again once the answer is sent, for the log."""
        return await api_error(request, ApiError(500, f"the server failed ({type(error).__name__})"))

    @app.post(
        "/v1/chat/completions",
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _REQUEST}}}},
        responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}, **errors},
    )
    async def chat_completions(request: Request, caller: Caller = asker) -> Response:
        arrived = time.monotonic()
        await admit(endpoint.rates, caller)
        deadline = arrived + endpoint.limits.request_seconds
        chat = parse_chat(await _body(request, endpoint.limits))

        async def spend(tokens: int) -> None:
            if caller.is_limited:
                await endpoint.rates.spend(caller, tokens)

        with ExitStack() as ending:
            span = ending.enter_context(endpoint.tracer.span("chat", request.headers.get("traceparent", "")))
            task, files = await endpoint.chat.prepare(chat, _request_id(request))
            trace = traceparent(span)
            span.set_attributes({"request_id": task.request_id, "stream": chat.stream, "files": len(files)})
            params = task.params if task.params.seed is not None else replace(task.params, seed=request.scope.get(SEED))
            task = replace(task, params=params, priority=caller.rights.priority, trace=trace)
            files = [replace(file, trace=trace) for file in files]
            who = (f" key={caller.name!r}" if caller.name else "") + (f" user={chat.user!r}" if chat.user else "")

            def log(status: int, text: str) -> None:
                _log(endpoint, request, status, f"{text} in {time.monotonic() - arrived:.3f} s{who}")

            if not chat.stream:
                answer = await endpoint.chat.complete(chat, task, files, deadline, spend)
                log(200, f"{answer['usage']['prompt_tokens']}+{answer['usage']['completion_tokens']} tokens")
                return JSONResponse(answer)
            events = endpoint.chat.stream(chat, task, files, deadline, spend)
            first = await anext(events)  # What fails before the first token is an ordinary error answer.
            lines = _lines(first, events, log, ending.pop_all())
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/v1/models", dependencies=guarded, responses=errors)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(endpoint.model, created)]}

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses=errors)
    async def model(name: str) -> dict[str, Any]:
        if name != endpoint.model:
            raise ApiError(404, f"the model '{name[:80]}' does not exist", "model", "model_not_found")
        return model_object(endpoint.model, created)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: errors[503]})
    async def health() -> dict[str, str]:
        if reason := await endpoint.healthy():
            raise ApiError(503, reason, retry_after=endpoint.limits.retry_after_s)
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(await endpoint.metrics(), media_type="text/plain; version=0.0.4")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(UI / "index.html", headers=PAGE_HEADERS, media_type="text/html")

    @app.head("/ui/{name}", include_in_schema=False)
    @app.get("/ui/{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        path = UI / name
        if path.suffix not in MEDIA_TYPES or path not in UI.iterdir():
            raise ApiError(404, "no such file", code="not_found")
        return FileResponse(path, headers=PAGE_HEADERS, media_type=MEDIA_TYPES[path.suffix])

    app.openapi = lambda: _openapi(app, FastAPI.openapi(app))
    return app


async def _lines(
    first: list[Event],
    events: AsyncIterator[list[Event]],
    log: Callable[[int, str], None],
    ending: ExitStack,
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first is an event too, and then there is no [DONE]. ``ending``: what is
    closed after the last."""
    try:
        yield server_sent(first)
        async for more in events:
            yield server_sent(more)
        log(200, "streamed")
    except ApiError as error:
        log(error.status, f"broke off: {error.message}")
        yield server_sent([error.body()])
    finally:
        await events.aclose()
        ending.close()


async def _body(request: Request, limits: LimitsConfig) -> bytes:
    """Raises ApiError: 413 before more than the limit is kept, 408 when the client is too slow."""
    limit = int(limits.max_body_mb * MB)
    too_large = ApiError(413, f"the request is larger than {limits.max_body_mb:g} MB", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    if BODY in request.scope:
        return request.scope[BODY]
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.request_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {limits.request_seconds:g} s", code="timeout") from None
    return b"".join(parts)


def _request_id(request: Request) -> str:
    """Serve's, which is the client's own X-Request-ID if it sent one; made unique: a client may send it twice."""
    given = request.headers.get("x-request-id", "").strip()[:128]
    return f"{given or 'request'}-{secrets.token_hex(4)}"


def _log(endpoint: Endpoint, request: Request, status: int, text: str) -> None:
    endpoint.answered(status)
    line = f"{request.method} {request.scope['path'][:200]} {status} {text}"
    logger.info("".join(letter if letter.isprintable() else "?" for letter in line))


_REQUEST = {"$ref": "#/components/schemas/ChatRequest"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _error_responses() -> dict[int, dict[str, Any]]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    texts = {
        400: "The request can't be answered as it is; the message names the part at fault.",
        401: "No valid API key.",
        404: "No such model or path.",
        408: "The request itself did not arrive in time.",
        413: "The request, or a file in it, is too large.",
        429: "Too many requests are waiting, or this key has sent too many; see Retry-After.",
        500: "The model failed.",
        503: "The model can't be reached, its replica ended, or an answer would wait too long; see Retry-After.",
        504: "No answer in time, or none from the host of a media URL.",
    }
    return {status: {"description": text, "content": content} for status, text in texts.items()}


def _openapi(app: FastAPI, schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's schema with the models of the body, which is read by hand for the sake of its limits."""
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas |= request.pop("$defs") | {"ChatRequest": request, "Error": _ERROR}
    return schema
