"""The command line against one cluster: ray.io on a real API server, core kinds played, the operator played too."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes import client
from rich.console import Console

from tests.kubernetes.core_api import CUT, CoreApi, running
from tests.kubernetes.ray_documents import false, play_status, ray_cluster, ray_job, ray_service, true
from unimoe_ray.cli import main
from unimoe_ray.kuberay import logs as pod_logs
from unimoe_ray.kuberay import submit as submitting
from unimoe_ray.kuberay.client import Cluster, Patience, connect
from unimoe_ray.kuberay.documents import Ref
from unimoe_ray.kuberay.progress import Progress

PASSWORD = "correct-horse-battery"
AT = {"namespace": "team"}


@pytest.fixture
def kubeconfig(front: CoreApi, tmp_path, monkeypatch) -> Path:
    file = front.kubeconfig(tmp_path / "kubeconfig", namespace="team")
    monkeypatch.setenv("KUBECONFIG", str(file))
    return file


@pytest.fixture
def cluster(kubeconfig) -> Iterator[Cluster]:
    """The team's namespace; the real server keeps what is in it from test to test, so it is emptied."""
    found = connect(kubeconfig, patience=Patience(attempts=2, first_pause_s=0.02))
    yield found
    for kind in ("rayjob", "raycluster", "rayservice"):
        ref = Ref.parse(f"{kind}/x", "team")
        for document in found.list_objects(ref.named(""))[0]:
            found.delete(ref.named(document["metadata"]["name"]))


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a rendering gives: everything suspended."""
    documents = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"} | AT, "data": {"seed": "0"}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "redis"} | AT,
            "stringData": {"password": PASSWORD},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "runs"} | AT,
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        },
        ray_job("mini-align", "team", suspend=True, shutdownAfterJobFinishes=True),
        ray_job("mini-tune", "team", suspend=True, shutdownAfterJobFinishes=True),
        ray_service("mini-endpoint", "team", suspend=True),
    ]
    (tmp_path / "k8s").mkdir()
    (tmp_path / "k8s" / "all.yaml").write_text(yaml.safe_dump_all(documents))
    return tmp_path / "k8s"


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of ``unimoe k8s ...``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["k8s", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    return run


@contextmanager
def operator(*steps: Callable[[], object]) -> Iterator[None]:
    errors: list[Exception] = []

    def work() -> None:
        for step in steps:
            end = time.monotonic() + 60
            while True:  # Until what it works on is there.
                try:
                    step()
                    break
                except Exception as error:
                    if time.monotonic() > end:
                        errors.append(error)
                        return
                    time.sleep(0.1)
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        assert not errors, errors


def play_pod(front: CoreApi, name: str, labels: dict[str, str], container: str, **status) -> dict:
    return front.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels} | AT,
            "spec": {"containers": [{"name": container, "image": "unimoe:1"}], "nodeName": "node-7"},
            "status": {"phase": "Running"} | status,
        }
    )


SUBMITTER = {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "mini-align"}
HEAD = {"ray.io/cluster": "mini-align-x", "ray.io/node-type": "head"}


# apply and delete


def test_apply_twice_then_with_a_change_then_delete(run, cluster, front, folder):
    created = [
        "namespace/team created",
        "secret/redis created",
        "configmap/settings created",
        "persistentvolumeclaim/runs created",
        "rayjob/mini-align created",
        "rayjob/mini-tune created",
        "rayservice/mini-endpoint created",
    ]
    assert run("apply", folder, "--dry-run") == (0, "".join(f"{line} (dry run)\n" for line in created), "")
    assert not [line for line in front.requests if line.startswith("PATCH") and "dryRun=All" not in line]
    assert run("apply", folder) == (0, "".join(f"{line}\n" for line in created), "")
    code, out, _ = run("apply", folder, "--diff")
    assert code == 0 and out == "".join(f"{line}\n" for line in created).replace("created", "unchanged")

    file = folder / "all.yaml"
    file.write_text(file.read_text().replace("seed: '0'", "seed: '5'").replace(PASSWORD, "another-good-password"))
    code, out, err = run("apply", folder, "--diff")
    assert code == 0 and "configmap/settings configured" in out and "+  seed: '5'" in out
    assert "+  password: (hidden, after)" in out
    assert PASSWORD not in out + err and "another-good-password" not in out + err

    code, out, _ = run("delete", folder, "--wait", "--timeout", "20")
    assert code == 0 and "rayjob/mini-tune deleted" in out and "persistentvolumeclaim/runs kept" in out
    code, out, _ = run("delete", "pvc/runs", "--with-data")
    assert (code, out) == (0, "persistentvolumeclaim/runs deleted\n")
    code, out, err = run("delete", "rayjob/mini-tune")
    assert (code, out, err) == (1, "", "unimoe: rayjob/mini-tune not found in namespace team\n")


def test_mistakes_are_one_line_and_exit_code_2(run, folder, kubeconfig, front):
    file = folder / "all.yaml"
    file.write_text(file.read_text().replace("entrypoint: python -m jobs.align", "entrypont: python", 1))
    code, out, err = run("apply", folder)
    assert (
        (code, out) == (2, "") and err.startswith("unimoe: rayjob/mini-align: spec.entrypont") and err.count("\n") == 1
    )
    assert front.requests == []
    code, out, err = run("apply", folder, "-n", "mine")
    assert (code, err.count("\n")) == (2, 1) and "states the namespace 'team'" in err
    assert run("apply", folder / "none")[2] == f"unimoe: {folder}/none: no such file or folder\n"
    assert run("wait", "mini-align")[2].startswith("unimoe: 'mini-align' names no object: write KIND/NAME")
    assert run("status", "--context", "gone")[0] == 2
    assert run("wait", "rayjob/x", "--for", "soon")[0] == 2


def test_a_server_that_is_away(run, tmp_path, folder):
    with running() as api, socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        api.url = f"http://127.0.0.1:{held.getsockname()[1]}"  # Nobody listens there, nor can in the meantime.
        code, out, err = run("apply", folder, "--kubeconfig", api.kubeconfig(tmp_path / "away"))
    assert (code, out) == (1, "") and err.count("\n") == 1 and "cannot be reached: Connection refused" in err


# submit


def test_submit_starts_one_job_prints_its_output_and_waits_for_it(run, cluster, front, folder, monkeypatch):
    monkeypatch.setattr(pod_logs, "PAUSE_S", 0.05)
    monkeypatch.setattr(submitting, "LAST_LINES_S", 60.0)
    job = ray_job("mini-align", "team")

    def watched() -> None:
        """From now on the command sees every status."""
        assert any("/rayjobs?watch=true" in line for line in front.requests)

    def output() -> None:
        play_pod(front, "mini-align-s", SUBMITTER, "ray-job-submitter")
        lines = ["10:00:01Z step 1 loss 2.0", "10:00:02Z step 2 loss 1.5", CUT, "10:00:03Z step 3 loss 1.2"]
        front.pod_log(
            "mini-align-s", "ray-job-submitter", [f"2026-11-24T{line}" if line != CUT else line for line in lines]
        )

    def ended() -> None:
        ended = [{"name": "ray-job-submitter", "state": {"terminated": {"exitCode": 0}}}]
        play_pod(front, "mini-align-s", SUBMITTER, "ray-job-submitter", phase="Succeeded", containerStatuses=ended)

    with operator(
        lambda: play_status(cluster, job, jobDeploymentStatus="Initializing", rayClusterName="mini-align-x"),
        output,
        watched,
        lambda: play_status(cluster, job, jobDeploymentStatus="Running", jobStatus="RUNNING"),
        ended,
        lambda: play_status(cluster, job, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"),
    ):
        code, out, err = run("submit", "align", folder, "--timeout", "60")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[:5] == [
        "namespace/team created",
        "secret/redis created",
        "configmap/settings created",
        "persistentvolumeclaim/runs created",
        "rayjob/mini-align created",
    ]
    assert lines[5:] == ["step 1 loss 2.0", "step 2 loss 1.5", "step 3 loss 1.2", "rayjob/mini-align succeeded"]
    assert "rayjob/mini-align: waits for its cluster" in err and "rayjob/mini-align: running (RUNNING)" in err
    assert cluster.get(Ref.parse("rayjob/mini-align", "team"))["spec"]["suspend"] is False
    assert cluster.get(Ref.parse("rayjob/mini-tune", "team")) is None

    # To apply everything later leaves it as it is; to submit it again runs it again.
    code, out, _ = run("apply", folder)
    assert "rayjob/mini-align unchanged (it was started and stays so)" in out and "rayjob/mini-tune created" in out
    code, out, _ = run("submit", "mini-align", folder, "--no-follow")
    assert code == 0 and "rayjob/mini-align succeeded before; it is replaced" in out
    assert "rayjob/mini-align created" in out
    assert "follow it with: unimoe k8s wait rayjob/mini-align -n team" in out
    play_status(cluster, job, jobDeploymentStatus="Running", jobStatus="RUNNING")
    code, out, err = run("submit", "mini-align", folder)
    assert (code, out) == (1, "") and "rayjob/mini-align is at it already (running (RUNNING))" in err


def test_submit_of_what_fails_says_why(run, cluster, front, folder):
    job = ray_job("mini-align", "team")
    message = "Job entrypoint command failed with exit code 1\nunimoe: seed is -1: must be at least 0"
    unschedulable = false(
        "PodScheduled", reason="Unschedulable", message="0/2 nodes are available: 2 Insufficient cpu."
    )

    with operator(
        lambda: play_status(cluster, job, jobDeploymentStatus="Initializing", rayClusterName="mini-align-x"),
        lambda: play_pod(front, "mini-align-x-head", HEAD, "ray-head", phase="Pending", conditions=[unschedulable]),
        lambda: play_status(
            cluster, job, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=message
        ),
    ):
        code, out, err = run("submit", "align", folder, "--timeout", "60")
    assert code == 1 and "rayjob/mini-align created" in out
    assert "rayjob/mini-align: the program ended with an error\n    | Job entrypoint" in err
    assert "pod/mini-align-x-head (head): cannot be scheduled: no node of 2 fits: 2 lack cpu" in err
    last = err.splitlines()[-1]
    assert last == "unimoe: rayjob/mini-align failed (AppFailed: unimoe: seed is -1: must be at least 0)"


def test_submit_of_the_endpoint_waits_until_it_answers(run, cluster, front, folder):
    service = ray_service("mini-endpoint", "team")
    seen = {"observedGeneration": 1, "conditions": [true("Ready")], "numServeEndpoints": 1}
    with operator(lambda: play_status(cluster, service, **seen)):
        code, out, _ = run("submit", "endpoint", folder, "--timeout", "60")
    assert code == 0 and out.splitlines()[-2:] == [
        "rayservice/mini-endpoint created",
        "rayservice/mini-endpoint ready, 1 endpoint",
    ]


def test_submit_of_a_queued_job_leaves_the_start_to_the_queue(run, cluster, front, folder):
    job = ray_job("mini-align", "team", suspend=True, shutdownAfterJobFinishes=True)
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus-held"}
    (folder / "all.yaml").write_text(yaml.safe_dump(job))
    front.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    assert run("apply", folder)[0] == 0
    play_status(cluster, job, jobDeploymentStatus="Suspended")
    assert run("status")[1].splitlines()[0].startswith("rayjob/mini-align  suspended, waits to be started  ")
    assert run("submit", "align", folder, "--no-follow")[0] == 0
    stored = cluster.get(Ref.of(job, ""))
    assert stored["spec"]["suspend"] is True
    assert stored["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    out = run("status")[1]
    assert "! rayjob/mini-align: waits for admission by the queue 'gpus'" in out
    assert run("apply", folder)[1] == "rayjob/mini-align unchanged (it was started and stays so)\n"

    # The queue admits it. It now owns the field, and is not argued with.
    patch = {"spec": {"suspend": False}}
    client.CustomObjectsApi(cluster.api).patch_namespaced_custom_object(
        "ray.io", "v1", "team", "rayjobs", "mini-align", patch, field_manager="kueue"
    )
    assert run("apply", folder)[1] == "rayjob/mini-align unchanged (it was started and stays so)\n"
    assert cluster.get(Ref.of(job, ""))["spec"]["suspend"] is False


def test_submit_of_what_is_not_there(run, folder, kubeconfig):
    code, out, err = run("submit", "algn", folder)
    assert (code, out) == (2, "")
    assert err == (f"unimoe: 'algn': no Ray resource of {folder}; allowed: mini-align, mini-endpoint, mini-tune\n")


# wait, status, logs


def test_wait_says_what_it_waits_for_and_why_it_failed(run, cluster, front):
    front.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    document = ray_cluster("pool", "team")
    cluster.apply(document)
    labels = {"ray.io/cluster": "pool", "ray.io/node-type": "head"}
    waiting = {"name": "ray-head", "image": "unimoe:1", "state": {"waiting": {"reason": "InvalidImageName"}}}
    play_pod(front, "pool-head", labels, "ray-head", phase="Pending", containerStatuses=[waiting])
    code, out, err = run("wait", "raycluster/pool", "--timeout", "1s")
    words = "pod/pool-head (head): the image name 'unimoe:1' is not valid"
    assert (code, out) == (1, "")
    assert err.splitlines()[0].startswith(f"raycluster/pool: not taken up by an operator yet; {words}")
    assert err.splitlines()[-2:] == [
        words,
        "unimoe: raycluster/pool after 1 s: not taken up by an operator yet",
    ]
    play_status(cluster, document, state="ready", observedGeneration=1, desiredWorkerReplicas=1, readyWorkerReplicas=1)
    code, out, _ = run("wait", "rayclusters/pool")
    assert (code, out) == (0, "raycluster/pool ready, 1 of 1 workers ready\n")
    cluster.delete(Ref.of(document, ""))
    assert run("wait", "raycluster/pool", "--for", "delete")[:2] == (0, "raycluster/pool is gone\n")


def test_status_of_everything(run, cluster, front):
    front.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    assert run("status") == (0, "no RayCluster, RayJob or RayService in namespace team\n", "")
    job, own, pool = ray_job("mini-align", "team"), ray_cluster("mini-align-x", "team"), ray_cluster("pool", "team")
    stored = cluster.apply(job)
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "mini-align", "uid": stored["metadata"]["uid"]}
    own["metadata"]["ownerReferences"] = [owner]
    cluster.apply(own)
    cluster.apply(pool)
    play_status(cluster, job, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="mini-align-x")
    play_status(cluster, pool, state="ready", observedGeneration=1)
    ready = [{"name": "ray-head", "ready": True, "restartCount": 2, "state": {"running": {}}}]
    play_pod(front, "mini-align-x-head", HEAD, "ray-head", conditions=[true("Ready")], containerStatuses=ready)
    ended = {"name": "ray-worker", "image": "x", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    worker = HEAD | {"ray.io/node-type": "worker"}
    play_pod(front, "mini-align-x-w", worker, "ray-worker", phase="Failed", containerStatuses=[ended])
    code, out, err = run("status")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("raycluster/pool  ready, 0 of 0 workers ready  ") and lines[0].endswith(" old")
    assert lines[1].startswith("rayjob/mini-align  running (RUNNING)  ")
    assert lines[2:] == [
        "  pod/mini-align-x-head  head, Running, 1/1 ready, 2 restarts, node-7",
        "  pod/mini-align-x-w  worker, Failed, 0/1 ready, node-7",
        "  ! pod/mini-align-x-w (worker): container 'ray-worker' was killed: out of memory, its limit is none; "
        "`unimoe k8s size` shows what it needs",
    ]
    assert run("status", "raycluster/pool")[1].startswith("raycluster/pool  ready")
    front.fail("GET", "/pods", 403, 'pods is forbidden: User "me" cannot list resource "pods"', times=9)
    code, out, _ = run("status", "raycluster/pool")
    assert code == 0 and "its pods and events are not known: list pods: not allowed (403)" in out


def test_logs_of_a_jobs_submitter_and_of_its_head(run, cluster, front):
    front.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    job = ray_job("mini-align", "team")
    cluster.apply(job)
    assert run("logs", "rayjob/mini-align")[::2] == (1, "unimoe: rayjob/mini-align has no pods (yet)\n")
    play_status(cluster, job, rayClusterName="mini-align-x")
    play_pod(front, "mini-align-s", SUBMITTER, "submitter")
    play_pod(front, "mini-align-x-head", HEAD, "ray-head")
    front.pod_log("mini-align-s", "submitter", ["one", "two", "connect with token=abcdefgh12345", "four"])
    front.pod_log("mini-align-x-head", "ray-head", ["of the head"])
    front.pod_log("mini-align-x-head", "ray-head", ["before the restart"], previous=True)
    assert run("logs", "rayjob/mini-align", "--tail", "3")[1] == "two\nconnect with token=(hidden)\nfour\n"
    assert run("logs", "rayjob/mini-align", "--node", "head")[1] == "of the head\n"
    assert run("logs", "rayjob/mini-align", "--node", "x-head", "--previous")[1] == "before the restart\n"
    assert run("logs", "pod/mini-align-x-head", "--container", "ray-head")[1] == "of the head\n"
    code, _, err = run("logs", "rayjob/mini-align", "--node", "worker")
    assert code == 2 and "--node worker: no such pod of rayjob/mini-align; allowed: head, worker, submitter" in err
    code, _, err = run("logs", "rayjob/gone")
    assert (code, err) == (1, "unimoe: rayjob/gone not found in namespace team\n")


@pytest.mark.parametrize("phase", ["Running", "Succeeded"])
def test_a_followed_log_has_each_line_once(core, tmp_path, monkeypatch, phase):
    """Over a lost connection, with lines of the same second, until the container has ended, or when it had before."""
    monkeypatch.setattr(pod_logs, "PAUSE_S", 0.05)
    cluster = connect(core.kubeconfig(tmp_path / "kubeconfig"))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": {}}
    core.put(pod | {"status": {"phase": phase}})
    stamps = [f"2026-11-24T10:00:0{second}.{part}Z" for second in range(3) for part in (1, 5, 9)]
    lines = [f"{stamp} line {number}" for number, stamp in enumerate(stamps)]
    core.pod_log("p", "c", [*lines[:5], CUT, *lines[5:]])
    written: list[str] = []
    ref = Ref("v1", "Pod", "default", "p")
    thread = threading.Thread(target=pod_logs.follow, args=(cluster, ref, "c", written.append))
    thread.start()
    deadline = time.monotonic() + 60
    while thread.is_alive() and sum("/log?" in line for line in core.requests) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    core.put(pod | {"status": {"phase": "Succeeded"}})
    thread.join(60)
    assert not thread.is_alive()
    assert written == [f"line {number}" for number in range(9)]


def test_progress_off_a_terminal_prints_what_changes(capsys, monkeypatch):
    monkeypatch.setattr("unimoe_ray.kuberay.progress.time", SimpleNamespace(monotonic=lambda: 1000.0))
    asked = []
    with Progress(Console(width=200), "rayjob/x", reasons_every_s=100) as progress:
        for line in ("waits", "waits", "runs"):
            progress.show(line, lambda: asked.append(1) or ["pod/a: no [node] fits\n    | log", "another"])
    assert capsys.readouterr().out.splitlines() == [
        "rayjob/x: waits; pod/a: no [node] fits (and 1 more)  (0 s)",
        "rayjob/x: runs; pod/a: no [node] fits (and 1 more)  (0 s)",
    ]
    assert len(asked) == 1
