"""Small Ray resources that KubeRay's definitions accept, and what the operator writes into their status."""

from __future__ import annotations

from typing import Any

from kubernetes import client

from unimoe_ray.kuberay.client import Cluster
from unimoe_ray.kuberay.documents import Ref


def pod_template(name: str, **container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": name, "image": "unimoe:test", **container}]}}


def cluster_spec(workers: int = 1) -> dict[str, Any]:
    return {
        "rayVersion": "2.60.0",
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod_template("ray-head")},
        "workerGroupSpecs": [
            {
                "groupName": "llm",
                "replicas": workers,
                "minReplicas": 0,
                "maxReplicas": 4,
                "rayStartParams": {},
                "template": pod_template("ray-worker"),
            }
        ],
    }


def ray_cluster(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    return _document("RayCluster", name, namespace, cluster_spec() | spec)


def ray_job(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    rest = {"entrypoint": "python -m jobs.align", "rayClusterSpec": cluster_spec()}
    return _document("RayJob", name, namespace, rest | spec)


def ray_service(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    return _document("RayService", name, namespace, {"serveConfigV2": "{}", "rayClusterConfig": cluster_spec()} | spec)


def _document(kind: str, name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def play_status(cluster: Cluster, document: dict[str, Any], **status: Any) -> dict[str, Any]:
    """Write the status as the operator does: through the status subresource, merged into what is there."""
    api = client.CustomObjectsApi(cluster.api)
    metadata = document["metadata"]
    plural = cluster.resource(Ref.of(document, "default")).plural
    return api.patch_namespaced_custom_object_status(
        "ray.io",
        "v1",
        metadata["namespace"],
        plural,
        metadata["name"],
        {"status": status},
        _content_type="application/merge-patch+json",
    )


def true(type_: str, **rest: str) -> dict[str, str]:
    """A condition that holds."""
    return {
        "type": type_,
        "status": "True",
        "reason": "Played",
        "message": "",
        "lastTransitionTime": "2026-11-24T12:00:00Z",
        **rest,
    }


def false(type_: str, **rest: str) -> dict[str, str]:
    return true(type_, status="False", **rest)
