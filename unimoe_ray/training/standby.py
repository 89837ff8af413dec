"""Processes that wait with everything imported, for workers that are started anew: these need not wait for Python, Ray,
torch and transformers.

A worker asks its node's raylet for a process of its own kind (the same job and runtime environment), which the raylet
keeps for the next actor of that kind. The process imports before it waits if it finds a request in a folder of the
node's Ray session; other processes of the kind find none, and start as ever. Ray Data's actors are of that kind too, as
they have their worker's environment, and may take one: workers look again from time to time.

It stands on parts of Ray that are not public (the version is pinned): the raylet's ``PrestartWorkers``, and the
variable that names a function for a process to begin with. Ray's own actors import this module: it must stay light.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unimoe_ray.training import recovery

log = logging.getLogger(__name__)

BEGIN_WITH = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
ACCELERATOR = "DS_ACCELERATOR"
# Of tasks that workers start: with that of the workers they would take the processes.
OTHERS = {"env_vars": {BEGIN_WITH: ""}}
KEEP_S = 7 * 24 * 3600
# A cluster's room for data is shared out to the datasets that have asked for it lately. Ray Data counts those of killed
# workers for 180 s; live ones ask every 10.
DATA_EXPIRES = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30"}
ANSWER_S, START_S = 10.0, 60.0


def environment(use_gpu: bool) -> dict[str, dict[str, str]]:
    """The runtime environment of workers."""
    found = {BEGIN_WITH: f"{__name__}.load", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"} | DATA_EXPIRES
    return {"env_vars": found if use_gpu else found | {ACCELERATOR: "cpu"}}


def load() -> None:
    """What a process of the kind begins with."""
    folder = requests()
    for request in folder.glob("wanted-*"):
        mine = folder / f"importing-{os.getpid()}"
        try:
            request.rename(mine)
        except FileNotFoundError:  # another process was faster
            continue
        # Nothing here may ask CUDA for its devices: which of them are this process's is said when it is taken.
        importlib.import_module("unimoe_ray.training.loop")
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # which peft asks for: hundreds of patterns, compiled at first
        if os.environ.get(ACCELERATOR) == "cpu":  # else DeepSpeed asks
            importlib.import_module("deepspeed.ops")
        mine.rename(folder / f"ready-{os.getpid()}")
        recovery.mark("waiting")
        return


@contextmanager
def kept(every: float | None) -> Iterator[None]:
    """Around a worker's training: ``every`` so many seconds, one more process is asked for where fewer wait on this
    node than the run has workers there (None: never)."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(every):
            _ask()

    thread = threading.Thread(target=look, name="standby", daemon=True)
    if every is not None:
        thread.start()
    try:
        yield
    finally:
        done.set()


def waiting(folder: Path) -> int:
    """Processes that wait, or soon will."""
    return sum(map(_counts, folder.glob("*-*")))


def _counts(path: Path) -> bool:
    """Whether the process of a request waits, or may be expected to."""
    state, _, pid = path.name.partition("-")
    try:
        if state == "wanted":
            return path.stat().st_mtime > time.time() - START_S
        # The name that Ray gives a process that does nothing.
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::IDLE")
    except FileNotFoundError:
        return False


def _ask() -> None:
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    folder, here = requests(), ray.get_runtime_context()
    if waiting(folder) >= ray.train.get_context().get_local_world_size():
        return
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    folder.mkdir(exist_ok=True)
    wanted = folder / f"wanted-{uuid.uuid4().hex}"
    wanted.touch()
    environment = runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=here.get_runtime_env_string())
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.PYTHON,
        job_id=bytes.fromhex(here.get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=KEEP_S,
        num_workers=1,
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            wanted.unlink(missing_ok=True)
            log.warning("no process waits for the next worker here: %s", error)


def requests() -> Path:
    """Files of this node for processes that are wanted, import, or are ready."""
    import ray

    session = ray._private.worker.global_worker.node.get_session_dir_path()
    return Path(session) / f"unimoe-standby-{ray.get_runtime_context().get_job_id()}"
