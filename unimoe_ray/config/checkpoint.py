"""When the state of a run is written down to go on from, where, and which of them are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unimoe_ray.config.base import Strict


class CheckpointConfig(Strict):
    """States of unfinished runs: trained weights, moments and position. None of it changes what is learned."""

    every: int = Field(20, ge=0, description="optimizer steps between two states; 0: none, a killed run starts again")
    keep_last: int = Field(2, ge=1, description="the newest; the others stand in where the newest is damaged")
    keep_every: int = Field(0, ge=0, description="also those of steps that it divides, finished runs' too; 0: none")
    keep_best: int = Field(
        0, ge=0, description="also so many with the lowest validation loss, of those made at a step with a validation"
    )
    location: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="folder or URL (s3://, gs://, ...) of the folders of runs; if not given, states/ of the run folder",
    )
    on_error: Literal["warn", "stop"] = Field("warn", description="when a state can't be written")
