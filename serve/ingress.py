"""The ingress deployment: HTTP in, calls to encoders and language model out. Imports neither torch nor transformers."""

from __future__ import annotations

import asyncio
import logging
from functools import cache

import ray
from fastapi import FastAPI
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve._private.common import RequestMetadata, StreamingHTTPRequest
from ray.serve.config import DeploymentActorConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.chat import Chat
from serve.http import Endpoint, build_app
from serve.keys import ApiKeys, Buckets, Caller
from serve.metrics import IngressMetrics, cluster_metrics
from serve.priority import give_way
from serve.proxy import BODY
from serve.relay import Relay
from serve.tracing import Tracer
from unimoe_ray.config.serving import ServingConfig

HEALTH_TIMEOUT_S = 5.0
LIMITS = "limits"
LIMITS_TIMEOUT_S = 2.0
logger = logging.getLogger("ray.serve")


def limits_actor(settings: ServingConfig) -> list[DeploymentActorConfig]:
    """The actor that counts for all ingress replicas, where keys may take only so much; else none. Halves of a limit in
    two replicas would refuse requests that the whole allows."""
    classes = settings.key_classes.values()
    if not any(rights.requests_per_minute or rights.tokens_per_minute for rights in classes):
        return []
    return [DeploymentActorConfig(name=LIMITS, actor_class=ray.remote(Buckets), actor_options={"num_cpus": 0})]


class SharedLimits:
    """``Limits`` in the deployment's actor. While that is away (Serve starts another), nobody is held back."""

    def __init__(self) -> None:
        self._actor: ActorHandle | None = None

    async def take(self, caller: Caller) -> float:
        return await self._ask("take", caller) or 0.0

    async def spend(self, caller: Caller, tokens: int) -> None:
        await self._ask("spend", caller, tokens)

    async def _ask(self, method: str, *arguments: object) -> float | None:
        try:
            if self._actor is None:
                self._actor = serve.get_deployment_actor(LIMITS)
            return await asyncio.wait_for(getattr(self._actor, method).remote(*arguments), LIMITS_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            logger.warning(f"the limits of API keys can't be looked up: {type(error).__name__}")
            self._actor = None
            return None


@cache
def expect_no_more() -> None:
    """Of a request that came with its body there is nothing more to receive. Serve would ask its proxy for the next
    message all the same, a call between actors that costs each of them 1 ms of CPU time, only to hear that the client
    has left; whereupon Serve cancels the request anyway."""
    asked = StreamingHTTPRequest.receive_asgi_messages

    async def nothing(metadata: RequestMetadata) -> None:
        await asyncio.Event().wait()  # until Serve cancels it

    StreamingHTTPRequest.receive_asgi_messages = property(
        lambda request: nothing if BODY in request.asgi_scope else asked.fget(request)
    )


@serve.ingress()
class Ingress:
    """encoders: handles by media kind; fingerprint: of the model, part of the embedding cache's keys."""

    def __init__(
        self,
        settings: dict,
        model: str,
        voice_as: str,
        fingerprint: str,
        encoders: dict[str, DeploymentHandle],
        language: DeploymentHandle,
    ):
        give_way()
        expect_no_more()
        self._config = ServingConfig.model_validate(settings)
        self._model, self._voice_as, self._language = model, voice_as, language
        self._keys = ApiKeys(self._config)
        self._metrics = IngressMetrics()
        self._relay = Relay(
            encoders,
            language,
            fingerprint=fingerprint,
            cache_bytes=int(self._config.cache_mb * 1_000_000),
            fallback_s=self._config.encoder_fallback_s,
            affinity=self._config.routing == "affinity",
            retry_after_s=self._config.limits.retry_after_s,
            metrics=self._metrics,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        chat = Chat(self._relay, self._config, self._model, self._voice_as, self._metrics)
        return build_app(
            Endpoint(
                model=self._model,
                chat=chat,
                keys=self._keys,
                rates=SharedLimits(),
                tracer=Tracer(self._config.tracing, "ingress"),
                limits=self._config.limits,
                healthy=self._unhealthy,
                metrics=cluster_metrics,
                answered=self._metrics.answered,
            )
        )

    async def _unhealthy(self) -> str | None:
        try:
            await asyncio.wait_for(self._language.ready.remote(), HEALTH_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            return f"the language model does not answer ({type(error).__name__})"
        return None
