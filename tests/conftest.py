"""Shared fixtures: tiny configurations and prepared data made of random features, on real files."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import TinyRun, make_tiny_run

# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Folders whose tests start Ray clusters, which have fixed ports and need the machine: one at a time.
CLUSTERS = {"chaos", "distributed", "serving"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one group run in one process, one after another, when several processes share the tests."""
    for item in items:
        folder = item.path.parent.name
        group = "clusters" if folder in CLUSTERS else folder if folder == "kubernetes" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def tiny_run(tmp_path) -> TinyRun:
    """A run folder with prepared random data in every modality, and the start checkpoints of all stages."""
    return make_tiny_run(tmp_path)
