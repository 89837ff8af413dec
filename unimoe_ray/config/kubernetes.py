"""The cluster on which jobs and the endpoint run, as far as the manifests need to know it."""

from __future__ import annotations

from pydantic import Field, model_validator

from unimoe_ray.config.base import Strict


class NodeConfig(Strict):
    """One kind of node, what a pod can have of it, and the labels by which its nodes are found."""

    cpus: float = Field(8, gt=0)
    memory_gib: float = Field(30, gt=0)
    gpus: int = Field(0, ge=0)
    gpu_memory_gib: float = Field(0, ge=0, description="of each GPU, as the driver reports it")
    selector: dict[str, str] = {}

    @model_validator(mode="after")
    def _gpus_have_memory(self) -> NodeConfig:
        if self.gpus and not self.gpu_memory_gib:
            raise ValueError(f"has {self.gpus} GPUs, and gpu_memory_gib is 0")
        return self


class NodesConfig(Strict):
    """``cpu``: heads, and everything of overlays without GPUs. ``small_gpu``: encoders. ``large_gpu``: the language
    model and training; a training pod takes a whole one."""

    cpu: NodeConfig = NodeConfig(cpus=15, memory_gib=58)
    small_gpu: NodeConfig = NodeConfig(
        cpus=7, memory_gib=28, gpus=1, gpu_memory_gib=22, selector={"nvidia.com/gpu.product": "NVIDIA-L4"}
    )
    large_gpu: NodeConfig = NodeConfig(
        cpus=180,
        memory_gib=1900,
        gpus=8,
        gpu_memory_gib=79,
        selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    )


class KubernetesConfig(Strict):
    """``unimoe k8s``. The image has two variants, ``:TAG-cpu`` and ``:TAG-cuda``."""

    namespace: str = Field("unimoe", pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")
    image: str = Field("unimoe-ray", description="registry and name")
    image_tag: str = "0.1.0"
    image_pull_secret: str | None = Field(None, description="name of a Secret in the namespace")
    storage_class: str | None = Field(None, description="of the volume for runs; must offer ReadWriteMany")
    storage_gib: int | None = Field(None, ge=1, description="for runs and data; from the model's size if not given")
    gateway_class: str = Field("istio", description="GatewayClass that shifts traffic in upgrades of the endpoint")
    queue: str = Field("unimoe", description="Kueue's LocalQueue of the overlay kueue")
    train_nodes: int = Field(2, ge=1, description="most nodes of a training job, where training.workers is auto")
    spot: dict[str, str] = Field({"karpenter.sh/capacity-type": "spot"}, description="labels and taints of spot nodes")
    on_demand: dict[str, str] = {"karpenter.sh/capacity-type": "on-demand"}
    nodes: NodesConfig = NodesConfig()
