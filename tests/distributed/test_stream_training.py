"""A run whose features are made on the fly learns what one that reads them from the store learns."""

import json

import numpy as np
import pytest
import ray

from tests.stand_in_tower import pictures
from tests.tiny import tiny_config
from unimoe_ray import pipeline


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_streamed_training_has_the_losses_of_stored_training(tmp_path):
    files = pictures(tmp_path / "pictures", 30)
    turns = [{"from": "human", "value": "<image> what is this?"}]
    source = tmp_path / "source"
    source.mkdir()
    for split, part in (("train", files[:24]), ("dev", files[24:]), ("test", files[28:])):
        records = [
            {"id": p.stem, "task": "read", "image": str(p)}
            | {"conversations": [*turns, {"from": "gpt", "value": f"number {int(p.stem) % 5}"}]}
            for p in part
        ]
        (source / f"{split}.json").write_text(json.dumps(records))
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    losses = {}
    try:
        for features in ("store", "stream"):
            config = tiny_config(
                tmp_path,
                name=features,
                mini={"random_towers": True},
                data={"source": str(source), "features": features, "dir": str(tmp_path / f"data-{features}")},
                training={"validation": {"every": 2, "samples": 4}},
            )
            with pipeline.session(config) as progress:
                prepared = pipeline.prepare(config, progress)
                assert prepared.encoded == (30 if features == "store" else 6)
                pipeline.train(config, "base", progress)
            lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
            losses[features] = [line["loss"] for line in lines if "loss" in line]
    finally:
        ray.shutdown()
    assert len(losses["store"]) >= 3 and len(set(losses["store"])) == len(losses["store"])
    np.testing.assert_allclose(losses["stream"], losses["store"], rtol=2e-3)
