"""What the Ray resources need around them: namespace, account, network, Redis, volume, configuration, alerts, queue."""

from __future__ import annotations

from typing import Any

from unimoe_ray.config import Config, dump
from unimoe_ray.kuberay.documents import HELD
from unimoe_ray.kuberay.overlays import Overlay
from unimoe_ray.kuberay.pods import ACCOUNT, CLAIM, CONTAINER_SECURITY, pod_security, resource_name
from unimoe_ray.kuberay.sizing import Plan
from unimoe_ray.kuberay.workloads import REDIS

Document = dict[str, Any]
REDIS_IMAGE, REDIS_PORT, REDIS_USER = "redis:7.4-alpine", 6379, 999
OURS = {"app.kubernetes.io/part-of": "unimoe"}
COMPONENT = "app.kubernetes.io/component"
QUEUE_FLAVOR = "unimoe"


def base(config: Config) -> dict[str, list[Document]]:
    """What is the same in every overlay, by file."""
    space = config.kubernetes.namespace
    return {
        "namespace.yaml": [_namespace(space)],
        "account.yaml": [_account(space)],
        "network.yaml": _network(config),
        "disruption.yaml": _disruption(space),
        "redis.yaml": _redis(space),
    }


def of_run(config: Config, plan: Plan) -> dict[str, list[Document]]:
    """What an overlay has for its configuration."""
    space = config.kubernetes.namespace
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(resource_name(config, "config"), space),
        "data": {"config.yaml": dump(config)},
    }
    claim: Document = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{plan.storage_gib}Gi"}},
    }
    if config.kubernetes.storage_class:
        claim["storageClassName"] = config.kubernetes.storage_class
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(CLAIM, space),
        "spec": claim,
    }
    return {"config.yaml": [settings], "volume.yaml": [volume]}


def monitoring(config: Config) -> dict[str, list[Document]]:
    """For the Prometheus operator."""
    return {"podmonitor.yaml": [_pod_monitor(config)], "rules.yaml": [_rules(config)]}


def queue(config: Config, plan: Plan, overlay: Overlay) -> dict[str, list[Document]]:
    """Kueue's: what jobs may have together, the queue where they wait for it, and the one where they wait for us."""
    train, encode = plan.pods["train"], plan.pods.get("encode")
    pods = [(train, train.most), *([(encode, encode.most)] if encode else []), (plan.pods["job-head"], 1)]
    amounts = {
        "cpu": f"{sum(pod.cpus * count for pod, count in pods) + 2:g}",
        "memory": f"{sum(pod.memory_gib * count for pod, count in pods) + 4:g}Gi",
    }
    if overlay.gpu:
        amounts["nvidia.com/gpu"] = str(sum(pod.gpus * count for pod, count in pods))
    name, space = config.kubernetes.queue, config.kubernetes.namespace
    api = "kueue.x-k8s.io/v1beta2"
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in amounts.items()]
    group = {"coveredResources": list(amounts), "flavors": [{"name": QUEUE_FLAVOR, "resources": resources}]}
    cluster_queue = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space}},
        "resourceGroups": [group],
    }
    return {
        "queue.yaml": [
            {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": QUEUE_FLAVOR}, "spec": {}},
            {"apiVersion": api, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": cluster_queue},
            *(
                {"apiVersion": api, "kind": "LocalQueue", "metadata": _metadata(local, space), "spec": spec}
                for local, spec in (
                    (name, {"clusterQueue": name}),
                    (name + HELD, {"clusterQueue": name, "stopPolicy": "Hold"}),
                )
            ),
        ]
    }


def _metadata(name: str, namespace: str, **more: Any) -> Document:
    return {"name": name, "namespace": namespace, "labels": dict(OURS), **more}


def _namespace(name: str) -> Document:
    """Where Kubernetes itself refuses a pod that is root, privileged or without a seccomp profile."""
    marks = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": OURS | marks}}


def _account(space: str) -> Document:
    """Without rights, and without a token in the pods."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(ACCOUNT, space),
        "automountServiceAccountToken": False,
    }


def _network(config: Config) -> list[Document]:
    """Nobody reaches our pods, except each other, the operator, Prometheus, and anyone on the endpoint's port."""
    space = config.kubernetes.namespace
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    prometheus = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    ours = {"podSelector": {"matchLabels": OURS}}
    endpoint = {"matchLabels": OURS | {COMPONENT: "endpoint"}}
    redis = {"matchLabels": OURS | {COMPONENT: "redis"}}
    not_redis = {
        "matchLabels": OURS,
        "matchExpressions": [{"key": COMPONENT, "operator": "NotIn", "values": ["redis"]}],
    }
    heads = {"podSelector": {"matchExpressions": [
        {"key": "ray.io/node-type", "operator": "In", "values": ["head", "redis-cleanup"]}
    ]}}  # fmt: skip

    def policy(name: str, selector: Document, rules: list[Document]) -> Document:
        spec = {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules}
        return _network_policy(name, space, spec)

    return [
        _network_policy("unimoe-deny", space, {"podSelector": {}, "policyTypes": ["Ingress"]}),
        policy("unimoe-ray", not_redis, [{"from": [ours, operator]}, {"from": [prometheus], "ports": _tcp("metrics")}]),
        policy("unimoe-endpoint", endpoint, [{"ports": _tcp(config.serving.port)}]),
        policy("unimoe-redis", redis, [{"from": [heads], "ports": _tcp(REDIS_PORT)}]),
    ]


def _tcp(port: int | str) -> list[Document]:
    return [{"protocol": "TCP", "port": port}]


def _network_policy(name: str, space: str, spec: Document) -> Document:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name, space),
        "spec": spec,
    }


