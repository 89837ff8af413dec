"""Shared fixtures: tiny configurations and prepared data made of random features, on real files."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from tests.tiny import TinyRun, make_tiny_run


@pytest.fixture
def tiny_run(tmp_path) -> TinyRun:
    """A run folder with prepared random data in every modality, and the start checkpoints of all stages."""
    return make_tiny_run(tmp_path)
