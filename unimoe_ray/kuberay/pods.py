"""Pod templates: what every pod of ours has, whatever it runs. None is root, none can write to its image."""

from __future__ import annotations

from typing import Any

from unimoe_ray.config import Config
from unimoe_ray.kuberay.overlays import API_KEYS_FILE, VOLUME, Overlay
from unimoe_ray.kuberay.sizing import Pod

Document = dict[str, Any]
USER = 1000
CONFIG_FOLDER = "/etc/unimoe/run"
ACCOUNT = "unimoe"
CLAIM = "unimoe"
AGENT_PORT, GCS_PORT, DASHBOARD_PORT, CLIENT_PORT, METRICS_PORT = 52365, 6379, 8265, 10001, 8080
# Until the endpoint's address and the Gateway have taken a pod out, before it is told to end.
PRE_STOP_S = 5
# From the end of draining to the end of the processes.
MARGIN_S = 20

CONTAINER_SECURITY: Document = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod_security(user: int = USER) -> Document:
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def labels(config: Config, component: str) -> dict[str, str]:
    """component: job, cluster, endpoint, redis."""
    return {
        "app.kubernetes.io/name": "unimoe",
        "app.kubernetes.io/part-of": "unimoe",
        "app.kubernetes.io/instance": resource_name(config),
        "app.kubernetes.io/component": component,
    }


def resource_name(config: Config, *parts: str) -> str:
    """Of the run, as Kubernetes allows it: ``uni-moe-7b-4e-align``. At most 47 characters (a RayJob's limit)."""
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in config.name.lower())
    name = name if name[0].isalpha() else f"run-{name}"
    end = "".join(f"-{part}" for part in parts)
    return name[: 47 - len(end)].rstrip("-") + end


def image(config: Config, overlay: Overlay) -> str:
    settings = config.kubernetes
    return f"{settings.image}:{settings.image_tag}-{'cuda' if overlay.gpu else 'cpu'}"


def ray_pod(config: Config, overlay: Overlay, pod: Pod, *, component: str, drain_s: int, is_head: bool) -> Document:
    """The template of a head or of a worker group. ``drain_s``: how long it may go on once it is told to end."""
    serves = component == "endpoint"
    container = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": image(config, overlay),
        "imagePullPolicy": "IfNotPresent",
        "workingDir": VOLUME,
        "env": [{"name": name, "value": value} for name, value in _environment(config, drain_s, serves).items()]
        + [_hub_token()],
        "ports": _ports(config, is_head, serves),
        "resources": _resources(pod),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": _mounts(config, serves),
        # Then Ray gets SIGTERM, tells all that the node goes, and lets what runs end or move until drain_s are over.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}},
        **_probes(config, serves and not is_head),
    }
    spec = {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": PRE_STOP_S + drain_s + MARGIN_S,
        "containers": [container],
        "volumes": _volumes(config, pod, serves),
        **_placement(config, overlay, pod, serves, is_head),
    }
    if is_head and (serves or overlay.scales):
        # The autoscaler beside it needs an account with rights to this RayCluster: the operator makes one.
        del spec["serviceAccountName"], spec["automountServiceAccountToken"]
    if config.kubernetes.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": config.kubernetes.image_pull_secret}]
    why = {"unimoe.io/memory": pod.arithmetic}
    for _, need in pod.runs if pod.gpus else ():
        terms = " + ".join(f"{term.what} {term.gib:.2f} ({term.how})" for term in need.device)
        why["unimoe.io/gpu-memory"] = f"{need.of}: {terms} = {need.device_gib:.1f} GiB"
    return {"metadata": {"labels": labels(config, component), "annotations": why}, "spec": spec}


