"""The Serve application: ``serve.app:build``, for ``unimoe serve``, ``serve deploy`` and KubeRay alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray.serve import Application

from unimoe_ray import config
from unimoe_ray.config import Config
from unimoe_ray.config.serve_options import DEPLOYMENTS, deployment_options, serve_config
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.training.checkpoint import fingerprint

HASH_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def build(args: dict[str, Any]) -> Application:
    """``args``: run, the run folder; serving, settings that differ from those in its config.yaml.

    Raises UsageError for a mistake in the settings, UnimoeError when the run has no finished model.
    """
    return application(config.load_run(Path(args["run"]), changes={"serving": args.get("serving", {})}))


def application(settings: Config) -> Application:
    from serve.encoders import Encoder
    from serve.ingress import Ingress, limits_actor
    from serve.language import LanguageModel

    serving = settings.serving
    folder = final_model(settings)
    tree = settings.model_dump(mode="json")
    options = {name: deployment_options(name, getattr(serving, name)) for name in DEPLOYMENTS}
    towers = {
        tower: serve.deployment(**options[tower])(Encoder).bind(tree, str(folder), tower)
        for tower in ("image", "speech", "audio")
    }
    router = {"request_router_config": {"request_router_class": HASH_ROUTER}} if serving.routing == "affinity" else {}
    language = serve.deployment(**options["language"], **router)(LanguageModel).bind(tree, str(folder))
    limits = {"deployment_actors": actors} if (actors := limits_actor(serving)) else {}
    return serve.deployment(**options["ingress"], **limits)(Ingress).bind(
        tree["serving"],
        serving.model_name or settings.name,
        settings.data.voice_as,
        fingerprint(folder),
        {kind: towers[tower] for kind, tower in TOWER_OF.items()},
        language,
    )


def write_config(settings: Config, path: Path) -> None:
    final_model(settings)
    path.write_text(yaml.safe_dump(serve_config(settings), sort_keys=False), encoding="utf-8")
