"""The manifests: as rendered, complete, accepted by a real API server, and by Kubernetes' own policies for pods."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.kubernetes.conftest import crds, kubectl
from unimoe_ray import config
from unimoe_ray.kuberay.core import core_kind
from unimoe_ray.kuberay.models import KINDS
from unimoe_ray.kuberay.overlays import OVERLAYS, in_cluster
from unimoe_ray.kuberay.render import render, write
from unimoe_ray.kuberay.sizing import plan
from unimoe_ray.kuberay.submit import started
from unimoe_ray.parameter_table import Sizes, count_parameters

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.36"  # as the API server of the other tests
# Nothing here knows their schemas; that they are there, and whom they name, is checked.
UNCHECKED = {"PodMonitor", "PrometheusRule", "ResourceFlavor", "ClusterQueue", "LocalQueue"}


@cache
def sizes(preset: str) -> Sizes:
    return count_parameters(config.load(preset))


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    """The documents of ``kubectl kustomize`` of what is committed."""
    import subprocess

    command = [kubectl(), "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [document for document in built(overlay) if document["kind"] in kinds]


def pods(document: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod specification in a document."""
    if isinstance(document, dict):
        if "containers" in document:
            yield path, document
        for key, value in document.items():
            yield from pods(value, f"{path}.{key}")
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from pods(value, f"{path}[{index}]")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_committed_is_what_is_rendered(overlay):
    preset = OVERLAYS[overlay].preset
    files = render(config.load(preset), OVERLAYS[overlay], sizes(preset), preset)
    differing = [path for path, text in files.items() if (ROOT / "k8s" / path).read_text(encoding="utf-8") != text]
    assert not differing, f"render again: unimoe k8s render --config {preset} --overlay {overlay}"
    there = {
        str(path.relative_to(ROOT / "k8s"))
        for folder in {str(Path(path).parent) for path in files}
        for path in (ROOT / "k8s" / folder).iterdir()
        if path.is_file()
    }
    assert there == set(files)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_has_a_cluster_a_job_for_each_stage_and_the_endpoint(overlay):
    settings = config.load(OVERLAYS[overlay].preset)
    stages = [stage for stage, runs in settings.stages if runs]
    jobs = {document["spec"]["entrypoint"].split()[2] for document in of_kind(overlay, "RayJob")}
    assert jobs == {f"jobs.{step}" for step in ("prepare", *stages, "evaluate", "pipeline")}
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in jobs)
    assert len(of_kind(overlay, "RayCluster")) == len(of_kind(overlay, "RayService")) == 1
    kinds = {document["kind"] for document in built(overlay)}
    wanted = {
        "Namespace",
        "ServiceAccount",
        "PersistentVolumeClaim",
        "ConfigMap",
        "NetworkPolicy",
        "PodDisruptionBudget",
    }
    assert wanted <= kinds
    if OVERLAYS[overlay].gpu:
        assert {"PodMonitor", "PrometheusRule"} <= kinds
    # Everything of ours that lies in a namespace says in which.
    cluster_wide = ("Namespace", "ResourceFlavor", "ClusterQueue")
    assert all(d["kind"] in cluster_wide or d["metadata"].get("namespace") == "unimoe" for d in built(overlay))
    assert all(document["spec"]["suspend"] for document in of_kind(overlay, *KINDS)), "nothing starts unasked"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_server_takes_every_ray_document_and_stores_it_with_defaults_only(api_server, overlay):
    documents = of_kind(overlay, *KINDS)
    answer = api_server.kubectl(
        "apply", "--server-side", "--field-manager=test", "--force-conflicts", "-f", "-",
        stdin=yaml.safe_dump_all(documents),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == len(documents)
    text = api_server.kubectl("-n", "unimoe", "get", "rayclusters,rayjobs,rayservices", "-o", "json").stdout
    stored = {(item["kind"], item["metadata"]["name"]): item for item in json.loads(text)["items"]}
    for document in documents:
        found = stored[document["kind"], document["metadata"]["name"]]
        assert found["spec"] == with_defaults(document["spec"], schema(document["kind"])["properties"]["spec"])
        assert document["metadata"].items() <= found["metadata"].items()


@cache
def schema(kind: str) -> dict[str, Any]:
    text = (crds() / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    return next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """What a CRD's API server stores: values, and defaults of fields that are missing in objects that are there."""
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    defaults = {key: below["default"] for key, below in known.items() if "default" in below}
    below = {key: known.get(key, others if isinstance(others, dict) else {}) for key in value}
    return defaults | {key: with_defaults(item, below[key]) for key, item in value.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_are_valid(overlay):
    documents = [document for document in built(overlay) if core_kind(document)]
    assert len(documents) >= 12
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    # The pods inside the Ray resources, too.
    for document in of_kind(overlay, *KINDS):
        for path, spec in pods(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
            try:
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{document['metadata']['name']}{path}: {error}")


def test_core_kinds_that_are_wrong_are_not_valid():
    """The validator itself."""
    (account,) = of_kind("cpu-mini", "ServiceAccount")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(account | {"automount": False}, KUBERNETES, strict=True)


@pytest.mark.parametrize("kind", sorted(UNCHECKED))
def test_kinds_of_other_operators(kind):
    """Neither the API server here nor kubernetes-validate knows them: the skip says so."""
    documents = [document for overlay in OVERLAYS for document in of_kind(overlay, kind)]
    assert documents
    assert all(core_kind(document) is None and document["kind"] not in KINDS for document in documents)
    pytest.skip(f"the schema of {documents[0]['apiVersion']} {kind} is checked by nothing here")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_kind_is_unknown(overlay):
    kinds = {document["kind"] for document in built(overlay) if not core_kind(document)}
    assert kinds <= UNCHECKED | KINDS.keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_is_root_or_unlimited_or_can_write_to_its_image(overlay):
    """The rules of the Pod Security Standard 'restricted', and ours: limits, a read-only root."""
    found = [(document, path, pod) for document in built(overlay) for path, pod in pods(document)]
    assert len(found) > 20
    for document, path, pod in found:
        where = f"{document['kind']} {document['metadata']['name']}{path}"
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, where
        assert security["seccompProfile"]["type"] == "RuntimeDefault", where
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}, where
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        assert all(volume.keys() - {"name"} <= allowed for volume in pod.get("volumes", [])), where
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            _check_container(container, where)
    for document in of_kind(overlay, *KINDS):
        spec = document["spec"]
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        assert cluster["authOptions"] == {"mode": "token"}
        if cluster["enableInTreeAutoscaling"]:
            _check_container(cluster["autoscalerOptions"], f"autoscaler of {document['metadata']['name']}")


def _check_container(container: dict[str, Any], where: str) -> None:
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True, where
    assert security["capabilities"] == {"drop": ["ALL"]} and security["runAsNonRoot"] is True, where
    assert security["seccompProfile"]["type"] == "RuntimeDefault", where
    amounts = container["resources"]
    assert {"cpu", "memory"} <= amounts["limits"].keys() and amounts["limits"] == amounts["requests"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_in_a_manifest(overlay):
    assert not of_kind(overlay, "Secret")
    for document in built(overlay):
        for path, pod in pods(document):
            for container in pod["containers"]:
                for variable in container.get("env", []):
                    if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]):
                        assert variable.keys() == {"name", "valueFrom"}, f"{path}: {variable['name']}"
    (service,) = of_kind(overlay, "RayService")
    password = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {"valueFrom": {"secretKeyRef": {"name": "unimoe-redis", "key": "password"}}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_in_the_cluster(overlay, tmp_path):
    """It loads, and is ours with what the cluster asks for; the jobs read it where it is mounted."""
    table = next(d for d in of_kind(overlay, "ConfigMap") if d["metadata"]["name"].endswith("-config"))
    (tmp_path / "config.yaml").write_text(table["data"]["config.yaml"])
    loaded = config.load(tmp_path / "config.yaml")
    assert loaded == in_cluster(config.load(OVERLAYS[overlay].preset), OVERLAYS[overlay])
    assert str(loaded.run_dir) == f"/unimoe/runs/{loaded.name}"
    for document in of_kind(overlay, "RayJob"):
        assert document["spec"]["entrypoint"].endswith(" --config /etc/unimoe/run/config.yaml")
        for path, pod in pods(document["spec"]["rayClusterSpec"]):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            mounts = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
            assert mounts["/etc/unimoe/run"]["configMap"]["name"] == table["metadata"]["name"], path
            assert mounts["/unimoe"]["persistentVolumeClaim"]["claimName"] == "unimoe", path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_takes_the_configuration_of_the_endpoint(overlay):
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(overlay, "RayService")
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = parsed.applications
    assert application.import_path == "serve.app:build"
    assert application.args["run"] == f"/unimoe/runs/{application.name}"
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for deployment in application.deployments:
        actor = deployment.ray_actor_options
        wanted = (actor.label_selector or {}).items()
        fitting = [group for group in groups if wanted <= group["labels"].items()]
        assert len(fitting) == (4 if deployment.name == "ingress" else 1), deployment.name
        limits = fitting[0]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert actor.num_cpus <= float(limits["cpu"]) and actor.num_gpus <= int(limits.get("nvidia.com/gpu", 0))
        if deployment.name != "ingress":
            assert fitting[0]["maxReplicas"] >= deployment.autoscaling_config["max_replicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters(overlay):
    kind = OVERLAYS[overlay]
    for document in of_kind(overlay, *KINDS):
        spec = document["spec"]
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        scales = kind.scales or document["kind"] == "RayService"
        assert cluster["enableInTreeAutoscaling"] is scales
        assert not scales or cluster["autoscalerOptions"]["version"] == "v2"
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            assert (group["minReplicas"] < group["maxReplicas"] or group["maxReplicas"] == 1) or not scales
            assert ("idleTimeoutSeconds" in group) is scales
            if group["groupName"] in ("image", "speech", "audio"):
                assert group["labels"]["unimoe.io/modality"] == group["groupName"]
            (container,) = group["template"]["spec"]["containers"]
            size = int(group["rayStartParams"]["object-store-memory"])
            assert size == _bytes(_shared_memory(group)) < _bytes(container["resources"]["limits"]["memory"])
            # It drains, ends, and only then is killed.
            environment = {variable["name"]: variable.get("value") for variable in container["env"]}
            drains = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            assert before + drains < group["template"]["spec"]["terminationGracePeriodSeconds"]
            on_spot = {"karpenter.sh/capacity-type": "spot"}.items()
            assert (on_spot <= group["template"]["spec"].get("nodeSelector", {}).items()) is kind.spot
        on_demand = head["template"]["spec"].get("nodeSelector", {}).get("karpenter.sh/capacity-type")
        assert on_demand == ("on-demand" if kind.spot else None)


def _shared_memory(group: dict[str, Any]) -> str:
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    return volumes["objects"]["emptyDir"]["sizeLimit"]


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Gi": 2**30, "Mi": 2**20}[quantity[-2:]]


def test_the_endpoint_is_upgraded_in_steps_where_a_gateway_can_and_waits_for_streams():
    for overlay, kind in OVERLAYS.items():
        (service,) = of_kind(overlay, "RayService")
        strategy = service["spec"]["upgradeStrategy"]
        assert strategy["type"] == ("NewClusterWithIncrementalUpgrade" if kind.gpu else "NewCluster")
        limit = config.load(kind.preset).serving.limits.request_seconds
        assert service["spec"]["rayClusterDeletionDelaySeconds"] >= limit
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] > limit
            keys = {each["topologyKey"] for each in group["template"]["spec"]["topologySpreadConstraints"]}
            assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}


def test_jobs_of_the_queue_have_a_fixed_size_and_wait_in_a_queue_that_holds_them():
    queues = {document["metadata"]["name"]: document for document in of_kind("kueue", "LocalQueue")}
    assert queues["unimoe-held"]["spec"]["stopPolicy"] == "Hold"
    assert "stopPolicy" not in queues["unimoe"]["spec"]
    for document in of_kind("kueue", "RayJob", "RayCluster"):
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "unimoe-held"
        cluster = document["spec"].get("rayClusterSpec") or document["spec"]
        assert all(g["minReplicas"] == g["replicas"] == g["maxReplicas"] for g in cluster["workerGroupSpecs"])
        # Started, it moves to the queue that lets it go; Kueue then ends the suspension.
        after = started(document)
        assert after["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "unimoe" and after["spec"]["suspend"]
    (endpoint,) = of_kind("kueue", "RayService")
    assert "kueue.x-k8s.io/queue-name" not in endpoint["metadata"]["labels"]
    assert started(endpoint)["spec"]["suspend"] is False


def test_alerts_are_about_metrics_that_exist():
    from tests.serving.test_parts import metric_names

    (rules,) = of_kind("gpu", "PrometheusRule")
    expressions = " ".join(rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"])
    named = set(re.findall(r"ray_(unimoe_\w+?)(?:_bucket)?[{\[) ]", expressions))
    assert len(named) >= 4 and named <= set(metric_names())


def test_network_policies_leave_the_endpoint_open_and_redis_to_heads():
    policies = {document["metadata"]["name"]: document["spec"] for document in of_kind("gpu", "NetworkPolicy")}
    assert policies["unimoe-deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert policies["unimoe-endpoint"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    (rule,) = policies["unimoe-redis"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 6379}] and len(rule["from"]) == 1


def test_rendering_another_configuration(tmp_path, api_server):
    """Names that Kubernetes does not take, keys for the endpoint, a pull secret, a class of volumes, other nodes."""
    settings = config.load(
        "mini",
        [
            "name=7_Try.of-A-run",
            "serving.api_keys_file=keys.txt",
            "serving.throughput_mode=true",
            "training.workers=3",
            "kubernetes.namespace=mine",
            "kubernetes.image=registry.example/me/unimoe",
            "kubernetes.image_pull_secret=pull",
            "kubernetes.storage_class=nfs",
        ],
    )
    files = render(settings, OVERLAYS["cpu-mini"], sizes("mini"), "mini")
    write(files, tmp_path)
    (tmp_path / "overlays/cpu-mini/left-over.yaml").write_text("")
    write(files, tmp_path)
    assert not (tmp_path / "overlays/cpu-mini/left-over.yaml").exists()
    done = api_server.kubectl("kustomize", tmp_path / "overlays/cpu-mini")
    documents = list(yaml.safe_load_all(done.stdout))
    service = next(document for document in documents if document["kind"] == "RayService")
    assert service["metadata"]["name"] == "run-7-try-of-a-run-endpoint" and service["metadata"]["namespace"] == "mine"
    assert api_server.create(service)[0] == 201
    (head, *workers) = [pod for _, pod in pods(service)]
    for pod in (head, *workers):
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/me/unimoe:0.1.0-cpu"
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        keys = next(volume for volume in pod["volumes"] if volume["name"] == "api-keys")
        assert keys["secret"]["secretName"] == "run-7-try-of-a-run-api-keys"
        names = {variable["name"] for variable in container["env"]}
        assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= names
    sized = plan(in_cluster(settings, OVERLAYS["cpu-mini"]), OVERLAYS["cpu-mini"], sizes("mini"))
    assert sized.ranks == 3 and sized.pods["train"].most == 2
