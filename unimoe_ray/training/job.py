"""What the driver hands to Ray Train. Ray's own actors import this module: it must stay light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unimoe_ray.data.samples import Source
from unimoe_ray.training import recovery, standby


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know, picklable. states: where those of the run lie; decides: all that decides what
    it learns, as a state of it says too."""

    config: dict[str, Any]
    info: dict[str, Any]
    stage: str
    run: str
    source: Source
    tasks: dict[str, float]
    tokenizer: str
    folder: str
    recipe: str
    states: str
    decides: dict[str, Any]

    @property
    def label(self) -> str:
        return self.stage if self.stage == self.run else f"{self.stage}/{self.run}"


def train_worker(job: Job) -> None:
    """The Ray Train worker function."""
    recovery.mark("entered")
    from unimoe_ray.training.loop import train

    recovery.mark("imported")
    with standby.kept(job.config["training"]["elastic"]["standby_every"]):
        train(job)
