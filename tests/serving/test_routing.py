"""Two language replicas: requests that share their first file go to the same one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.conftest import Endpoint, serve_run
from tests.serving.media import image, png, text
from tests.serving.test_faults import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twins(servable_run) -> Iterator[Endpoint]:
    twice = ["serving.language.min_replicas=2", "serving.language.max_replicas=2"]
    yield from serve_run(servable_run.config, "serving.routing=affinity", *twice)


def answers(endpoint: Endpoint) -> list[int]:
    """How many each language replica has given."""
    files = [file.path for replica in endpoint.replicas("language") for file in replica.open_files()]
    return [Path(path).read_text().count(" tokens") for path in sorted(files) if "/logs/serve/replica_" in path]


@pytest.mark.timeout(300)
def test_questions_about_one_picture_go_to_one_replica(twins):
    seen = answers(twins)
    assert len(seen) == 2
    places, total = [], sum(seen)
    for seed in range(12):
        for question in ("what is this?", "is it red?", "and this?"):
            assert twins.chat([image(png(seed)), text(question)], max_completion_tokens=1).status_code == 200
        total += 3
        wait_for(lambda wanted=total: sum(answers(twins)) == wanted, 60)
        now = answers(twins)
        more = [after - before for before, after in zip(seen, now, strict=True)]
        assert sorted(more) == [0, 3], f"picture {seed}"
        places.append(more.index(3))
        seen = now
    assert set(places) == {0, 1}
