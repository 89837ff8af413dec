"""KubeRay 1.7's resources as typed models: RayCluster, RayJob and RayService of ``ray.io/v1``, field for field.

What belongs to Kubernetes itself (pod templates, environment variables, ...) stays plain data, marked with the type
that ``core.py`` checks it against. Only what the custom resource definitions say is in here; rules of the operator are
in ``rules.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "ray.io/v1"


@dataclass(frozen=True)
class Core:
    """Marks data of a type of Kubernetes' own API, by its name in the ``kubernetes`` package."""

    name: str


Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
PodTemplate = Annotated[dict[str, Any], Core("V1PodTemplateSpec")]
Environment = Annotated[list[dict[str, Any]], Core("List[V1EnvVar]")]
Resources = Annotated[dict[str, Any], Core("V1ResourceRequirements")]
Service = Annotated[dict[str, Any], Core("V1Service")]
Metadata = Annotated[dict[str, Any], Core("V1ObjectMeta")]
Quantity = Annotated[int | str, Core("quantity")]
Manager = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]


class KubeModel(BaseModel):
    """camelCase outside, strict types, no unknown fields; a field that is null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class Resource(KubeModel):
    """What all three kinds have."""

    api_version: Literal["ray.io/v1"] = API_VERSION
    metadata: Metadata
    status: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """As it is applied: camelCase, without what was not given."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# RayCluster


class AuthOptions(KubeModel):
    mode: Literal["disabled", "token"] | None = None
    secret_name: str | None = None
    enable_k8s_token_auth: bool | None = Field(None, alias="enableK8sTokenAuth")


class AutoscalerOptions(KubeModel):
    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: Int32 | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: Environment | None = None
    env_from: Annotated[list[dict[str, Any]], Core("List[V1EnvFromSource]")] | None = None
    resources: Resources | None = None
    security_context: Annotated[dict[str, Any], Core("V1SecurityContext")] | None = None
    volume_mounts: Annotated[list[dict[str, Any]], Core("List[V1VolumeMount]")] | None = None


class RedisCredential(KubeModel):
    value: str | None = None
    value_from: Annotated[dict[str, Any], Core("V1EnvVarSource")] | None = None


class GcsStorage(KubeModel):
    """The volume of the embedded backend (rocksdb; behind a feature gate of the operator)."""

    size: Quantity | None = None
    storage_class_name: str | None = None
    access_modes: list[str] | None = None
    claim_name: str | None = None
    sub_path: str | None = None
    deletion_policy: Literal["DeleteWithCluster", "Retain"] | None = None


class GcsFaultToleranceOptions(KubeModel):
    backend: Literal["redis", "rocksdb"] | None = None
    redis_address: str | None = None
    redis_username: RedisCredential | None = None
    redis_password: RedisCredential | None = None
    external_storage_namespace: str | None = None
    storage: GcsStorage | None = None


class IngressTls(KubeModel):
    hosts: list[str] | None = None
    secret_name: str | None = None


class IngressOptions(KubeModel):
    host: str | None = None
    path: str | None = None
    path_type: Literal["Exact", "Prefix", "ImplementationSpecific"] | None = None
    tls: list[IngressTls] | None = None


class Group(KubeModel):
    """``labels`` are labels of the Ray nodes and of their pods; ``resources`` are Ray's, in the place of what is
    derived from the container's."""

    template: PodTemplate
    ray_start_params: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    resources: dict[str, str] | None = None


class HeadGroup(Group):
    service_type: str | None = None
    head_service: Service | None = None
    enable_ingress: bool | None = None
    ingress_options: IngressOptions | None = None


class ScaleStrategy(KubeModel):
    workers_to_delete: list[str] | None = None


class WorkerGroup(Group):
    group_name: str
    replicas: Int32 | None = None
    min_replicas: Int32 | None = None
    max_replicas: Int32 | None = None
    num_of_hosts: Int32 | None = None
    idle_timeout_seconds: Int32 | None = None
    priority: Int32 | None = None
    suspend: bool | None = None
    scale_strategy: ScaleStrategy | None = None


Rules = Annotated[list[dict[str, Any]], Core("List[V1NetworkPolicyIngressRule]")]
EgressRules = Annotated[list[dict[str, Any]], Core("List[V1NetworkPolicyEgressRule]")]


class GroupNetworkPolicy(KubeModel):
    ingress_rules: Rules | None = None
    egress_rules: EgressRules | None = None


class WorkerGroupNetworkPolicy(GroupNetworkPolicy):
    group_name: str


