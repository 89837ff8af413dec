"""The kinds of clusters that manifests are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from unimoe_ray.config import Config, parse
from unimoe_ray.errors import UsageError

# The volume is the working folder of all pods: relative paths of the configuration are on it.
VOLUME = "/unimoe"
API_KEYS_FILE = "/etc/unimoe/api-keys/keys"
RANKS_PER_CPU_POD = 2


@dataclass(frozen=True)
class Overlay:
    """gpu: encoders, language model and training have GPUs; spot: workers are on nodes that may go, the head is not;
    queued: Kueue decides when a job starts, and jobs have a fixed size; incremental: a Gateway shifts the endpoint's
    traffic in an upgrade."""

    name: str
    says: str
    preset: str
    gpu: bool = False
    spot: bool = False
    queued: bool = False
    incremental: bool = False

    @property
    def scales(self) -> bool:
        """Whether jobs and the shared cluster grow and shrink."""
        return not self.queued


OVERLAYS = {
    overlay.name: overlay
    for overlay in (
        Overlay("cpu-mini", "nodes without GPUs, down to one machine (kind, minikube)", "mini"),
        Overlay(
            "gpu",
            "encoders on small GPUs, language model and training on large ones",
            "uni-moe-7b-4e",
            gpu=True,
            incremental=True,
        ),  # fmt: skip
        Overlay(
            "gpu-spot",
            "as gpu, with workers on spot nodes and heads on demand",
            "uni-moe-7b-4e",
            gpu=True,
            spot=True,
            incremental=True,
        ),  # fmt: skip
        Overlay(
            "kueue",
            "as gpu, with jobs of fixed size that wait in a queue of Kueue",
            "uni-moe-7b-4e",
            gpu=True,
            queued=True,
            incremental=True,
        ),  # fmt: skip
    )
}


def overlay_named(name: str) -> Overlay:
    if name not in OVERLAYS:
        raise UsageError(f"--overlay {name}: no such overlay; allowed: {', '.join(OVERLAYS)}")
    return OVERLAYS[name]


def in_cluster(config: Config, overlay: Overlay) -> Config:
    """The configuration as the pods get it: files on the volume, devices of the overlay, reachable from outside."""
    tree = config.model_dump(mode="json")
    tree["runs_dir"], tree["ray_address"] = _on_volume(config.runs_dir), None
    tree["data"]["dir"] = _on_volume(config.data.dir)
    if config.data.source != "mini":
        tree["data"]["source"] = _on_volume(config.data.source)
    if config.training.workers == "auto":
        settings = config.kubernetes
        tree["training"]["workers"] = (
            settings.nodes.large_gpu.gpus * settings.train_nodes if overlay.gpu else RANKS_PER_CPU_POD
        )
    tree["training"]["device"] = "cuda" if overlay.gpu else "cpu"
    tree["serving"]["host"] = "0.0.0.0"
    for part in ("image", "speech", "audio", "language"):
        tree["serving"][part]["num_gpus"] = 1 if overlay.gpu else 0
    if config.serving.api_keys_file is not None:
        tree["serving"]["api_keys_file"] = API_KEYS_FILE
    return parse(tree)


def _on_volume(path: str) -> str:
    return str(PurePosixPath(VOLUME, path))
