"""One Ray Train run: its trainer, with what decides about its workers."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from unimoe_ray.config import Config
from unimoe_ray.training import standby
from unimoe_ray.training.elastic import Perseverance, PoolPolicy, PoolScaling
from unimoe_ray.training.job import Job, train_worker
from unimoe_ray.training.observe import Observer, SaveOnTerminate
from unimoe_ray.training.pool import Pool
from unimoe_ray.training.recovery import last_step


class ElasticTrainer(TorchTrainer):
    """Ray's, with policies of ours in its controller."""

    def __init__(self, policies: dict[str, Any], **given: Any):
        super().__init__(**given)
        self._policies = policies

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        return super()._initialize_and_run_controller(**given | self._policies)


def fit(job: Job, config: Config, pool: Pool, use_gpu: bool) -> None:
    """Train to the end, through failures as far as ``training.elastic`` says.

    Raises ray.train.TrainingFailedError.
    """
    elastic, folder, label = config.training.elastic, config.run_dir.resolve(), job.label
    scaling = PoolScaling(
        # How many there are is the policy's business.
        num_workers=(elastic.min_workers, max(elastic.min_workers, pool.workers)),
        use_gpu=use_gpu,
        resources_per_worker=dict(pool.need),
    )
    policies = {
        "scaling_policy": PoolPolicy(scaling, pool, label, elastic.grow_after),
        "failure_policy": Perseverance(elastic.max_failures, partial(last_step, folder, label)),
    }
    # Ray Train passes these on to its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(elastic.start_timeout)
    trainer = ElasticTrainer(
        policies,
        train_loop_per_worker=train_worker,
        train_loop_config=job,
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"{label.replace('/', '-')}-{time.time_ns()}",
            storage_path=str(folder / "ray_train"),
            failure_config=FailureConfig(),
            worker_runtime_env=standby.environment(use_gpu),
            callbacks=[Observer(folder, label, elastic.hang_timeout), SaveOnTerminate()],
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=max(1, round(elastic.hang_timeout))),
    )
    trainer.fit()