class NetworkPolicyOptions(KubeModel):
    """Behind a feature gate of the operator."""

    mode: Literal["DenyAll", "DenyAllIngress", "DenyAllEgress"] | None = None
    head: GroupNetworkPolicy | None = None
    worker: GroupNetworkPolicy | None = None
    worker_groups: list[WorkerGroupNetworkPolicy] | None = None


class CollectorOptions(KubeModel):
    image: str | None = None
    image_pull_policy: str | None = None
    env: Environment | None = None
    resources: Resources | None = None


class HistoryServerOptions(KubeModel):
    collector_options: CollectorOptions | None = None


class TlsOptions(KubeModel):
    enabled: bool | None = None


class ClusterUpgradeStrategy(KubeModel):
    type: Literal["Recreate", "None"] | None = None


class RayClusterSpec(KubeModel):
    ray_version: str | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup] | None = None
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    auth_options: AuthOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_service_annotations: dict[str, str] | None = None
    history_server_options: HistoryServerOptions | None = None
    managed_by: Manager | None = None
    network_policy: NetworkPolicyOptions | None = None
    suspend: bool | None = None
    tls_options: TlsOptions | None = None
    upgrade_strategy: ClusterUpgradeStrategy | None = None


class RayCluster(Resource):
    kind: Literal["RayCluster"] = "RayCluster"
    spec: RayClusterSpec


# RayJob


class DeletionCondition(KubeModel):
    job_status: Literal["SUCCEEDED", "FAILED"] | None = None
    job_deployment_status: Literal["Failed"] | None = None
    ttl_seconds: Count | None = None

    @model_validator(mode="after")
    def _one_status(self) -> DeletionCondition:
        if (self.job_status is None) == (self.job_deployment_status is None):
            raise ValueError("needs jobStatus or jobDeploymentStatus, and not both")
        return self


Policy = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]


class DeletionRule(KubeModel):
    policy: Policy
    condition: DeletionCondition


class DeletionPolicy(KubeModel):
    policy: Policy | None = None


class DeletionStrategy(KubeModel):
    deletion_rules: list[DeletionRule] | None = Field(None, min_length=1)
    on_success: DeletionPolicy | None = None
    on_failure: DeletionPolicy | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DeletionStrategy:
        legacy = [self.on_success is not None, self.on_failure is not None]
        if self.deletion_rules is not None and any(legacy):
            raise ValueError("has deletionRules and onSuccess or onFailure; only one way is allowed")
        if self.deletion_rules is None and not all(legacy):
            raise ValueError("needs deletionRules, or both onSuccess and onFailure")
        return self


class SubmitterConfig(KubeModel):
    backoff_limit: Int32 | None = None


class RayJobSpec(KubeModel):
    entrypoint: str | None = None
    ray_cluster_spec: RayClusterSpec | None = None
    cluster_selector: dict[str, str] | None = None
    submission_mode: str | None = None
    submitter_pod_template: PodTemplate | None = None
    submitter_config: SubmitterConfig | None = None
    runtime_env_yaml: str | None = Field(None, alias="runtimeEnvYAML")
    metadata: dict[str, str] | None = None
    job_id: str | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: str | None = None
    backoff_limit: Int32 | None = None
    active_deadline_seconds: Int32 | None = None
    pre_running_deadline_seconds: Int32 | None = Field(None, ge=1)
    shutdown_after_job_finishes: bool | None = None
    ttl_seconds_after_finished: Int32 | None = None
    deletion_strategy: DeletionStrategy | None = None
    suspend: bool | None = None
    managed_by: Manager | None = None


class RayJob(Resource):
    kind: Literal["RayJob"] = "RayJob"
    spec: RayJobSpec


# RayService


class ClusterUpgradeOptions(KubeModel):
    gateway_class_name: str
    step_size_percent: Int32
    interval_seconds: Int32
    max_surge_percent: Int32 | None = None


class ServiceUpgradeStrategy(KubeModel):
    type: str | None = None
    cluster_upgrade_options: ClusterUpgradeOptions | None = None


class RayServiceSpec(KubeModel):
    ray_cluster_config: RayClusterSpec
    serve_config_v2: str | None = Field(None, alias="serveConfigV2")
    serve_service: Service | None = None
    upgrade_strategy: ServiceUpgradeStrategy | None = None
    exclude_head_pod_from_serve_svc: bool | None = None
    ray_cluster_deletion_delay_seconds: Count | None = None
    service_unhealthy_second_threshold: Int32 | None = None
    deployment_unhealthy_second_threshold: Int32 | None = None
    suspend: bool | None = None
    managed_by: Manager | None = None


class RayService(Resource):
    kind: Literal["RayService"] = "RayService"
    spec: RayServiceSpec


KINDS: dict[str, type[Resource]] = {kind.__name__: kind for kind in (RayCluster, RayJob, RayService)}
