"""Which precision training takes, and the warning about one that the CPU is slow at."""

import logging

import pytest
import torch

from unimoe_ray.config.training import TrainingConfig
from unimoe_ray.training.engine import pick_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "fast", "dtype", "warned"),
    [
        ("auto", False, torch.float32, False),
        ("fp32", False, torch.float32, False),
        ("bf16", False, torch.bfloat16, True),
        ("bf16", True, torch.bfloat16, False),
    ],
)
def test_precision_on_cpus(precision, fast, dtype, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    with caplog.at_level(logging.WARNING):
        assert pick_precision(TrainingConfig(precision=precision), CPU) is dtype
    assert ("training.precision is bf16" in caplog.text) == warned
