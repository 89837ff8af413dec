"""Workers that come and go, and what a run does when something fails."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unimoe_ray.config.base import Strict


class ElasticConfig(Strict):
    """A run goes on with the workers there are, at most ``training.workers``; how many they are changes no result."""

    min_workers: int = Field(1, ge=1, description="with room for fewer, a run waits")
    grow_after: float = Field(60.0, ge=0, description="seconds that there is room for more workers until they are used")
    start_timeout: float = Field(60.0, gt=0, description="seconds for placing workers, until it is tried with others")
    standby_every: float | None = Field(
        30.0,
        gt=0,
        description="seconds between looks whether there is a process for each worker that waits, with all "
        "imported, to go on in its place; null: there is none",
    )
    hang_timeout: float = Field(
        600.0, gt=0, description="seconds that workers wait for one of them, or for data, until they are started anew"
    )
    max_failures: int = Field(
        3, ge=0, description="failures in a row, none of which came further than the one before, that a run outlives"
    )
    bad_loss: Literal["skip", "rewind", "stop"] = Field(
        "skip",
        description="for a step whose loss or gradient is not finite or explodes. skip: its update is left out; "
        "rewind: back to the last saved state, and on without the step; stop: the run fails",
    )
    explosion: float = Field(
        10.0, gt=1, description="a loss explodes above this many times the median of the last 20, if also the highest"
    )
    max_bad_steps: int = Field(5, ge=1, description="bad steps in a row at which a run fails, whatever bad_loss is")
