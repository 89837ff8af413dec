"""The endpoint: its deployments, how they scale, and what a request may ask for."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unimoe_ray.config.base import Strict

_HOST = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?")


class DeploymentConfig(Strict):
    """Replicas of one deployment: resources of each, how many, and when one more or one less.

    A replica is added when its handles' queues average more than ``target_ongoing_requests`` per replica for
    ``upscale_delay_s``, and taken away likewise. ``min_replicas: 0`` lets the deployment go when nobody needs it.
    """

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    min_replicas: int = Field(1, ge=0)
    initial_replicas: int | None = Field(None, ge=0, description="at the start; min_replicas if not given")
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(8.0, gt=0)
    max_ongoing_requests: int = Field(32, ge=1, description="requests that one replica takes at a time")
    max_queued_requests: int = Field(64, ge=1, description="requests that wait in front of the replicas; more: 429")
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    look_back_period_s: float = Field(15.0, gt=0)
    shutdown_timeout_s: float = Field(120.0, ge=0, description="a replica that goes may finish its requests this long")

    @model_validator(mode="after")
    def _bounds_agree(self) -> DeploymentConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(f"initial_replicas ({initial}) is not between min_replicas and max_replicas")
        return self


class EncoderConfig(DeploymentConfig):
    """A tower with its connectors. A batch closes when its cost (image and video: frames; speech and sound: seconds)
    reaches ``max_batch_cost``, or ``batch_wait_s`` after its first file."""

    max_batch_cost: int = Field(32, ge=1)
    batch_wait_s: float = Field(0.005, ge=0)


class ExpertGroupConfig(Strict):
    """A replica of the language model as a group of actors: ``size`` members hold its experts, the replica the rest.
    ``placement`` has what decides which member holds which experts, and when they move."""

    size: int = Field(0, ge=0, description="members of the group; 0: the replica has all experts")
    num_cpus: float = Field(1.0, ge=0, description="of each member")
    num_gpus: float = Field(0.0, ge=0, description="of each member")
    interval: int = Field(2000, ge=0, description="engine steps between plans; 0: experts stay")


class LanguageConfig(DeploymentConfig):
    expert_parallel: ExpertGroupConfig = ExpertGroupConfig()

    @property
    def replica_cpus(self) -> float:
        """Of a replica and its group."""
        return self.num_cpus + self.expert_parallel.size * self.expert_parallel.num_cpus

    @property
    def replica_gpus(self) -> float:
        return self.num_gpus + self.expert_parallel.size * self.expert_parallel.num_gpus


class EngineConfig(Strict):
    """Continuous batching. ``kv_tokens`` is the budget of the KV cache: a request is admitted when its prompt and all
    tokens that it may generate fit in it."""

    backend: Literal["native", "vllm"] = Field("native", description="vllm: in the environment of vllm_python")
    vllm_python: str | None = Field(None, description="Python of an environment made by serve/vllm_env.sh")
    max_running: int = Field(16, ge=1, description="requests that generate together")
    kv_tokens: int | Literal["auto"] = Field("auto", description="auto: max_running times the longest sequence")
    max_step_tokens: int = Field(512, ge=1, description="tokens of one step; longer prompts are prefilled in chunks")
    max_waiting: int = Field(256, ge=0, description="admitted requests that wait for their turn; more: 429")
    messages_per_s: float = Field(
        10.0, gt=0, description="of a stream, tokens in between come together; down to 0.4 of it with many streams"
    )
    lookup_tokens: int = Field(
        0, ge=0, le=16, description="tokens guessed from what was said before and checked in one step; 0: none"
    )
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on CPUs; int8: weights only, with the compiled kernel on CPUs"
    )
    threads: int | Literal["auto"] = Field("auto", description="CPU threads; auto: num_cpus of the language deployment")

    @field_validator("kv_tokens", "threads")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("allowed: 'auto' or a number from 1")
        return value

    @model_validator(mode="after")
    def _vllm_has_what_it_needs(self) -> EngineConfig:
        if self.backend == "vllm" and self.vllm_python is None:
            raise ValueError("backend is vllm, but vllm_python is not given; serve/vllm_env.sh makes its environment")
        if self.backend == "vllm" and self.lookup_tokens:
            raise ValueError(f"lookup_tokens is {self.lookup_tokens}; allowed with backend vllm: 0")
        if self.backend == "vllm" and self.precision == "int8":
            raise ValueError("precision is int8; allowed with backend vllm: auto, fp32, bf16")
        return self


class LimitsConfig(Strict):
    """What one request may bring and take."""

    max_body_mb: float = Field(48.0, gt=0)
    max_media_mb: float = Field(24.0, gt=0, description="of one file, decoded from base64")
    max_media: int = Field(16, ge=0, description="files per request")
    max_messages: int = Field(128, ge=1)
    max_pixels: int = Field(25_000_000, ge=1, description="of an image")
    max_video_pixels: int = Field(2_500_000, ge=1, description="of one frame")
    max_seconds: float = Field(300.0, gt=0, description="of a sound, a recording or a video")
    request_seconds: float = Field(300.0, gt=0, description="from its arrival to its last token; then 504")
    fetch_seconds: float = Field(10.0, gt=0, description="for media behind a remote URL")
    max_wait_s: float = Field(60.0, gt=0, description="for a slot, as estimated when the model has none free; then 503")
    retry_after_s: int = Field(2, ge=1, description="what a client that is sent away (429, 503) is asked to wait")


class KeyClassConfig(Strict):
    """What each key of a class may take, and who goes first where requests wait (the higher priority; then the older
    request). Up to one minute's worth may come at once. Tokens are those of prompts and answers."""

    priority: int = Field(0, ge=-100, le=100)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


