"""Typed configuration. ``load("mini", ["training.workers=1"])`` gives a validated ``Config``."""

from unimoe_ray.config.root import Config, dump, load, parse

__all__ = ["Config", "dump", "load", "parse"]
