"""From our configuration to the options of a Serve deployment."""

from __future__ import annotations

from typing import Any

from unimoe_ray.config.serving import DeploymentConfig


def deployment_options(name: str, config: DeploymentConfig) -> dict[str, Any]:
    """Options of ``serve.deployment``, in the terms of Serve's config file as well."""
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
    }
