"""``unimoe export --format mixtral``: a stock Mixtral with the same logits, or one clear line why not."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from tests.tiny import make_servable_run
from tests.unit.test_cli import fails, prints
from unimoe_ray.config.model import LanguageConfig
from unimoe_ray.data.tokenizer import load_tokenizer
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.interop.mixtral import write_mixtral
from unimoe_ray.model.language import RoutingRecorder, build_llama, mixtures, upcycle
from unimoe_ray.training.checkpoint import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_servable_run(tmp_path_factory.mktemp("mixtral"))


def sparse_llama(layers, top_k=2, **sizes):
    torch.manual_seed(0)
    config = LanguageConfig(hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, **sizes)
    llama = build_llama(config, 50)
    upcycle(llama, layers, 5, top_k, RoutingRecorder())
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return llama.eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def test_the_exported_run_has_the_logits_and_the_tokenizer_of_the_model(capsys, run, tmp_path):
    to = tmp_path / "mixtral"
    assert prints(capsys, "export", run.config.run_dir, "--format", "mixtral", "--to", to) == f"{to}\n"
    found = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    assert type(found) is MixtralForCausalLM
    model, info, tokenizer = load_model(final_model(run.config))
    ids = torch.randint(0, info.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(found, ids), logits(model.language, ids), atol=1e-5, rtol=0)
    text = "what is this? a red circle"
    assert AutoTokenizer.from_pretrained(to)(text).input_ids == tokenizer.encode(text).ids
    assert load_tokenizer(to / "tokenizer.json").get_vocab() == tokenizer.get_vocab()
    assert found.generation_config.eos_token_id == 2


@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_any_number_of_experts_over_several_shards(tmp_path, top_k, tied):
    llama = sparse_llama(range(3), top_k, tie_embeddings=tied, rope_theta=500.0, rms_norm_eps=1e-3)
    write_mixtral(llama, tmp_path, max_shard_bytes=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    ids = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(found, ids), logits(llama, ids), atol=1e-5, rtol=0)


def test_dense_layers_and_biases_are_refused(tmp_path):
    with pytest.raises(UnimoeError, match="1 of 3 layers are dense; every layer of a Mixtral is sparse"):
        write_mixtral(sparse_llama([0, 2]), tmp_path)
    biased = sparse_llama(range(3))
    biased.config.attention_bias = True
    with pytest.raises(UnimoeError, match="biases"):
        write_mixtral(biased, tmp_path)
    assert len(mixtures(biased)) == 3 and not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path):
    half = make_servable_run(tmp_path / "half", model={"moe": {"layers": "first_half"}})
    to = tmp_path / "to"
    code, line = fails(capsys, "export", half.config.run_dir, "--format", "mixtral", "--to", to)
    assert (code, line) == (1, "1 of 2 layers are dense; every layer of a Mixtral is sparse")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]
    to.mkdir()
    (to / "mine").write_text("x")
    code, line = fails(capsys, "export", half.config.run_dir, "--format", "mixtral", "--to", to)
    assert (code, line) == (2, f"--to {to}: exists; give a folder that does not")
    code, line = fails(capsys, "export", tmp_path / "gone", "--format", "mixtral", "--to", tmp_path / "new")
    assert code == 1 and line.endswith("gone: no such run folder (it has no config.yaml)")
