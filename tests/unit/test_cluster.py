"""What a command says when there is no cluster for it."""

import pytest
import ray

from unimoe_ray import cluster, config
from unimoe_ray.errors import UnimoeError


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (Exception("The node timed out\n during startup."), UnimoeError, "is this machine busy.*out during startup"),
        (ConnectionError("nobody there"), UnimoeError, "Ray at local: nobody there"),
        (KeyError("ours"), KeyError, "ours"),
    ],
)
def test_ray_that_does_not_start_is_told_in_a_line(monkeypatch, error, kind, text):
    def init(**options):
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(kind, match=text) as told, cluster.connect(config.load("mini")):
        pass
    assert "\n" not in str(told.value)
