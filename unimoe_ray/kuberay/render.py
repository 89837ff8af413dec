"""From a configuration to the files of a kustomization: ``k8s/base``, ``k8s/monitoring``, ``k8s/overlays/NAME``."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from unimoe_ray.config import Config
from unimoe_ray.errors import UsageError
from unimoe_ray.kuberay import surroundings
from unimoe_ray.kuberay.overlays import Overlay, in_cluster
from unimoe_ray.kuberay.sizing import Plan, plan
from unimoe_ray.kuberay.validate import validate
from unimoe_ray.kuberay.workloads import ray_resources

if TYPE_CHECKING:
    from unimoe_ray.parameter_table import Sizes  # It would load torch.

Document = dict[str, Any]
Files = dict[str, str]
DASHBOARD = "serving.json"
FIRST = ("apiVersion", "kind", "metadata", "name", "groupName", "suspend", "entrypoint")
LAST = ("template", "rayClusterSpec", "rayClusterConfig", "submitterPodTemplate", "workerGroupSpecs")


def render(config: Config, overlay: Overlay, sizes: Sizes, source: str) -> Files:
    """Texts by path relative to the output folder. Pure. ``source``: what the user calls the configuration.

    Raises UsageError when a pod fits no node of the configuration, and for any problem that a cluster would have with
    a document.
    """
    here = in_cluster(config, overlay)
    sized = plan(here, overlay, sizes)
    if sized.problems:
        raise UsageError(f"{sized.problems[0]} (unimoe k8s size --config {source} shows the arithmetic)")
    shared = "unimoe k8s render"
    made = f"{shared} --config {source} --overlay {overlay.name}"
    folder, base = f"overlays/{overlay.name}", surroundings.base(here)
    own = _of_overlay(here, overlay, sized)
    # Without GPUs it is meant for small clusters, which have no Prometheus operator.
    beside = ["../../base", *(["../../monitoring"] if overlay.gpu else [])]
    monitoring = surroundings.monitoring(here)
    for documents in [*base.values(), *own.values(), *monitoring.values()]:
        _check(documents)
    return {
        **_kustomization("base", base, shared),
        **_kustomization("monitoring", monitoring, shared, beside=["../grafana"]),
        **_dashboard(here.kubernetes.namespace, shared),
        **_kustomization(folder, own, made, beside),
    }


def write(files: Files, output: Path) -> None:
    """Replaces the folders that the files belong to, so that nothing of an earlier rendering is left in them."""
    for folder in sorted({str(Path(path).parent) for path in files}):
        if folder != "grafana":
            shutil.rmtree(output / folder, ignore_errors=True)
        (output / folder).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (output / path).write_text(text, encoding="utf-8")


def _of_overlay(config: Config, overlay: Overlay, sized: Plan) -> dict[str, list[Document]]:
    files = surroundings.of_run(config, sized)
    if overlay.queued:
        files |= surroundings.queue(config, sized, overlay)
    resources = ray_resources(config, overlay, sized)
    return files | {file: [resource.document() for resource in some] for file, some in resources.items()}


def _check(documents: list[Document]) -> None:
    for document in documents:
        if found := validate(document):
            raise UsageError(f"{document['kind']} {document['metadata']['name']}: {found[0]}")


def _kustomization(
    folder: str, files: dict[str, list[Document]], made: str, beside: list[str] | tuple[str, ...] = ()
) -> Files:
    table = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*beside, *files],
    }
    texts = {f"{folder}/{name}": _text(documents, made) for name, documents in files.items()}
    return {f"{folder}/kustomization.yaml": _text([table], made), **texts}


def _dashboard(namespace: str, made: str) -> Files:
    """A ConfigMap that Grafana's sidecar finds by its label."""
    text = (importlib.resources.files("unimoe_ray.kuberay") / "dashboards" / DASHBOARD).read_text(encoding="utf-8")
    table = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "configMapGenerator": [{"name": "unimoe-dashboards", "namespace": namespace, "files": [DASHBOARD]}],
        "generatorOptions": {
            "disableNameSuffixHash": True,
            "labels": {"grafana_dashboard": "1", "app.kubernetes.io/part-of": "unimoe"},
        },
    }
    return {"grafana/kustomization.yaml": _text([table], made), f"grafana/{DASHBOARD}": text}


def _readable(value: Any) -> Any:
    """What names a thing comes first in it, and the longest part, a pod's template, last."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST) + (key in LAST))
    return {key: _readable(value[key]) for key in keys}


class _Dumper(yaml.SafeDumper):
    """Several lines as a block, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _text(documents: list[Document], made: str) -> str:
    parts = [yaml.dump(_readable(document), Dumper=_Dumper, sort_keys=False, width=100) for document in documents]
    return f"# Made by: {made}\n" + "---\n".join(parts)
