"""From our configuration to Ray Serve's terms: the options of a deployment, and Serve's config file."""

from __future__ import annotations

from typing import Any

from unimoe_ray.config.root import Config
from unimoe_ray.config.serving import DeploymentConfig, LanguageConfig

DEPLOYMENTS = ("image", "speech", "audio", "language", "ingress")


def deployment_options(name: str, config: DeploymentConfig) -> dict[str, Any]:
    """Options of ``serve.deployment``, in the terms of Serve's config file as well."""
    group = config.expert_parallel if isinstance(config, LanguageConfig) else None
    bundles = {}
    if group is not None and group.size:
        # Bundle 0 is the replica's own; the whole group is placed at once or not at all.
        resources = {"CPU": group.num_cpus, "GPU": group.num_gpus}
        bundles = {
            "placement_group_bundles": [
                {"CPU": config.num_cpus, "GPU": config.num_gpus},
                *[resources] * group.size,
            ],
            "placement_group_strategy": "PACK",
        }
    return {
        "name": name,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        "graceful_shutdown_timeout_s": config.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "initial_replicas": config.min_replicas if config.initial_replicas is None else config.initial_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": config.look_back_period_s,
        },
        **bundles,
    }


def serve_config(settings: Config) -> dict[str, Any]:
    """The same as a Serve config file, for ``serve deploy`` and for KubeRay's ``serveConfigV2``."""
    serving = settings.serving
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": serving.host, "port": serving.port},
        "applications": [
            {
                "name": settings.name,
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {
                    "run": str(settings.run_dir.resolve()),
                    "serving": serving.model_dump(mode="json", exclude_defaults=True),
                },
                "deployments": [deployment_options(name, getattr(serving, name)) for name in DEPLOYMENTS],
            }
        ],
    }
