"""Typed configuration. ``load("mini", ["training.workers=1"])`` gives a validated ``Config``."""

from unimoe_ray.config.root import Config, dump, load, load_run, parse

__all__ = ["Config", "dump", "load", "load_run", "parse"]