def _disruption(space: str) -> list[Document]:
    """Draining nodes takes one pod of the endpoint at a time, and waits for a job whose head is there."""

    def budget(name: str, component: str, node_type: str, unavailable: int) -> Document:
        selector = {"matchLabels": OURS | {COMPONENT: component, "ray.io/node-type": node_type}}
        return {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": _metadata(name, space),
            "spec": {"maxUnavailable": unavailable, "selector": selector},
        }

    return [budget("unimoe-endpoint", "endpoint", "worker", 1), budget("unimoe-job-heads", "job", "head", 0)]


def _redis(space: str) -> list[Document]:
    """Where the endpoint's clusters keep their state, so that a head that is lost takes no worker with it."""
    marks = OURS | {"app.kubernetes.io/name": REDIS, COMPONENT: "redis"}
    password = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": REDIS, "key": "password"}}}
    amounts = {"cpu": "250m", "memory": "512Mi"}
    container = {
        "name": "redis",
        "image": REDIS_IMAGE,
        "args": ["--appendonly", "yes", "--dir", "/data", "--requirepass", "$(REDIS_PASSWORD)"],
        "env": [password],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": CONTAINER_SECURITY,
        "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 5},
        "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(REDIS_USER),
        "containers": [container],
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(REDIS, space),
        "spec": {"selector": marks, "ports": [{"name": "redis", "port": REDIS_PORT}]},
    }
    stateful = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _metadata(REDIS, space),
        "spec": {
            "serviceName": REDIS,
            "replicas": 1,
            "selector": {"matchLabels": marks},
            "template": {"metadata": {"labels": marks}, "spec": pod},
            "volumeClaimTemplates": [claim],
        },
    }
    return [service, stateful]


def _pod_monitor(config: Config) -> Document:
    keep = [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for label, target in (("ray_io_cluster", "ray_io_cluster"), ("ray_io_group", "ray_io_group"))
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata("unimoe", config.kubernetes.namespace),
        "spec": {
            "selector": {"matchLabels": OURS},
            "podMetricsEndpoints": [{"port": "metrics", "interval": "15s", "relabelings": keep}],
        },
    }


def _rules(config: Config) -> Document:
    limit = config.serving.limits.request_seconds / 10
    rules = [
        _alert(
            "UnimoeErrors",
            'sum by (application) (rate(ray_unimoe_requests_total{status=~"5.."}[5m]))'
            " / sum by (application) (rate(ray_unimoe_requests_total[5m])) > 0.02",
            "more than 2 % of the requests to {{ $labels.application }} fail",
            severity="critical",
        ),
        _alert(
            "UnimoeShedsLoad",
            'sum by (application) (rate(ray_unimoe_requests_total{status=~"429|503"}[10m])) > 0.5',
            "{{ $labels.application }} sends requests away: it has as many replicas as it may have",
        ),
        _alert(
            "UnimoeSlowFirstToken",
            "histogram_quantile(0.95, sum by (le, application) (rate(ray_unimoe_ttft_seconds_bucket[10m])))"
            f" > {limit:g}",
            f"one request in twenty to {{{{ $labels.application }}}} waits more than {limit:g} s for its first token",
        ),
        _alert(
            "UnimoeNoLanguageModel",
            'sum by (application) (ray_serve_deployment_replica_healthy{deployment="language"}) == 0',
            "{{ $labels.application }} has no language model that runs",
            severity="critical",
        ),
        _alert(
            "UnimoeKvCacheFull",
            "sum by (application) (ray_unimoe_engine_kv_tokens_used)"
            " / sum by (application) (ray_unimoe_engine_kv_tokens) > 0.95",
            "requests to {{ $labels.application }} wait for room in the KV cache",
        ),
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _metadata("unimoe", config.kubernetes.namespace),
        "spec": {"groups": [{"name": "unimoe", "rules": rules}]},
    }


def _alert(name: str, expression: str, says: str, severity: str = "warning") -> Document:
    return {
        "alert": name,
        "expr": expression,
        "for": "10m",
        "labels": {"severity": severity},
        "annotations": {"summary": says},
    }
