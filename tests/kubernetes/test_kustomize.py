"""Kustomizations read without kubectl give the documents that kubectl gives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.conftest import kubectl
from tests.kubernetes.ray_documents import ray_cluster, ray_job
from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay.documents import read

OVERLAYS = sorted((Path(__file__).parents[2] / "k8s" / "overlays").glob("*/kustomization.yaml"))


def by_kubectl(folder: Path) -> list[dict]:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def by_name(documents: list[dict]) -> dict:
    return {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]): d for d in documents}


def write(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        documents = content if isinstance(content, list) else [content]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(documents))
    return folder


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.parent.name)
def test_the_committed_overlays(file):
    assert by_name(read(str(file.parent))) == by_name(by_kubectl(file.parent))


def test_bases_patches_labels_namespaces_and_generated_config(tmp_path):
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1", "b": "2"}}
    write(
        tmp_path / "base",
        kustomization={"resources": ["ray.yaml", "settings.yaml"]},
        ray=[ray_cluster("pool"), ray_job("align"), ray_job("tune")],
        settings=[settings, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}],
    )
    (tmp_path / "over").mkdir()
    (tmp_path / "over" / "board.json").write_text('{"panels": []}\n')
    change = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "pool"},
        "spec": {"enableInTreeAutoscaling": True, "workerGroupSpecs": [{"groupName": "big", "template": {"spec": {}}}]},
    }
    steps = [
        {"op": "replace", "path": "/spec/entrypoint", "value": "python -m jobs.all"},
        {"op": "add", "path": "/metadata/annotations", "value": {"a.b/c": "d"}},
        {"op": "add", "path": "/spec/rayClusterSpec/workerGroupSpecs/-", "value": {"groupName": "x", "template": {}}},
        {"op": "remove", "path": "/spec/rayClusterSpec/workerGroupSpecs/0/replicas"},
        {"op": "test", "path": "/metadata/annotations/a.b~1c", "value": "d"},
    ]
    write(
        tmp_path / "over",
        kustomization={
            "resources": ["../base"],
            "namespace": "team",
            "labels": [{"pairs": {"part-of": "unimoe"}}],
            "configMapGenerator": [{"name": "boards", "files": ["board.json", "other.json=board.json"]}],
            "generatorOptions": {"disableNameSuffixHash": True, "labels": {"grafana": "1"}},
            "patches": [
                {"path": "change.yaml"},
                {"target": {"kind": "RayJob", "name": "al.*"}, "patch": yaml.safe_dump(steps)},
                {"patch": yaml.safe_dump(settings | {"data": {"a": "7", "b": None}})},
            ],
        },
        change=change,
    )
    ours = by_name(read(str(tmp_path / "over")))
    assert ours == by_name(by_kubectl(tmp_path / "over"))
    assert ours["RayJob", "team", "align"]["spec"]["entrypoint"] == "python -m jobs.all"
    assert ours["ConfigMap", "team", "settings"]["data"] == {"a": "7"}


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"images": []}, "images cannot be read here; use: kubectl kustomize"),
        ({"resources": ["https://example.com/x.yaml"]}, "https://example.com/x.yaml: only files and folders"),
        ({"resources": ["gone.yaml"]}, "gone.yaml: no such file or folder"),
        ({"configMapGenerator": [{"name": "x"}]}, "configMapGenerator x: needs generatorOptions.disableNameSuffixHash"),
        ({"labels": [{"pairs": {}, "includeSelectors": True}]}, "labels: only pairs can be read here"),
        ({"patches": [{"patch": "[{op: remove, path: /spec}]"}]}, "a JSON patch needs a target"),
        (
            {"patches": [{"patch": "[]", "target": {"kind": "RayJob"}}]},
            "no resource matches its target {'kind': 'RayJob'}",
        ),
        (
            {
                "resources": ["x.yaml"],
                "patches": [{"patch": "[{op: remove, path: /spec/no}]", "target": {"kind": "Pod"}}],
            },
            "remove /spec/no: not in Pod",
        ),
        (
            {
                "resources": ["x.yaml"],
                "patches": [{"patch": "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: []}}"}],
            },
            "lists in Pod need a JSON patch here",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, table, line):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {}}
    write(tmp_path, kustomization=table, x=pod)
    with pytest.raises(UsageError) as caught:
        read(str(tmp_path))
    assert line in str(caught.value) and "\n" not in str(caught.value)
