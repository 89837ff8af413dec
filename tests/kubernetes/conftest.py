"""A real API server for KubeRay's custom resources, one for the whole session. It runs no pods, has no core kinds.

The folder of its programs is that of UNIMOE_KUBERAY_TOOLS, else ``../shared/tools`` beside the repository; the custom
resource definitions lie in ``kuberay-crds`` beside that folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.kubernetes import core_api

REPOSITORY = Path(__file__).resolve().parents[2]
CRDS = ("rayclusters", "rayjobs", "rayservices")


def tools() -> Path:
    given = os.environ.get("UNIMOE_KUBERAY_TOOLS")
    return Path(given) if given else REPOSITORY.parent / "shared" / "tools"


def crds() -> Path:
    """The folder of KubeRay's custom resource definitions; the test is skipped where it is absent."""
    folder = tools().parent / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (set UNIMOE_KUBERAY_TOOLS)")
    return folder


@dataclass(frozen=True)
class ApiServer:
    """A running server. It knows one user, the administrator, by the client certificate in the kubeconfig."""

    url: str
    kubeconfig: Path
    kubectl_path: str
    request: Callable[..., tuple[int, str]]  # (method, path, body as text) -> status, text

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl against the server; the caller looks at the return code."""
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            # kubectl keeps what it discovered by address, and an earlier server may have had the same port.
            "KUBECACHEDIR": str(self.kubeconfig.parent / "kubectl-cache"),
        }
        command = [self.kubectl_path, *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=60)

    def create(self, document: dict[str, Any]) -> tuple[int, str]:
        """Ask the server, strictly, whether it would take a document; nothing is stored. Status code and message."""
        namespace, plural = document["metadata"].get("namespace", "default"), f"{document['kind'].lower()}s"
        path = f"/apis/{document['apiVersion']}/namespaces/{namespace}/{plural}?dryRun=All&fieldValidation=Strict"
        status, text = self.request("POST", path, json.dumps(document))
        return status, json.loads(text).get("message", "") if text.startswith("{") else text


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """KubeRay's RayCluster, RayJob and RayService on a real API server: empty at first, any namespace will do."""
    folder = tmp_path_factory.mktemp("kuberay-crds")
    for name in CRDS:  # Only these: each takes the server seconds to compile and a hundred MiB.
        (folder / f"ray.io_{name}.yaml").symlink_to(crds() / f"ray.io_{name}.yaml")
    with _start().running(tmp_path_factory.mktemp("api-server"), crds=folder, timeout=120) as server:
        yield ApiServer(server.url, server.kubeconfig, kubectl(), server.request)


@pytest.fixture
def core() -> Iterator[core_api.CoreApi]:
    """Core kinds only, played: ``core_api`` says how."""
    with core_api.running() as api:
        yield api


@pytest.fixture
def front(api_server: ApiServer) -> Iterator[core_api.CoreApi]:
    """One cluster to a client: ray.io is kept by the real API server, core kinds are played."""
    with core_api.running(upstream=api_server.kubeconfig) as api:
        yield api


def kubectl() -> str:
    """The path of kubectl (Debian's kubernetes-client has it); the test is skipped where it is absent."""
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("no kubectl on the PATH (package kubernetes-client)")
    return found


def _start() -> ModuleType:
    path = tools() / "crd-apiserver" / "start.py"
    if not path.is_file():
        pytest.skip(f"no {path} (set UNIMOE_KUBERAY_TOOLS)")
    spec = importlib.util.spec_from_file_location("crd_apiserver_start", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
