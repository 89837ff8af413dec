"""Where samples come from and how they are prepared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unimoe_ray.config.base import Strict

SPLITS = ("train", "dev", "test")
MEDIA_FIELDS = ("image", "video", "audio", "speech", "voice")
Place = Annotated[str, Field(min_length=1)]


class SourceConfig(Strict):
    """One source of records. Paths may be URLs: s3://, gs://, https:// and whatever fsspec knows."""

    path: Place = Field(description="a file, a folder, a pattern such as data/shard-*.tar, or a URL of one of them")
    format: Literal["auto", "json", "jsonl", "parquet", "webdataset"] = Field(
        "auto", description="auto: by the ending of the file's name: .json, .jsonl, .parquet, .tar"
    )
    media: Place | dict[Literal[MEDIA_FIELDS], Place] | None = Field(
        None,
        description="what media paths are relative to: a folder, a .zip or a .tar; for all fields, or field by field; "
        "not given: the folder of the records' file",
    )
    split: Literal[SPLITS] | None = Field(
        None, description="not given: by the names of files or their folder (train-0.tar, dev/...); train for others"
    )
    task: Annotated[str, Field(min_length=1)] | None = Field(None, description="the task of records that name none")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="how often each of its samples comes, beside other sources' samples"
    )


class DataConfig(Strict):
    """``dir`` holds what is shared by runs: the suite and the feature store."""

    dir: str = "data"
    source: str = Field("mini", description="'mini', or a folder of the splits train, dev and test")
    sources: list[SourceConfig] = Field([], description="instead of data.source: any number of sources")
    template: Literal["compact", "vicuna_v1", "smollm2"] = Field(
        "compact", description="how conversations become tokens; all but compact need a model.language.pretrained"
    )
    voice_as: Literal["speech", "audio"] = "speech"
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    too_long: Literal["refuse", "shorten"] = Field(
        "refuse",
        description="conversations longer than model.language.max_positions: refuse (samples go to quarantine), or "
        "shorten: the oldest turns go, or the words of questions; never media alone nor answers that are learned",
    )
    max_pixels: int = Field(64_000_000, ge=1)
    max_seconds: float = Field(600.0, gt=0)
    max_bytes: int = Field(2**30, ge=1, description="of one media file, unpacked")
    encode_batch: int = Field(256, ge=1, description="media files per block of the encoding pipeline")
    features: Literal["auto", "store", "stream"] = Field(
        "auto",
        description="store: media are encoded once, before training; stream: those of the train split each time they "
        "are used, held-out ones still once; auto: store, if it needs no more than data.store_max_gb",
    )
    store_dtype: Literal["fp16", "fp32"] = Field("fp16", description="of stored and streamed features")
    store_max_gb: float = Field(500.0, gt=0, description="10^9 bytes of features")
    stream_actors: int = Field(1, ge=1, description="processes that stream features to one training worker")
    stream_gpus: float = Field(0.0, ge=0, description="GPUs of each of them, besides those that train; 0: none")
    prefetch: int = Field(2, ge=0, description="blocks of micro-batches that Ray Data prepares ahead")
    steps_per_block: int = Field(16, ge=1, description="optimizer steps whose micro-batches make one block")

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataConfig:
        if self.sources and self.source != "mini":
            raise ValueError(f"data.source is {self.source!r} and data.sources is given too; give one of them")
        return self

    @property
    def is_mini(self) -> bool:
        """Whether the embedded suite is the data."""
        return self.source == "mini" and not self.sources


class MiniConfig(Strict):
    """The embedded default: small pretrained towers and a small real task suite out of package wheels."""

    suite_seed: int | None = Field(None, description="seed of the suite; the run's own seed if not given")
    random_towers: bool = False
    scale: Literal["full", "tiny"] = "full"
