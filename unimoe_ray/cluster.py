"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator

from unimoe_ray.config import Config
from unimoe_ray.errors import UnimoeError

MAX_CPU_WORKERS = 4
# Ray Data runs beside the training workers; without logical CPUs of its own it starves.
DATA_CPUS = 2


@contextlib.contextmanager
def connect(config: Config, local_cpus: float | None = None) -> Iterator[None]:
    """Join the cluster of ``ray_address`` or of the environment; else start one here, ended on leaving.

    local_cpus: how many CPUs a cluster made here should say it has; what the training stages need if not given
    """
    _quiet()
    address = _address(config)
    if address == "local":
        _prepare_local()
    import ray

    if ray.is_initialized():
        yield
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address != "local":
            ray.init(address=address, **options)
        else:
            ray.init(
                address="local",
                num_cpus=_training_cpus(config) if local_cpus is None else math.ceil(local_cpus),
                include_dashboard=False,
                object_store_memory=400 * 2**20,
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UnimoeError(f"Ray at {address}: {' '.join(str(error).split())}") from None
    except Exception as error:
        if type(error) is not Exception:  # Ray's own, when its processes are not there after half a minute
            raise
        raise UnimoeError(f"Ray did not start; is this machine busy? ({' '.join(str(error).split())})") from None
    _quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def is_local(config: Config) -> bool:
    """Whether ``connect`` starts a cluster here, for the length of the command."""
    return _address(config) == "local"


def _address(config: Config) -> str:
    return config.ray_address or os.environ.get("RAY_ADDRESS") or "local"


def _training_cpus(config: Config) -> int:
    runs = max((len(stage) for _, stage in config.stages), default=1)
    return max(local_workers(config), runs) + DATA_CPUS


def _quiet_data() -> None:
    """Ray Data's own progress would interleave with ours; its errors are raised, and shown in one line."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def local_workers(config: Config) -> int:
    """Training workers for this machine alone."""
    if isinstance(config.training.workers, int):
        return config.training.workers
    import torch

    if config.training.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(len(os.sched_getaffinity(0)), MAX_CPU_WORKERS)


def workers(config: Config) -> int:
    """Training workers for the cluster that is joined: one per GPU, else one per CPU, few."""
    import ray

    if isinstance(config.training.workers, int):
        return config.training.workers
    resources = ray.cluster_resources()
    if config.training.device != "cpu" and resources.get("GPU", 0) >= 1:
        return int(resources["GPU"])
    return max(1, min(int(resources.get("CPU", 1)) - DATA_CPUS, local_workers(config)))


def uses_gpu(config: Config) -> bool:
    import ray

    return config.training.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1


def decoders(config: Config) -> int:
    """Threads that decode media beside each GPU that encodes them: its share of the cluster's CPUs. 1 without GPUs."""
    import ray

    if not uses_gpu(config):
        return 1
    resources = ray.cluster_resources()
    return max(1, min(int((resources.get("CPU", 1) - DATA_CPUS) // resources["GPU"]), 16))


def _quiet() -> None:
    """Fewer warnings that no user can act on; set before Ray is imported."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _prepare_local() -> None:
    """Settings of a cluster that lives on this machine, for the length of this command."""
    # Only this command talks to it: no token is needed, and none is left behind.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Each training run has a handful of small actors of Ray's own: expected, not worth a warning.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # Nobody preempts this machine, and every watcher is a process more.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
