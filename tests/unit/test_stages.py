"""What each stage starts from and trains; LoRA and its merge; experts and connectors into their places."""

import math
from pathlib import Path

import pytest
import torch

from tests.tiny import DIMS, TinyRun, make_tiny_run, save_start, tiny_config
from unimoe_ray.config.model import MODALITIES
from unimoe_ray.config.training import LoraConfig, OptimizerConfig, TrainRun
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.errors import UsageError
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE, to_batch
from unimoe_ray.training.checkpoint import checkpoint_dir, read_weights
from unimoe_ray.training.engine import learning_rate_factor
from unimoe_ray.training.stages import add_lora, make_trainable, merge_lora, parents, start_model

RUN = {"steps": 1, "tasks": {"see": 1}}
LORA = LoraConfig(r=3, alpha=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def batch(run):
    source = prepare.source(run.config, "train")
    table = SampleTable(Path(source.samples))
    rows = [int(row) for rows in table.by_task().values() for row in rows[:2]]
    return to_batch(collate([table.get(row) for row in rows], lambda name: read_features(source, name)))


def trained_names(model: UniMoE) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def weights_of(run: TinyRun, stage: str, name: str) -> dict[str, torch.Tensor]:
    return read_weights(checkpoint_dir(run.config.run_dir, stage, name))


def kinds_of(names: set[str]) -> set[str]:
    """lora, gate, connector.<modality>.<part>, or the language model's own weights."""
    kinds = set()
    for name in names:
        parts = name.split(".")
        lora = next((p for p in parts if p.startswith("lora_")), None)
        kinds.add(lora or (".".join(parts[:3]) if parts[0] == "connectors" else parts[-2]))
    return kinds


# What is trained


def test_every_stage_trains_its_parts_only(run):
    expected = {
        ("base", "base"): {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}
        | {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")},
        ("align", "align"): {f"connectors.{m}.{part}" for m in MODALITIES for part in ("norm", "input", "projection")},
        ("experts", "speech"): {"lora_A", "lora_B"}
        | {f"connectors.speech.{part}" for part in ("norm", "input", "projection")},
        ("tune", "tune"): {"lora_A", "lora_B", "gate"} | {f"connectors.{m}.projection" for m in MODALITIES},
    }
    for (stage, name), kinds in expected.items():
        settings = getattr(run.config.stages, stage)[name]
        model = start_model(run.config, run.info, stage)
        groups = make_trainable(model, settings)
        assert kinds_of(trained_names(model)) == kinds
        assert {group.name: group.lr for group in groups} == settings.train
        grouped = [id(p) for group in groups for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("sparse", [False, True])
def test_feed_forward_selects_every_mlp_weight_and_no_router(run, sparse):
    model = start_model(run.config, run.info, "tune" if sparse else "experts")
    make_trainable(model, TrainRun(**RUN, train={"feed_forward": 1e-3}))
    names = trained_names(model)
    assert all(".mlp." in name for name in names) and not any(name.endswith("mlp.gate.weight") for name in names)
    assert len(names) == 2 * 3 * (4 if sparse else 1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"router": 1e-3}, "train selector 'router' matches no parameters of this stage's model"),
        ({"language": 1e-3, "feed_forward": 1e-3}, "train selector 'feed_forward' overlaps another one"),
        ({"connector.image": 1e-3, "connector.image.projection": 1e-3}, "'connector.image.projection' overlaps"),
    ],
)
def test_selectors_that_fit_nothing_or_overlap(run, train, message):
    with pytest.raises(UsageError, match=message):
        make_trainable(start_model(run.config, run.info, "align"), TrainRun(**RUN, train=train))


# LoRA


