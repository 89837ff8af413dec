"""The ingress deployment: HTTP in, calls to encoders and language model out. Imports neither torch nor transformers."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.chat import Chat
from serve.http import ApiKeys, Endpoint, build_app
from serve.metrics import IngressMetrics, cluster_metrics
from serve.relay import Relay
from unimoe_ray.config.serving import ServingConfig

HEALTH_TIMEOUT_S = 5.0


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
        self._config = ServingConfig.model_validate(settings)
        self._model, self._voice_as, self._language = model, voice_as, language
        self._keys = ApiKeys(self._config.api_keys_file)
        self._metrics = IngressMetrics()
        self._relay = Relay(
            encoders,
            language,
            fingerprint=fingerprint,
            cache_bytes=int(self._config.cache_mb * 1_000_000),
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
