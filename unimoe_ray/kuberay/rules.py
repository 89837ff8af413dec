"""What KubeRay's operator refuses although the API server takes it: the rules of its ``validation.go`` (1.7).

The operator says so in an event and in the status of the object, some time after it was applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from unimoe_ray.kuberay.models import (
    DeletionStrategy,
    Group,
    RayCluster,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    RayService,
    RayServiceSpec,
    Resource,
    WorkerGroup,
)
from unimoe_ray.kuberay.problems import Path, Problem, problem

NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
MIN_RAY_FOR_TOKENS = (2, 52)
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
# In the order in which they may happen.
DELETIONS = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def operator_problems(resource: Resource) -> Iterator[Problem]:
    yield from _name_problems(resource.kind, resource.metadata)
    if isinstance(resource, RayCluster):
        yield from _cluster_problems(resource.spec, ("spec",))
    elif isinstance(resource, RayJob):
        yield from _job_problems(resource.spec, ("spec",))
    elif isinstance(resource, RayService):
        yield from _service_problems(resource.spec, ("spec",))


def _name_problems(kind: str, metadata: dict[str, Any]) -> Iterator[Problem]:
    name, path = metadata.get("name"), ("metadata", "name")
    if not isinstance(name, str):
        return
    if len(name) > NAME_LENGTH[kind]:
        yield problem(path, f"has {len(name)} characters; a {kind} may have {NAME_LENGTH[kind]}")
    if not _DNS_LABEL.fullmatch(name):
        yield problem(path, f"is '{name}'; allowed: a letter, then letters, digits and '-', all lower case")


def _cluster_problems(spec: RayClusterSpec, path: Path) -> Iterator[Problem]:
    head, here = spec.head_group_spec, (*path, "headGroupSpec")
    scales = bool(spec.enable_in_tree_autoscaling)
    options = spec.autoscaler_options
    has_v2 = scales and options is not None and options.version == "v2"
    yield from _group_problems(head, here, has_v2)
    for index, group in enumerate(spec.worker_group_specs or []):
        at = (*path, "workerGroupSpecs", index)
        yield from _group_problems(group, at, has_v2)
        yield from _worker_problems(group, at, scales, has_v2)
    if options and options.idle_timeout_seconds is not None and options.idle_timeout_seconds < 0:
        yield problem((*path, "autoscalerOptions", "idleTimeoutSeconds"), "must be from 0")
    yield from _auth_problems(spec, path)
    if spec.gcs_fault_tolerance_options is not None:
        given = _environment(head.template)
        for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
            if name in given:
                yield problem((*here, "template"), f"sets {name}; use gcsFaultToleranceOptions.{field}")
        if (head.ray_start_params or {}).get("redis-password"):
            yield problem((*here, "rayStartParams"), "has redis-password; use gcsFaultToleranceOptions.redisPassword")


def _auth_problems(spec: RayClusterSpec, path: Path) -> Iterator[Problem]:
    auth = spec.auth_options
    if auth is None:
        return
    if auth.mode != "token":
        if auth.enable_k8s_token_auth:
            yield problem((*path, "authOptions", "enableK8sTokenAuth"), "needs authOptions.mode: token")
        return
    found = re.match(r"v?(\d+)\.(\d+)", spec.ray_version or "")
    if not found:
        yield problem((*path, "rayVersion"), "is missing; authOptions.mode: token needs to know it")
    elif (int(found[1]), int(found[2])) < MIN_RAY_FOR_TOKENS:
        wanted = ".".join(map(str, MIN_RAY_FOR_TOKENS))
        yield problem((*path, "rayVersion"), f"is {spec.ray_version}; authOptions.mode: token needs {wanted}")
    if auth.enable_k8s_token_auth and auth.secret_name:
        yield problem((*path, "authOptions", "secretName"), "cannot be set together with enableK8sTokenAuth")


def _group_problems(group: Group, path: Path, has_v2: bool) -> Iterator[Problem]:
    pod = group.template.get("spec") or {}
    if not pod.get("containers"):
        yield problem((*path, "template", "spec", "containers"), "is empty; the first one runs Ray")
    params = group.ray_start_params or {}
    if group.resources and (both := [k for k in ("num-cpus", "num-gpus", "memory", "resources") if params.get(k)]):
        yield problem((*path, "resources"), f"and rayStartParams.{both[0]} are both set; only one place is allowed")
    if "labels" in params:
        yield problem((*path, "rayStartParams", "labels"), "is not supported; use the group's labels")
    for key, value in (group.labels or {}).items():
        if not _LABEL_KEY.fullmatch(key):
            yield problem((*path, "labels", key), "is no key of a label")
        if not _LABEL_VALUE.fullmatch(value):
            yield problem((*path, "labels", key), f"is '{value}'; up to 63 letters, digits, '-', '_' and '.'")
    if has_v2 and pod.get("restartPolicy", "Never") != "Never":
        yield problem((*path, "template", "spec", "restartPolicy"), "must be Never, or unset, with autoscaler v2")


def _worker_problems(group: WorkerGroup, path: Path, scales: bool, has_v2: bool) -> Iterator[Problem]:
    low, high, idle = group.min_replicas, group.max_replicas, group.idle_timeout_seconds
    for name, value in (("minReplicas", low), ("maxReplicas", high), ("idleTimeoutSeconds", idle)):
        if value is not None and value < 0:
            yield problem((*path, name), f"is {value}; must be from 0")
    if low is not None and high is not None and low > high:
        yield problem((*path, "minReplicas"), f"is {low}, above maxReplicas, {high}")
    if idle is not None and not has_v2:
        yield problem((*path, "idleTimeoutSeconds"), "needs autoscalerOptions.version: v2")
    if scales and group.suspend:
        yield problem((*path, "suspend"), "is not possible with enableInTreeAutoscaling")


def _job_problems(spec: RayJobSpec, path: Path) -> Iterator[Problem]:
    stays = not spec.shutdown_after_job_finishes
    if spec.suspend and stays:
        yield problem((*path, "suspend"), "needs shutdownAfterJobFinishes: true")
    ttl = spec.ttl_seconds_after_finished or 0
    if ttl < 0:
        yield problem((*path, "ttlSecondsAfterFinished"), f"is {ttl}; must be from 0")
    if ttl > 0 and stays:
        yield problem((*path, "ttlSecondsAfterFinished"), "needs shutdownAfterJobFinishes: true")
    for name, value, lowest in (
        ("activeDeadlineSeconds", spec.active_deadline_seconds, 1),
        ("backoffLimit", spec.backoff_limit, 0),
    ):
        if value is not None and value < lowest:
            yield problem((*path, name), f"is {value}; must be from {lowest}")
    mode = spec.submission_mode or "K8sJobMode"
    if mode not in SUBMISSION_MODES:
        yield problem((*path, "submissionMode"), f"is '{mode}'; allowed: {', '.join(SUBMISSION_MODES)}")
    if mode == "SidecarMode" and spec.submitter_pod_template is not None:
        yield problem((*path, "submitterPodTemplate"), "is not possible with submissionMode: SidecarMode")
    if spec.deletion_strategy is not None:
        yield from _deletion_problems(spec, spec.deletion_strategy, (*path, "deletionStrategy"))
    if spec.cluster_selector:
        yield from _selector_problems(spec, path)
    elif spec.ray_cluster_spec is None:
        yield problem((*path, "rayClusterSpec"), "is missing; a job needs it, or a clusterSelector")
    if spec.ray_cluster_spec is not None:
        yield from _no_kubernetes_tokens(spec.ray_cluster_spec, (*path, "rayClusterSpec"), "RayJob")
        yield from _cluster_problems(spec.ray_cluster_spec, (*path, "rayClusterSpec"))


def _selector_problems(spec: RayJobSpec, path: Path) -> Iterator[Problem]:
    if not (spec.cluster_selector or {}).get("ray.io/cluster"):
        yield problem((*path, "clusterSelector", "ray.io/cluster"), "is missing; it names the RayCluster")
    if spec.suspend:
        yield problem((*path, "suspend"), "is not possible with a clusterSelector")
    if (spec.backoff_limit or 0) > 0:
        yield problem((*path, "backoffLimit"), "is not possible with a clusterSelector")


def _deletion_problems(spec: RayJobSpec, strategy: DeletionStrategy, path: Path) -> Iterator[Problem]:
    if strategy.deletion_rules is not None and spec.shutdown_after_job_finishes:
        yield problem((*path, "deletionRules"), "and shutdownAfterJobFinishes are both set; only one is allowed")
    scales = spec.ray_cluster_spec is not None and bool(spec.ray_cluster_spec.enable_in_tree_autoscaling)
    times: dict[tuple[str, str], int] = {}
    for index, rule in enumerate(strategy.deletion_rules or []):
        at = (*path, "deletionRules", index)
        status = str(rule.condition.job_status or rule.condition.job_deployment_status)
        if scales and rule.policy == "DeleteWorkers":
            yield problem((*at, "policy"), "is DeleteWorkers, which is not possible with enableInTreeAutoscaling")
        if (status, rule.policy) in times:
            yield problem(at, f"is a second rule with {rule.policy} for {status}")
        times[status, rule.policy] = rule.condition.ttl_seconds or 0
        for before in DELETIONS[: DELETIONS.index(rule.policy)] if rule.policy in DELETIONS else ():
            if times.get((status, before), 0) > times[status, rule.policy]:
                yield problem((*at, "condition", "ttlSeconds"), f"of {rule.policy} is below that of {before}")


def _service_problems(spec: RayServiceSpec, path: Path) -> Iterator[Problem]:
    cluster = spec.ray_cluster_config
    yield from _no_kubernetes_tokens(cluster, (*path, "rayClusterConfig"), "RayService")
    yield from _cluster_problems(cluster, (*path, "rayClusterConfig"))
    strategy, here = spec.upgrade_strategy, (*path, "upgradeStrategy")
    if strategy is None or strategy.type is None:
        return
    if strategy.type not in UPGRADES:
        yield problem((*here, "type"), f"is '{strategy.type}'; allowed: {', '.join(UPGRADES)}")
    if strategy.type != "NewClusterWithIncrementalUpgrade":
        return
    if not cluster.enable_in_tree_autoscaling:
        yield problem((*here, "type"), "needs rayClusterConfig.enableInTreeAutoscaling: true")
    options, at = strategy.cluster_upgrade_options, (*here, "clusterUpgradeOptions")
    if options is None:
        yield problem(at, "is missing; NewClusterWithIncrementalUpgrade needs it")
        return
    surge = 100 if options.max_surge_percent is None else options.max_surge_percent
    if not 0 <= surge <= 100:
        yield problem((*at, "maxSurgePercent"), f"is {surge}; allowed: 0 to 100")
    if not 0 <= options.step_size_percent <= min(surge, 100):
        yield problem(
            (*at, "stepSizePercent"), f"is {options.step_size_percent}; allowed: 0 to maxSurgePercent, {surge}"
        )
    if options.interval_seconds <= 0:
        yield problem((*at, "intervalSeconds"), f"is {options.interval_seconds}; must be above 0")


def _no_kubernetes_tokens(spec: RayClusterSpec, path: Path, kind: str) -> Iterator[Problem]:
    if spec.auth_options is not None and spec.auth_options.enable_k8s_token_auth:
        yield problem((*path, "authOptions", "enableK8sTokenAuth"), f"is not supported for a {kind}")


def _environment(template: dict[str, Any]) -> set[str]:
    """Names of the variables of the container that runs Ray."""
    containers = (template.get("spec") or {}).get("containers") or [{}]
    return {str(variable.get("name")) for variable in containers[0].get("env") or []}
