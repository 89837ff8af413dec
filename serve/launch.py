"""``unimoe serve``: the application on a Ray cluster, joined or started here, until it is interrupted."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from unimoe_ray import cluster
from unimoe_ray.config import Config
from unimoe_ray.doctor import port_is_free
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.evaluate import final_model

STARTUP_TIMEOUT_S = 600.0
POLL_S = 0.25


def run(settings: Config, console: Console) -> None:
    """Start everything, show how it comes up, print the address, wait for Ctrl-C or SIGTERM, shut down."""
    stop = threading.Event()
    with serving(settings, console, stop) as url:
        if url is None:
            return
        name = settings.serving.model_name or settings.name
        console.print(f"\n  page   {url}\n  API    {url}/v1 (as OpenAI's; model '{name}')", highlight=False)
        console.print("\nCtrl-C stops it.", highlight=False)
        stop.wait()
        console.print("stopping: running requests may finish")


@contextmanager
def serving(settings: Config, console: Console, stop: threading.Event) -> Iterator[str | None]:
    """The address of the running application; None when ``stop`` was set before it was ready.

    Raises UnimoeError when it can't start, with the reason.
    """
    options = settings.serving
    final_model(settings)  # Without one there is nothing to start Ray for.
    for name, value in environment(settings).items():
        os.environ.setdefault(name, value)
    if not port_is_free(options.port):
        raise UnimoeError(f"port {options.port} is in use on this machine; give another one with --port")
    parts = (options.ingress, options.language, options.image, options.speech, options.audio)
    started = time.monotonic()
    members = (options.language.replica_cpus - options.language.num_cpus) * options.language.max_replicas
    with cluster.connect(settings, local_cpus=members + sum(part.num_cpus * part.max_replicas for part in parts)):
        from ray import serve
        from ray.serve.config import HTTPOptions

        from serve.app import application

        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own for SIGTERM.
            signal.signal(number, lambda *_: stop.set())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        target = serve.RunTarget(application(settings), name=settings.name, route_prefix="/")
        console.print(f"Ray is up after {time.monotonic() - started:.0f} s; starting the deployments", highlight=False)
        try:
            serve.start(http_options=HTTPOptions(host=options.host, port=options.port))
            serve.run_many([target], wait_for_applications_running=False)
            ready = _wait(settings.name, console, stop, started)
            shown = "127.0.0.1" if options.host == "0.0.0.0" else options.host
            yield f"http://{shown}:{options.port}" if ready else None
        finally:
            serve.delete(settings.name)
            # HAProxy is a process that would outlive Ray. On a cluster that was joined, others may need it.
            if options.throughput_mode and cluster.is_local(settings):
                serve.shutdown()


def environment(settings: Config) -> dict[str, str]:
    """What Ray and Serve read when they are imported or started."""
    variables = {
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
        # Fewer threads that hand a message to each other; nothing here blocks an event loop for long.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_metrics_report_interval_ms": "2000",
        # How soon a deployment that scaled to zero learns that somebody waits for it.
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    if cluster.is_local(settings):
        # A proxy that is on another node than its ingress would learn late that the node is lost (see serve.watch).
        variables["RAY_SERVE_PROXY_USE_GRPC"] = "1"
    if settings.serving.throughput_mode:
        variables |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # No load balancer in front has to notice first.
        }
    return variables


def _wait(name: str, console: Console, stop: threading.Event, started: float) -> bool:
    """Until every deployment is ready, a line for each; False when ``stop`` was set first."""
    from ray import serve

    ready: set[str] = set()
    with console.status("starting") as spinner:
        while not stop.wait(POLL_S):
            app = serve.status().applications[name]
            for deployment, state in app.deployments.items():
                if state.status == "HEALTHY" and deployment not in ready:
                    ready.add(deployment)
                    console.print(f"  {deployment:10} ready after {time.monotonic() - started:.0f} s", highlight=False)
            if app.status == "RUNNING":
                return True
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [app.message, *(state.message for state in app.deployments.values() if state.message)]
                raise UnimoeError(f"the application did not start: {' '.join(' '.join(messages).split())[:2000]}")
            if time.monotonic() - started > STARTUP_TIMEOUT_S:
                raise UnimoeError(f"the application was not ready after {STARTUP_TIMEOUT_S:g} s: {app.message}")
            spinner.update(f"starting: {', '.join(sorted(set(app.deployments) - ready))}")
    return False
