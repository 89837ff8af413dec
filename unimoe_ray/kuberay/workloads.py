"""The Ray resources of an overlay: a shared cluster, a job for each stage, the endpoint.

All are made suspended: nothing runs, and nothing costs, until one is started by name.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import yaml

from unimoe_ray.config import Config
from unimoe_ray.config.serve_options import serve_config
from unimoe_ray.kuberay.documents import HELD, QUEUE
from unimoe_ray.kuberay.models import (
    AuthOptions,
    AutoscalerOptions,
    ClusterUpgradeOptions,
    GcsFaultToleranceOptions,
    HeadGroup,
    RayCluster,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    RayService,
    RayServiceSpec,
    RedisCredential,
    Resource,
    ServiceUpgradeStrategy,
    SubmitterConfig,
    WorkerGroup,
)
from unimoe_ray.kuberay.overlays import Overlay
from unimoe_ray.kuberay.pods import (
    CONFIG_FOLDER,
    CONTAINER_SECURITY,
    labels,
    ray_pod,
    resource_name,
    submitter,
)
from unimoe_ray.kuberay.sizing import AUTOSCALER_CPUS, AUTOSCALER_GIB, ENCODERS, Plan, Pod

REDIS = "unimoe-redis"
ROLE, MODALITY = "unimoe.io/role", "unimoe.io/modality"
IDLE_S = {"train": 300, "encode": 60, "language": 600, "image": 300, "speech": 300, "audio": 300}
# The drivers of these read the model on the head.
READ_MODEL = ("evaluate", "pipeline")


def shared_cluster(config: Config, overlay: Overlay, plan: Plan) -> RayCluster:
    """For development: ``ray job submit``, notebooks."""
    spec = _cluster(config, overlay, plan, "cluster", head="head", groups=_training_groups(plan), suspend=True)
    return RayCluster(metadata=_metadata(config, overlay, "cluster", "cluster", queued=overlay.queued), spec=spec)


def stage_jobs(config: Config, overlay: Overlay, plan: Plan) -> list[RayJob]:
    """prepare, each stage that the configuration has, evaluate; and the pipeline, which is all of them."""
    stages = [stage for stage, runs in config.stages if runs]
    return [_job(config, overlay, plan, name) for name in ("prepare", *stages, "evaluate", "pipeline")]


def _job(config: Config, overlay: Overlay, plan: Plan, step: str) -> RayJob:
    head = "job-head" if step in READ_MODEL else "head"
    spec = RayJobSpec(
        entrypoint=f"python -m jobs.{step} --config {CONFIG_FOLDER}/config.yaml",
        submission_mode="K8sJobMode",
        suspend=True,
        # The same command goes on from what is finished; a head that is lost costs the rest of a run.
        backoff_limit=2,
        submitter_config=SubmitterConfig(backoff_limit=2),
        submitter_pod_template=submitter(config, overlay),
        pre_running_deadline_seconds=3600,
        shutdown_after_job_finishes=True,
        ttl_seconds_after_finished=600,
        metadata={"run": config.name, "step": step},
        ray_cluster_spec=_cluster(config, overlay, plan, "job", head=head, groups=_training_groups(plan)),
    )
    return RayJob(metadata=_metadata(config, overlay, "job", step, queued=overlay.queued), spec=spec)


def endpoint(config: Config, overlay: Overlay, plan: Plan) -> RayService:
    groups = [plan.pods[name] for name in ("language", *ENCODERS)]
    cluster = _cluster(config, overlay, plan, "endpoint", head="head", groups=groups)
    password = {"secretKeyRef": {"name": REDIS, "key": "password"}}
    cluster.gcs_fault_tolerance_options = GcsFaultToleranceOptions(
        backend="redis",
        redis_address=f"redis://{REDIS}:6379",
        redis_password=RedisCredential(value_from=password),
    )
    spec = RayServiceSpec(
        suspend=True,
        serve_config_v2=yaml.safe_dump(_serve_config(config), sort_keys=False),
        upgrade_strategy=_upgrade(config, overlay),
        # Heads have no CPUs for Ray, so no replicas: they only pass requests on.
        exclude_head_pod_from_serve_svc=True,
        ray_cluster_deletion_delay_seconds=plan.stream_s,
        ray_cluster_config=cluster,
    )
    return RayService(metadata=_metadata(config, overlay, "endpoint", "endpoint"), spec=spec)


def _metadata(config: Config, overlay: Overlay, component: str, *parts: str, queued: bool = False) -> dict[str, Any]:
    marks = labels(config, component)
    if queued:
        marks[QUEUE] = config.kubernetes.queue + HELD
    return {"name": resource_name(config, *parts), "namespace": config.kubernetes.namespace, "labels": marks}


def _training_groups(plan: Plan) -> list[Pod]:
    return [plan.pods[name] for name in ("train", "encode") if name in plan.pods]


def _cluster(
    config: Config,
    overlay: Overlay,
    plan: Plan,
    component: str,
    *,
    head: str,
    groups: list[Pod],
    suspend: bool | None = None,
) -> RayClusterSpec:
    scales = overlay.scales or component == "endpoint"
    drain_s = plan.stream_s if component == "endpoint" else plan.checkpoint_s
    head_pod = plan.pods[head]
    template = ray_pod(config, overlay, head_pod, component=component, drain_s=drain_s, is_head=True)
    return RayClusterSpec(
        ray_version=version("ray"),
        suspend=suspend,
        auth_options=AuthOptions(mode="token"),
        enable_in_tree_autoscaling=scales,
        autoscaler_options=_autoscaler() if scales else None,
        head_group_spec=HeadGroup(
            ray_start_params={"num-cpus": "0", "dashboard-host": "0.0.0.0", **_objects(head_pod)},
            labels={ROLE: "head"},
            template=template,
        ),
        worker_group_specs=[
            WorkerGroup(
                group_name=pod.name,
                replicas=pod.least,
                min_replicas=pod.least,
                max_replicas=pod.most if scales else pod.least,
                idle_timeout_seconds=IDLE_S[pod.name] if scales else None,
                ray_start_params=_objects(pod),
                labels=_node_labels(pod),
                template=ray_pod(config, overlay, pod, component=component, drain_s=drain_s, is_head=False),
            )
            for pod in groups
        ],
    )


def _objects(pod: Pod) -> dict[str, str]:
    return {"object-store-memory": str(int(pod.objects_gib * 2**30))}


def _node_labels(pod: Pod) -> dict[str, str]:
    """Of the Ray nodes: by these deployments find their pods, and experts those that read their modality."""
    if pod.name in ENCODERS:
        return {ROLE: "encoder", MODALITY: pod.name}
    return {ROLE: pod.name}


def _autoscaler() -> AutoscalerOptions:
    amounts = {"cpu": f"{AUTOSCALER_CPUS * 1000:g}m", "memory": f"{AUTOSCALER_GIB}Gi"}
    return AutoscalerOptions(
        version="v2",
        upscaling_mode="Default",
        idle_timeout_seconds=120,
        resources={"requests": amounts, "limits": dict(amounts)},
        security_context=CONTAINER_SECURITY,
        volume_mounts=[{"name": "tmp", "mountPath": "/tmp"}],
    )


def _serve_config(config: Config) -> dict[str, Any]:
    """As ``unimoe serve --write-config``, with each deployment on the pods that were sized for it."""
    tree = serve_config(config)
    (application,) = tree["applications"]
    for deployment in application["deployments"]:
        name = deployment["name"]
        if name in ENCODERS:
            deployment["ray_actor_options"]["label_selector"] = {MODALITY: name}
        elif name == "language":
            deployment["ray_actor_options"]["label_selector"] = {ROLE: name}
    return tree


def _upgrade(config: Config, overlay: Overlay) -> ServiceUpgradeStrategy:
    """A new cluster beside the old one. Incremental: traffic moves in steps, the old one shrinks as the new grows."""
    if not overlay.incremental:
        return ServiceUpgradeStrategy(type="NewCluster")
    options = ClusterUpgradeOptions(
        gateway_class_name=config.kubernetes.gateway_class,
        step_size_percent=25,
        interval_seconds=30,
        max_surge_percent=50,
    )
    return ServiceUpgradeStrategy(type="NewClusterWithIncrementalUpgrade", cluster_upgrade_options=options)


def ray_resources(config: Config, overlay: Overlay, plan: Plan) -> dict[str, list[Resource]]:
    """By file."""
    return {
        "raycluster.yaml": [shared_cluster(config, overlay, plan)],
        "rayjobs.yaml": list(stage_jobs(config, overlay, plan)),
        "rayservice.yaml": [endpoint(config, overlay, plan)],
    }
