"""Small valid documents that tests change."""

from __future__ import annotations

import copy
from typing import Any


def pod(name: str = "ray") -> dict[str, Any]:
    resources = {"limits": {"cpu": "1", "memory": "2Gi"}, "requests": {"cpu": 1, "memory": "2Gi"}}
    container = {"name": name, "image": "unimoe-ray:test", "resources": resources, "env": [{"name": "A", "value": "1"}]}
    return {"spec": {"containers": [container]}}


def cluster_spec() -> dict[str, Any]:
    return {
        "rayVersion": "2.60.0",
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
        "authOptions": {"mode": "token"},
        "managedBy": "ray.io/kuberay-operator",
        "gcsFaultToleranceOptions": {"backend": "redis", "redisAddress": "redis:6379"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod()},
        "workerGroupSpecs": [
            {"groupName": "train", "replicas": 1, "minReplicas": 1, "maxReplicas": 3, "template": pod()},
        ],
    }


def ray_cluster(name: str = "cluster") -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": "unimoe"},
        "spec": cluster_spec(),
    }


def ray_job(name: str = "job") -> dict[str, Any]:
    spec = {
        "entrypoint": "python -m jobs.align",
        "backoffLimit": 2,
        "rayClusterSpec": cluster_spec(),
        "deletionStrategy": {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 3600}},
            ]
        },
    }
    return ray_cluster(name) | {"kind": "RayJob", "spec": spec}


def ray_service(name: str = "service") -> dict[str, Any]:
    options = {"gatewayClassName": "istio", "stepSizePercent": 25, "intervalSeconds": 10, "maxSurgePercent": 50}
    spec = {
        "rayClusterConfig": cluster_spec(),
        "serveConfigV2": "applications: []",
        "upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options},
    }
    return ray_cluster(name) | {"kind": "RayService", "spec": spec}


ABSENT = object()


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which ``spec.workerGroupSpecs.0.minReplicas`` or the like is another, or ABSENT."""
    result = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = result
    for part in parents:
        node = node[part] if isinstance(node, list) else node.setdefault(part, {})
    if value is ABSENT:
        del node[last]
    else:
        node[last] = value
    return result
