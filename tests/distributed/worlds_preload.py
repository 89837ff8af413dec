"""Imported once, by the process that the workers of ``worlds`` are forked from."""

import deepspeed  # noqa: F401

import tests.distributed.worlds
import unimoe_ray.parallel.relocate  # noqa: F401