class KeyConfig(Strict):
    """An API key, known by its hash only: ``printf %s KEY | sha256sum``."""

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$", description="in the log")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    key_class: str = "default"


class ServingConfig(Strict):
    """``unimoe serve``. ``media_hosts`` are the hosts of remote media URLs that are fetched ("example.org",
    "*.example.org", "example.org:8443"); without any, media come as data: URLs only."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    model_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._/-]+$", description="the run's name if not given")
    api_keys_file: str | None = Field(None, description="one key per line; without it and ``keys`` anyone may ask")
    keys: list[KeyConfig] = []
    key_classes: dict[str, KeyClassConfig] = Field({}, description="'default' is that of the keys file, too")
    tracing: str | None = Field(
        None,
        description="spans: to http(s)://COLLECTOR:4318/v1/traces (OTLP), or as JSON lines into /FOLDER of each node",
    )
    media_hosts: list[Annotated[str, Field(max_length=255)]] = []
    cache_mb: float = Field(256.0, ge=0, description="soft tokens kept per ingress replica, by content")
    encoder_fallback_s: float | None = Field(
        None,
        gt=0,
        description="a file that waits so long while no replica of its encoder runs is encoded by the language"
        " model's replica, which then keeps that tower in its memory; null: it waits on",
    )
    routing: Literal["spread", "affinity"] = Field(
        "spread",
        description="affinity: to the language replica that has the request's first file (or else its first"
        " question) in its cache; the next one when that is full",
    )
    throughput_mode: bool = Field(False, description="Serve's HAProxy and gRPC instead of its Python proxy")
    ingress: DeploymentConfig = DeploymentConfig(
        num_cpus=0.5, max_ongoing_requests=512, target_ongoing_requests=64, max_queued_requests=512
    )
    language: LanguageConfig = LanguageConfig(
        max_replicas=1, target_ongoing_requests=16, max_ongoing_requests=64, max_queued_requests=64
    )
    image: EncoderConfig = EncoderConfig()
    speech: EncoderConfig = EncoderConfig(max_batch_cost=120)
    audio: EncoderConfig = EncoderConfig(max_batch_cost=120)
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()

    @field_validator("media_hosts")
    @classmethod
    def _host_names(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"'{host}' is not a host; allowed: example.org, *.example.org, example.org:8443")
        return hosts

    @field_validator("tracing")
    @classmethod
    def _place_for_spans(cls, where: str | None) -> str | None:
        if where is not None and not where.startswith(("http://", "https://", "/")):
            raise ValueError("allowed: http(s)://COLLECTOR:4318/v1/traces or the absolute path of a folder")
        return where

    @model_validator(mode="after")
    def _keys_agree(self) -> ServingConfig:
        for index, key in enumerate(self.keys):
            if key.key_class not in {"default", *self.key_classes}:
                known = ", ".join(sorted({"default", *self.key_classes}))
                raise ValueError(f"keys.{index}.key_class is '{key.key_class}'; allowed: {known} (key_classes)")
            if any(key.name == other.name or key.sha256 == other.sha256 for other in self.keys[:index]):
                raise ValueError(f"keys.{index} ({key.name}): its name or sha256 is that of another key")
        return self

    @model_validator(mode="after")
    def _someone_answers(self) -> ServingConfig:
        for name in ("ingress", "language"):
            if getattr(self, name).min_replicas < 1:
                raise ValueError(f"{name}.min_replicas is 0; allowed: from 1 (only encoders may go)")
        size = self.language.expert_parallel.size
        if size and self.engine.backend == "vllm":
            raise ValueError(f"language.expert_parallel.size is {size}; allowed with engine.backend vllm: 0")
        if self.engine.precision == "int8" and (size or self.language.num_gpus):
            raise ValueError("engine.precision is int8; allowed on CPUs without expert_parallel only")
        return self