def submitter(config: Config, overlay: Overlay) -> Document:
    """The pod that hands a job to its cluster and prints its output."""
    container = {
        "name": "ray-job-submitter",
        "image": image(config, overlay),
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {kind: {"cpu": "500m", "memory": "1Gi"} for kind in ("requests", "limits")},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    if config.kubernetes.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": config.kubernetes.image_pull_secret}]
    return {"metadata": {"labels": labels(config, "job")}, "spec": spec}


def quantity(gib: float) -> str:
    return f"{gib:g}Gi" if gib == int(gib) else f"{round(gib * 1024)}Mi"


def _resources(pod: Pod) -> Document:
    amounts: dict[str, Any] = {"cpu": f"{pod.cpus:g}", "memory": quantity(pod.memory_gib)}
    if pod.gpus:
        amounts["nvidia.com/gpu"] = str(pod.gpus)
    return {"requests": amounts, "limits": dict(amounts)}


def _environment(config: Config, drain_s: int, serves: bool) -> dict[str, str]:
    variables = {
        "HOME": "/home/unimoe",
        "XDG_CACHE_HOME": f"{VOLUME}/cache",  # Shared: what a job fetched, the endpoint finds.
        "HF_HOME": f"{VOLUME}/cache/huggingface",
        "MPLCONFIGDIR": "/tmp/matplotlib",
        "TORCH_EXTENSIONS_DIR": "/tmp/torch_extensions",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "OMP_NUM_THREADS": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if serves:
        variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serve.proxy:middlewares"
        variables["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
        # Fewer threads that hand a message to each other; nothing in the deployments blocks one for long.
        variables["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "0"
        variables["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"
        if config.serving.throughput_mode:
            variables |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    return variables


def _hub_token() -> Document:
    """For models of the Hugging Face hub that ask for one; the Secret may be absent."""
    reference = {"name": "unimoe-hub", "key": "token", "optional": True}
    return {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}


def _ports(config: Config, is_head: bool, serves: bool) -> list[Document]:
    ports = {"metrics": METRICS_PORT}
    if is_head:
        ports |= {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": CLIENT_PORT}
    if serves:
        ports["serve"] = config.serving.port
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _mounts(config: Config, serves: bool) -> list[Document]:
    mounts = [
        {"name": "runs", "mountPath": VOLUME},
        {"name": "configuration", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": "/home/unimoe"},
        {"name": "objects", "mountPath": "/dev/shm"},
    ]
    if serves and config.serving.api_keys_file is not None:
        mounts.append({"name": "api-keys", "mountPath": API_KEYS_FILE.rpartition("/")[0], "readOnly": True})
    return mounts


def _volumes(config: Config, pod: Pod, serves: bool) -> list[Document]:
    volumes: list[Document] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "configuration", "configMap": {"name": resource_name(config, "config")}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "50Gi"}},
        {"name": "home", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "objects", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(pod.objects_gib)}},
    ]
    if serves and config.serving.api_keys_file is not None:
        volumes.append({"name": "api-keys", "secret": {"secretName": resource_name(config, "api-keys")}})
    return volumes


def _probes(config: Config, answers_http: bool) -> Document:
    """Ray's agent knows whether the node works (on a head: GCS too); Serve's proxy whether it takes requests."""
    alive = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
    ready = {"httpGet": {"path": "/-/healthz", "port": config.serving.port}} if answers_http else alive
    return {
        "startupProbe": alive | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 60},
        "livenessProbe": alive | {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 12},
        "readinessProbe": ready | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
    }


def _placement(config: Config, overlay: Overlay, pod: Pod, serves: bool, is_head: bool) -> Document:
    """On which nodes: their kind, on demand or spot, replicas of the endpoint apart, training nodes together."""
    settings = config.kubernetes
    selector, tolerations = dict(pod.node.selector), []
    if pod.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if overlay.spot and is_head:
        selector |= settings.on_demand
    elif overlay.spot:
        selector |= settings.spot
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in settings.spot.items()
        ]
    result: Document = {}
    if selector:
        result["nodeSelector"] = selector
    if tolerations:
        result["tolerations"] = tolerations
    group = {"matchLabels": {"ray.io/group": pod.name}}
    if serves and not is_head:
        result["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": group,
                "matchLabelKeys": ["ray.io/cluster"],
            }
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ]
    elif pod.name == "train" and overlay.gpu:
        near = {
            "topologyKey": "topology.kubernetes.io/zone",
            "labelSelector": group,
            "matchLabelKeys": ["ray.io/cluster"],
        }
        preferred = [{"weight": 100, "podAffinityTerm": near}]
        result["affinity"] = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    return result
