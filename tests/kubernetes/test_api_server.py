"""The server of the fixture is what the other tests take it for."""

from __future__ import annotations


def test_the_api_server_serves_kuberays_kinds(api_server):
    answer = api_server.kubectl("api-resources", "--api-group=ray.io", "-o", "name")
    assert answer.returncode == 0, answer.stderr
    assert {"rayclusters.ray.io", "rayjobs.ray.io", "rayservices.ray.io"} <= set(answer.stdout.split())
