"""Where samples come from and how they are prepared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unimoe_ray.config.base import Strict


class DataConfig(Strict):
    """``dir`` holds what is shared by runs: the suite and the feature store."""

    dir: str = "data"
    source: str = Field("mini", description="'mini', or a folder with train.json, dev.json and test.json")
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
    encode_batch: int = Field(256, ge=1, description="media files per block of the encoding pipeline")
    prefetch: int = Field(2, ge=0, description="blocks of micro-batches that Ray Data prepares ahead")
    steps_per_block: int = Field(16, ge=1, description="optimizer steps whose micro-batches make one block")


class MiniConfig(Strict):
    """The embedded default: small pretrained towers and a small real task suite out of package wheels."""

    suite_seed: int | None = Field(None, description="seed of the suite; the run's own seed if not given")
    random_towers: bool = False
    scale: Literal["full", "tiny"] = "full"
