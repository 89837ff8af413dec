"""The stages as data: what is trained, on which tasks, at which rates."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from unimoe_ray.config.base import Strict
from unimoe_ray.config.elastic import ElasticConfig
from unimoe_ray.config.model import MODALITIES

STAGES = ("base", "align", "experts", "tune")
_SELECTOR = re.compile(rf"language|feed_forward|lora|router|connector\.({'|'.join(MODALITIES)})(\.projection)?")
SELECTORS = "language, feed_forward, lora, router, connector.<modality>, connector.<modality>.projection"


class LoraConfig(Strict):
    """peft LoRA on the language model: ``attention`` is q, k, v, o; ``feed_forward`` every dense or expert MLP."""

    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[Literal["attention", "feed_forward"]] = Field(["attention", "feed_forward"], min_length=1)


class TrainRun(Strict):
    """One Ray Train run. ``train`` maps parameter selectors to peak learning rates; the rest is frozen."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    epochs: int | None = Field(
        None,
        ge=1,
        description="instead of steps: so often every sample of the tasks comes, times its task's and its source's "
        "weights, whole numbers; the last step of an epoch has what is left of it",
    )
    tasks: dict[str, float] = Field(min_length=1, description="mixture weight of each task")
    temperature: float | None = Field(
        None,
        gt=0,
        description="T: shares are weight * samples ** (1 / T): 1 as many as there are, higher more alike; not given: "
        "shares are the weights",
    )
    train: dict[str, float] = Field(min_length=1)
    lora: LoraConfig | None = None
    batch_size: int = Field(48, ge=1, description="samples per optimizer step, over all workers")
    weight_decay: float = Field(0.0, ge=0)

    @field_validator("train")
    @classmethod
    def _known_selectors(cls, train: dict[str, float]) -> dict[str, float]:
        for selector, rate in train.items():
            if not _SELECTOR.fullmatch(selector):
                raise ValueError(f"'{selector}' is not a parameter selector; allowed: {SELECTORS}")
            if not 0 < rate < 1:
                raise ValueError(f"learning rate of '{selector}' is {rate}; allowed: above 0, below 1")
        return train

    @field_validator("tasks")
    @classmethod
    def _positive_weights(cls, tasks: dict[str, float]) -> dict[str, float]:
        for task, weight in tasks.items():
            if not weight > 0:
                raise ValueError(f"weight of task '{task}' is {weight}; allowed: above 0")
        return tasks

    @model_validator(mode="after")
    def _lora_agrees(self) -> TrainRun:
        if ("lora" in self.train) != (self.lora is not None):
            raise ValueError("'lora' needs both a rate under train and its settings under lora")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> TrainRun:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; give one of them (null for the other)"
            )
        if self.epochs is None:
            return self
        if self.temperature is not None:
            raise ValueError("temperature makes shares of steps; an epoch has every sample: set it to null")
        for task, weight in self.tasks.items():
            if weight != round(weight):
                raise ValueError(f"weight of task '{task}' is {weight}; allowed with epochs: whole numbers")
        return self

    def connectors(self) -> list[str]:
        """Modalities whose connector this run trains, wholly or in part."""
        return [m for m in MODALITIES if any(s.split(".")[1:2] == [m] for s in self.train)]


class OptimizerConfig(Strict):
    """AdamW with linear warm-up and cosine decay to ``final_fraction`` of the peak rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    final_fraction: float = Field(0.05, ge=0, le=1)
    clip: float = Field(1.0, gt=0)


class StagesConfig(Strict):
    """The runs of each stage, by name. Runs of one stage are independent and go side by side."""

    base: dict[str, TrainRun] = {}
    align: dict[str, TrainRun] = {}
    experts: dict[str, TrainRun] = {}
    tune: dict[str, TrainRun] = {}

    @model_validator(mode="after")
    def _one_owner_per_connector(self) -> StagesConfig:
        for stage in ("align", "experts"):
            owners: dict[str, str] = {}
            for name, run in getattr(self, stage).items():
                for modality in run.connectors():
                    if modality in owners:
                        raise ValueError(
                            f"connector.{modality} is trained by both '{owners[modality]}' and '{name}' of {stage}"
                        )
                    owners[modality] = name
        for stage in ("base", "tune"):
            if len(getattr(self, stage)) > 1:
                raise ValueError(f"{stage} can have one run only")
        return self


class ExpertParallelConfig(Strict):
    """Experts of a mixture over workers. It changes no result, only who computes what."""

    ep_size: int | Literal["auto"] = Field(
        1,
        description="workers that share the experts of a mixture, a divisor of their number; 1: every worker has all; "
        "auto: as many as there are experts for",
    )

    @field_validator("ep_size")
    @classmethod
    def _some_ranks(cls, ep_size: int | str) -> int | str:
        if isinstance(ep_size, int) and ep_size < 1:
            raise ValueError("allowed: 'auto' or a number from 1")
        return ep_size


class ValidationConfig(Strict):
    """Loss on the dev split while training, by modality group, of the tasks that the run trains on."""

    every: int = Field(0, ge=0, description="steps between two validations, besides one after the last; 0: none")
    samples: int = Field(16, ge=1, description="at most so many of each modality group, the same every time")


class WatchConfig(Strict):
    """From where on a run's routing and losses are remarked on, in ``findings.jsonl`` and on the terminal."""

    patience: int = Field(20, ge=1, description="steps that a condition holds before it is said, and is gone after")
    collapse_share: float = Field(0.9, gt=0, le=1, description="share of a layer's tokens with one first choice")
    dead_steps: int = Field(50, ge=1, description="steps without any token after which an expert is dead")
    imbalance: float = Field(
        0.7,
        gt=0,
        le=1,
        description="coefficient of variation of a layer's loads over the highest possible, sqrt(E/K - 1)",
    )
    divergence: float = Field(3.0, gt=1, description="median of the last losses over the lowest that it was")
    validation_rise: float = Field(
        0.5, gt=0, description="part by which a group's validation loss is above its lowest, while the others fall"
    )


class TrainingConfig(Strict):
    """How the work is laid out over the cluster, and the engine's settings."""

    workers: int | Literal["auto"] = Field(
        "auto", description="Ray Train workers of a stage, where there is room; auto: one per GPU or core"
    )
    elastic: ElasticConfig = ElasticConfig()
    threads_per_worker: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    zero_stage: Literal[1, 2] = 2
    max_tokens_per_micro_batch: int = Field(4096, ge=16)
    packed_row_tokens: int | None = Field(
        None,
        ge=16,
        description="samples of one modality group share rows of up to so many tokens, each seeing itself only; not "
        "given: a row for each sample",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    expert_parallel: ExpertParallelConfig = ExpertParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    watch: WatchConfig = WatchConfig()

    @field_validator("workers")
    @classmethod
    def _some_workers(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and workers < 1:
            raise ValueError("allowed: 'auto' or a number from 1")
        return workers


class EvaluationConfig(Strict):
    """Held-out answers, greedy, by exact match."""

    tasks: list[str] = []
    batch_size: int = Field(64, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    limit: int | None = Field(None, ge=1, description="answers per task; all if not given")
    benchmarks: dict[str, str] = Field(
        {}, description="published benchmarks that the evaluation job answers too: name to the folder of its files"
    )
