"""Train and serve on Kubernetes, in the README's six commands: each is run.

ray.io goes to a real API server, core kinds to the one that is played; the test plays the operator, who would make the
pods. kubectl is the real one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.conftest import kubectl
from tests.kubernetes.core_api import CoreApi
from tests.kubernetes.ray_documents import play_status, true
from unimoe_ray.kuberay.client import Cluster, connect
from unimoe_ray.kuberay.documents import Ref

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "unimoe k8s render --config mini --overlay cpu-mini kubernetes.image=registry.example/unimoe-ray",
    "unimoe k8s apply k8s/overlays/cpu-mini",
    "kubectl -n unimoe create secret generic unimoe-redis --from-literal=password=$(openssl rand -hex 24)"
    " --dry-run=client -o yaml | unimoe k8s apply -",
    "unimoe k8s submit pipeline k8s/overlays/cpu-mini",
    "unimoe k8s submit endpoint k8s/overlays/cpu-mini",
    "unimoe k8s status -n unimoe",
]
UNCHECKED = ("PodMonitor", "PrometheusRule", "ResourceFlavor", "ClusterQueue", "LocalQueue")


def test_the_readme_has_these_commands():
    section = re.search(r"## Kubernetes.*?(?=\n## |\Z)", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    if section is None:
        pytest.skip("the README has no section 'Kubernetes' yet")
    text = section[0].replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line) for line in text.splitlines() if re.match(r"(unimoe|kubectl) ", line)]
    assert [re.sub(r"\s+", " ", line).strip() for line in lines[: len(COMMANDS)]] == COMMANDS


@pytest.fixture
def cluster(front: CoreApi, tmp_path) -> Cluster:
    return connect(front.kubeconfig(tmp_path / "kubeconfig"), namespace="unimoe")


def test_train_and_serve_in_six_commands(cluster, tmp_path, capsys):
    kubectl()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "unimoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m unimoe_ray.cli "$@"\n')
    (programs / "unimoe").chmod(0o700)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    render, apply, secret, train, serve, status = COMMANDS
    assert run(render).strip() == "k8s/overlays/cpu-mini"
    applied = run(apply)
    assert "namespace/unimoe created" in applied and "rayservice/mini-endpoint created" in applied
    assert len(applied.splitlines()) == len(documents(tmp_path))
    assert run(secret).strip() == "secret/unimoe-redis created"
    password = cluster.get(Ref("v1", "Secret", "unimoe", "unimoe-redis"))["data"]["password"]
    assert len(password) == 64  # 48 characters, in base64

    with operator(cluster, "rayjob/mini-pipeline", [
        {"jobDeploymentStatus": "Initializing", "rayClusterName": "mini-pipeline-x"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    ]):  # fmt: skip
        assert run(train).splitlines()[-1] == "rayjob/mini-pipeline succeeded"
    with operator(cluster, "rayservice/mini-endpoint", [
        {"conditions": [true("Ready", reason="NonZeroServeEndpoints")], "numServeEndpoints": 4},
    ]):  # fmt: skip
        assert "rayservice/mini-endpoint" in run(serve).splitlines()[-1]
    shown = run(status)
    assert re.search(r"^rayjob/mini-pipeline +succeeded", shown, flags=re.MULTILINE)
    assert "rayservice/mini-endpoint" in shown and "rayjob/mini-align" in shown
    with capsys.disabled():
        print(f"\nchecked by no schema here: {', '.join(UNCHECKED)} (none of them in cpu-mini)")
    assert not {document["kind"] for document in documents(tmp_path)} & set(UNCHECKED)


def documents(folder: Path) -> list[dict]:
    done = subprocess.run(
        [kubectl(), "kustomize", folder / "k8s/overlays/cpu-mini"], capture_output=True, text=True, check=True
    )
    return [document for document in yaml.safe_load_all(done.stdout) if document]


class operator:
    """Writes the statuses one after another, once the object is there and no longer suspended."""

    def __init__(self, cluster: Cluster, name: str, statuses: list[dict]):
        self.cluster, self.ref, self.statuses = cluster, Ref.parse(name, "unimoe"), statuses
        self.errors: list[Exception] = []
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.thread.join(60)
        assert not self.errors, self.errors

    def _work(self) -> None:
        try:
            end = time.monotonic() + 200
            while (stored := self.cluster.get(self.ref)) is None or stored["spec"].get("suspend"):
                assert time.monotonic() < end, "nobody started it"
                time.sleep(0.3)
            for status in self.statuses:
                generation = self.cluster.get(self.ref)["metadata"]["generation"]
                play_status(self.cluster, stored, observedGeneration=generation, **status)
                time.sleep(0.3)
        except Exception as error:
            self.errors.append(error)
