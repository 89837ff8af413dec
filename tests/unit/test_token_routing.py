"""The Parquet file of per-token routing, read back and compared with each router's own logits, sample by sample."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.tiny import make_tiny_run
from unimoe_ray.cli import main
from unimoe_ray.config import dump
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.tokens import write_token_routing
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import to_batch
from unimoe_ray.training.stages import start_model

LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(
        tmp_path_factory.mktemp("tiny"), model={"language": {"num_layers": 3}, "moe": {"layers": "interval"}}
    )


def _slow(model, sample, features) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights [T, L, K] of one sample alone, from what goes into each mixture."""
    inputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in mixtures(model)]
    with torch.no_grad():
        model(to_batch(collate([sample], features, with_labels=False)))
    for hook in hooks:
        hook.remove()
    experts, weights = [], []
    for layer, x in zip(mixtures(model), inputs, strict=True):
        logits = x[0].double() @ layer.gate.weight.detach().double().T
        order = logits.argsort(-1, descending=True)[:, :TOP_K]
        experts.append(order.numpy())
        weights.append(logits.gather(-1, order).softmax(-1).numpy())
    return np.stack(experts, 1), np.stack(weights, 1)


def test_the_file_holds_what_the_routers_did(run, tmp_path):
    source = prepare.source(run.config, "test")
    table = SampleTable(source.samples)
    samples = [table.get(row) for row in range(0, len(table), 4)]
    assert len({sample.length for sample in samples}) > 3
    features = partial(read_features, source)
    model, tokenizer = start_model(run.config, run.info, "tune").eval(), load_tokenizer(run.tokenizer)
    with torch.no_grad():
        for layer in mixtures(model):
            layer.gate.weight.mul_(20)
    path = tmp_path / "routing.parquet"
    written = write_token_routing(path, model, tokenizer, samples, features, batch_size=5)
    found = pq.read_table(path)
    assert written == len(found) == sum(sample.length for sample in samples)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (
        found.schema.metadata[b"layers"] == b"0,2" and found.schema.metadata[b"experts"] == b"base,image,speech,audio"
    )
    assert found["experts"].to_pylist()[0] == [list(map(int, pair)) for pair in found["experts"].to_pylist()[0]]

    start = 0
    for sample in samples:
        part = found.slice(start, sample.length)
        start += sample.length
        assert set(part["sample"].to_pylist()) == {sample.id} and set(part["task"].to_pylist()) == {sample.task}
        assert part["position"].to_pylist() == list(range(sample.length))
        experts, weights = _slow(model, sample, features)
        assert (np.array(part["experts"].to_pylist()) == experts).all()
        assert np.allclose(np.array(part["weights"].to_pylist()), weights, atol=1e-5)
        ids = part["token_id"].to_pylist()
        assert [i for i in ids if i >= 0] == [i for i in sample.ids if i >= 0]
        for kind, token, number in zip(*(part[n].to_pylist() for n in ("kind", "token", "token_id")), strict=True):
            assert token == (tokenizer.decode([number], skip_special_tokens=False) if kind == "text" else f"<{kind}>")
    assert set(found["kind"].to_pylist()) == {"text", "image", "video", "audio", "speech"}
    assert len({tuple(map(tuple, row)) for row in found["experts"].to_pylist()}) > 8


def test_a_dense_model_and_a_missing_folder_are_one_clear_line(run, tmp_path, capsys):
    source = prepare.source(run.config, "test")
    dense = start_model(run.config, run.info, "align")
    with pytest.raises(UnimoeError, match="no experts"):
        write_token_routing(tmp_path / "x.parquet", dense, load_tokenizer(run.tokenizer), [], None, batch_size=5)
    sparse = start_model(run.config, run.info, "tune")
    sample = SampleTable(source.samples).get(0)
    with pytest.raises(UnimoeError, match="gone/x.parquet"):
        write_token_routing(tmp_path / "gone" / "x.parquet", sparse, None, [sample], None, batch_size=5)
    (run.config.run_dir / "config.yaml").write_text(dump(run.config))
    with pytest.raises(SystemExit) as end:
        main(["eval", str(run.config.run_dir), "--routing", str(tmp_path / "gone" / "x.parquet")])
    assert end.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
