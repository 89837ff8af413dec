"""Imported once, by the process that the workers of ``worlds`` are forked from."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (DeepSpeed imports it when it first reduces)
import torch

import unimoe_ray.parallel.relocate  # noqa: F401
from tests.distributed.worlds import Model, build

torch.set_num_threads(1)
build(Model("lora"))  # what peft and transformers import late