@pytest.mark.parametrize(
    ("targets", "adapters"),
    [(["attention"], 2 * 4), (["feed_forward"], 2 * 4 * 3), (["attention", "feed_forward"], 2 * 4 + 2 * 4 * 3)],
)
def test_lora_adapts_every_expert_and_never_the_router(run, targets, adapters):
    model = start_model(run.config, run.info, "tune")
    add_lora(model, LoraConfig(r=3, targets=targets))
    names = [name for name, _ in model.language.named_parameters() if "lora_A" in name]
    assert len(names) == adapters
    assert not any(".mlp.gate.lora" in name for name in names)
    assert any(".experts.3.down_proj.lora" in name for name in names) == ("feed_forward" in targets)


def adapted(run: TinyRun, stage: str) -> UniMoE:
    torch.manual_seed(0)
    model = start_model(run.config, run.info, stage)
    add_lora(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("stage", ["experts", "tune"])
def test_merged_lora_computes_the_same(run, batch, stage):
    plain = start_model(run.config, run.info, stage)
    model = adapted(run, stage)
    with torch.no_grad():
        before = model(batch).token_loss.item()
        without = plain(batch).token_loss.item()
        merge_lora(model)
        after = model(batch).token_loss.item()
    assert abs(before - without) > 0.1
    assert after == pytest.approx(before, rel=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_merged_weights_are_w_plus_scaled_b_a(run):
    plain, model = start_model(run.config, run.info, "tune").state_dict(), adapted(run, "tune")
    adapters = {n: p.detach().clone() for n, p in model.language.named_parameters() if ".lora_" in n}
    merge_lora(model)
    changed = set()
    for name, weight in model.state_dict().items():
        stem = "base_model.model." + name.removeprefix("language.").removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in adapters:
            update = adapters[f"{stem}.lora_B.default.weight"] @ adapters[f"{stem}.lora_A.default.weight"]
            assert torch.allclose(weight, plain[name] + 5 / 3 * update, atol=1e-5), name
            changed.add(name)
        elif not name.endswith("mlp.gate.weight"):  # the router starts at random in both
            assert torch.equal(weight, plain[name]), name
    assert len(changed) == len(adapters) / 2


def test_lora_starts_as_no_change(run, batch):
    model = start_model(run.config, run.info, "experts")
    with torch.no_grad():
        before = model(batch).token_loss.item()
        add_lora(model, LORA)
        assert model(batch).token_loss.item() == pytest.approx(before, rel=1e-6)


# Starting points


def parent_names(config, stage: str) -> list[str]:
    return [checkpoint_dir(config.run_dir, *parent).name for parent in parents(config, stage)]


def test_parents(tmp_path):
    experts = ["experts-image", "experts-speech", "experts-audio"]
    config = tiny_config(tmp_path)
    assert [parent_names(config, stage) for stage in ("base", "align", "experts")] == [[], ["base"], ["align"]]
    assert parent_names(config, "tune") == ["align", *experts]
    config.model.moe.init = "copies"
    assert parent_names(config, "tune") == ["align"]
    config = tiny_config(tmp_path)
    config.stages.align = {}
    assert parent_names(config, "experts") == ["base"] and parent_names(config, "tune") == ["base", *experts]
    config.stages.base, config.stages.experts = {}, {}
    assert parent_names(config, "tune") == []


def test_connectors_take_the_scale_of_the_text_when_align_starts(run):
    base = weights_of(run, "base", "base")
    rms = base["language.model.embed_tokens.weight"].pow(2).mean(-1).sqrt().mean().item()
    model = start_model(run.config, run.info, "align")
    assert [connector.scale.item() for connector in model.connectors.values()] == pytest.approx([rms] * 4)
    for name, weight in base.items():
        if not name.endswith(".scale"):
            assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("slots", [["base", "image", "speech", "audio"], ["audio", "audio", "base", "image"]])
@pytest.mark.parametrize("layers", ["all", "second_half"])
def test_experts_go_into_their_slots(run, slots, layers):
    config = run.config.model_copy(deep=True)
    config.model.moe.slots, config.model.moe.layers = slots, layers
    info = type(run.info)(**run.info.__dict__ | {"model": config.model.model_dump(mode="json")})
    model = start_model(config, info, "tune")
    assert len(mixtures(model)) == (2 if layers == "all" else 1)
    dense = weights_of(run, "align", "align")
    for index, layer in enumerate(model.language.model.layers):
        prefix = f"language.model.layers.{index}.mlp."
        if layer.mlp not in mixtures(model):
            assert torch.equal(layer.mlp.up_proj.weight, dense[f"{prefix}up_proj.weight"])
            continue
        for slot, name in enumerate(slots):
            source = dense if name == "base" else weights_of(run, "experts", name)
            for part in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts[slot], part).weight
                assert torch.equal(weight, source[f"{prefix}{part}.weight"]), (index, slot, part)


def test_copies_are_all_the_dense_layer(run):
    config = run.config.model_copy(deep=True)
    config.model.moe.init = "copies"
    model = start_model(config, run.info, "tune")
    dense = weights_of(run, "align", "align")
    for index, layer in enumerate(mixtures(model)):
        wanted = dense[f"language.model.layers.{index}.mlp.up_proj.weight"]
        assert all(torch.equal(expert.up_proj.weight, wanted) for expert in layer.experts)


def test_an_unknown_slot(run):
    config = run.config.model_copy(deep=True)
    config.model.moe.slots = ["base", "image", "smell"]
    with pytest.raises(UsageError, match="names 'smell', .*; allowed: base, image, speech, audio"):
        start_model(config, run.info, "tune")


def marked(run: TinyRun, mark: float) -> UniMoE:
    """A model whose connectors say where they come from."""
    model = run.info.build()
    with torch.no_grad():
        for parameter in model.connectors.parameters():
            parameter.fill_(mark)
    return model


def marks(model: UniMoE) -> dict[str, float]:
    return {name: connector.projection.weight[0, 0].item() for name, connector in model.connectors.items()}


def test_tune_takes_each_connector_from_the_run_that_trained_it(tmp_path):
    run = make_tiny_run(tmp_path)
    run.config.stages.experts["image"].train["connector.video"] = 1e-3
    for mark, (stage, name) in enumerate(
        [("align", "align"), ("experts", "image"), ("experts", "speech"), ("experts", "audio")]
    ):
        save_start(run, marked(run, mark), stage, name)
    assert marks(start_model(run.config, run.info, "tune")) == {"image": 1, "video": 1, "audio": 3, "speech": 2}
    del run.config.stages.experts["image"].train["connector.video"]
    assert marks(start_model(run.config, run.info, "tune")) == {"image": 1, "video": 0, "audio": 3, "speech": 2}
    assert marks(start_model(run.config, run.info, "experts")) == dict.fromkeys(MODALITIES, 0)


def test_experts_take_each_connector_from_the_align_run_that_trained_it(tmp_path):
    run = make_tiny_run(tmp_path)
    align = run.config.stages.align["align"].model_dump()
    run.config.stages.align = {
        "a": TrainRun(**align | {"train": {"connector.image": 1e-3, "connector.video": 1e-3}}),
        "b": TrainRun(**align | {"train": {"connector.audio": 1e-3, "connector.speech": 1e-3}}),
    }
    for mark, name in enumerate("ab", start=1):
        save_start(run, marked(run, mark), "align", name)
    assert marks(start_model(run.config, run.info, "experts")) == {"image": 1, "video": 1, "audio": 2, "speech": 2}
    assert set(DIMS) == set(MODALITIES)


# Rates


def test_learning_rates_warm_up_and_fall():
    config = OptimizerConfig(warmup=0.1, final_fraction=0.2)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert 0.2 < factors[-1] < 0.201
    assert [learning_rate_factor(0, 1, config), learning_rate_factor(0, 3, OptimizerConfig(warmup=0))] == [1, 1]
