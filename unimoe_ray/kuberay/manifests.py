"""``unimoe k8s render`` and ``unimoe k8s size``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from unimoe_ray import config
from unimoe_ray.config import Config
from unimoe_ray.kuberay.overlays import OVERLAYS, Overlay, in_cluster, overlay_named
from unimoe_ray.kuberay.sizing import Plan, Pod, plan


def render(arguments: argparse.Namespace) -> int:
    """Writes the files and names their folders."""
    from unimoe_ray.kuberay.render import render as rendered
    from unimoe_ray.kuberay.render import write
    from unimoe_ray.parameter_table import count_parameters

    overlay = overlay_named(arguments.overlay)
    settings = config.load(arguments.config, arguments.overrides)
    files = rendered(settings, overlay, count_parameters(settings), arguments.config)
    write(files, arguments.output)
    print(arguments.output / "overlays" / overlay.name)
    return 0


def size(arguments: argparse.Namespace) -> int:
    """Exit code 1 when something does not fit."""
    from unimoe_ray.parameter_table import count_parameters

    settings = config.load(arguments.config, arguments.overrides)
    name = arguments.overlay or ("gpu" if settings.model.language.pretrained else "cpu-mini")
    overlay = overlay_named(name)
    sized = plan(in_cluster(settings, overlay), overlay, count_parameters(settings))
    for line in size_lines(settings, overlay, sized):
        print(line)
    return 1 if sized.problems else 0


def size_lines(settings: Config, overlay: Overlay, sized: Plan) -> Iterator[str]:
    """A table of the pods, where the experts are, the arithmetic of each, and what does not fit."""
    yield f"{settings.name} on {overlay.name}: {OVERLAYS[overlay.name].says}"
    yield ""
    yield f"{'pods':<10}{'how many':>9}{'CPUs':>7}{'memory':>12}{'GPUs':>6}{'on each GPU':>15}  node"
    for pod in sized.pods.values():
        count = str(pod.most) if pod.least == pod.most else f"{pod.least} to {pod.most}"
        device = max((need.device_gib for _, need in pod.runs), default=0) if pod.gpus else 0
        on_gpu = f"{device:.1f} of {pod.node.gpu_memory_gib:g} GiB" if pod.gpus else ""
        memory = f"{pod.memory_gib:g} GiB"
        yield f"{pod.name:<10}{count:>9}{pod.cpus:>7g}{memory:>12}{pod.gpus or '':>6}{on_gpu:>15}  {_node(pod)}"
    yield ""
    yield f"training ranks: {sized.ranks}; volume: {sized.storage_gib} GiB"
    yield f"a pod that ends has {sized.checkpoint_s} s for a checkpoint, {sized.stream_s} s for streams"
    yield from (f"experts, {line}" for line in sized.placement)
    yield ""
    yield "memory"
    for pod in sized.pods.values():
        yield f"  {pod.name}: {pod.arithmetic}"
        for _, need in pod.runs if pod.gpus else ():
            terms = " + ".join(f"{term.what} {term.gib:.2f} ({term.how})" for term in need.device)
            yield f"    each GPU: {terms} = {need.device_gib:.1f} GiB"
    if sized.problems:
        yield ""
        yield from (f"does not fit: {problem}" for problem in sized.problems)


def _node(pod: Pod) -> str:
    gpus = f", {pod.node.gpus} GPUs" if pod.node.gpus else ""
    return f"{pod.node_name} ({pod.node.cpus:g} CPUs, {pod.node.memory_gib:g} GiB{gpus})"
