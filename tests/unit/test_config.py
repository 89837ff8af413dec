"""Configuration: presets, overrides, and mistakes that name the key, the value and what is allowed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.tiny import tiny_config
from unimoe_ray.config import Config, dump, load, load_run, parse
from unimoe_ray.config.model import MoEConfig
from unimoe_ray.config.training import TrainRun
from unimoe_ray.errors import UnimoeError, UsageError

RUN = {"steps": 1, "tasks": {"a": 1}, "train": {"language": 1e-3}}


def leaf_keys(model: BaseModel, prefix: str = "") -> list[str]:
    keys = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        keys.append(prefix + name)
        if isinstance(value, BaseModel):
            keys += leaf_keys(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, entry in value.items():
                keys += leaf_keys(entry, f"{prefix}{name}.{key}.") if isinstance(entry, BaseModel) else []
    return keys


def test_preset_with_overrides():
    config = load("mini", ["training.workers=1", "seed=7", "stages.tune.tune.train.connector.image=1.5e-3", "name=x"])
    assert config.training.workers == 1 and config.seed == 7
    assert config.stages.tune["tune"].train["connector.image"] == 1.5e-3
    assert "connector.image.projection" in config.stages.tune["tune"].train
    assert config.run_dir.as_posix() == "runs/x"
    assert load("mini").seed == 0


def test_suite_seed_follows_the_seed_unless_given():
    assert load("mini", ["seed=4"]).suite_seed == 4
    assert load("mini", ["seed=4", "mini.suite_seed=0"]).suite_seed == 0


@pytest.mark.parametrize("make", [lambda p: load("mini", ["seed=3"]), lambda p: tiny_config(p)])
def test_dump_loads_to_the_same(tmp_path, make):
    config = make(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert load(path, ["seed=9"]).seed == 9


@pytest.mark.parametrize("key", [k for k in leaf_keys(load("mini")) if len(k.split(".")[-1]) > 3])
def test_a_letter_too_few_names_the_right_key(key):
    head, _, last = key.rpartition(".")
    wrong = f"{head}{'.' if head else ''}{last[:2]}{last[3:]}"
    with pytest.raises(UsageError) as error:
        load("mini", [f"{wrong}=1"])
    assert str(error.value) == f"unknown key '{wrong}'; did you mean '{key}'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.workers=many", "training.workers is 'many': .*integer.*'auto'"),
        ("training.workers=0", "training.workers is 0: allowed: 'auto' or a number from 1"),
        ("model.video.pooling=max", "model.video.pooling is 'max': .*'frames' or 'mean'"),
        ("model.moe.top_k=9", "model.moe: top_k is 9, but there are only 4 expert slots"),
        ("model.video.frames=3", r"model.video: frames \(3\) must be a multiple of temporal_merge \(2\)"),
        ("model.language.num_heads=3", "model.language: hidden_size must be a multiple of num_heads"),
        (
            "stages.tune.tune.train.connector.imge=1e-3",
            r"stages.tune.tune.train: 'connector.imge' .*connector.<modality>",
        ),
        ("stages.tune.tune.train.lora=2", "learning rate of 'lora' is 2.0; allowed: above 0, below 1"),
        ("stages.tune.tune.tasks.text=0", "stages.tune.tune.tasks: weight of task 'text' is 0.0; allowed: above 0"),
        ("stages.tune.tune.lora=null", "'lora' needs both a rate under train and its settings under lora"),
        (
            "stages.experts.image.train.connector.speech=1e-3",
            "connector.speech is trained by both 'image' and 'speech'",
        ),
        ("stages.tune.other={steps: 1, tasks: {text: 1}, train: {router: 0.1}}", "tune can have one run only"),
        ("stages.tune.tune.epochs=2", "steps is 220 and epochs is 2; give one of them"),
        ("stages.tune.tune.steps=null", "steps is None and epochs is None; give one of them"),
        (
            "stages.tune.other={epochs: 1, temperature: 2, tasks: {text: 1}, train: {router: 0.1}}",
            "temperature makes shares of steps; an epoch has every sample",
        ),
        (
            "stages.tune.other={epochs: 1, tasks: {text: 1.5}, train: {router: 0.1}}",
            "weight of task 'text' is 1.5; allowed with epochs: whole numbers",
        ),
        ("stages.tune.other.steps=3", "stages.tune.other.tasks: Field required"),
        ("seed=-1", "seed is -1: .*greater than or equal to 0"),
        ("name=../x", "name is '../x': .*pattern"),
        ("data=3", "data is 3: .*dictionary"),
        ("seed", "'seed' is not an override; write key.sub=value"),
        ("=3", "'=3' is not an override"),
        ("seed=[", r"seed: '\[' is not a valid YAML value"),
        ("seed.sub=3", "seed.sub: 'seed' has no keys below it"),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(UsageError, match=message) as error:
        load("mini", [override])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_epochs_have_whole_weights():
    epochs = ["stages.tune.tune.steps=null", "stages.tune.tune.epochs=2"]
    assert load("mini", epochs).stages.tune["tune"].epochs == 2
    with pytest.raises(UsageError, match=r"data.sources.1.weight is 1.5; allowed with runs of epochs: whole numbers"):
        load("mini", [*epochs, "data.sources=[{path: a.json, weight: 2}, {path: b.json, weight: 1.5}]"])


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="--config nothing: no such preset; allowed: .*mini.*"):
        load("nothing")
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.yaml")
    for content in (b"a: [", b"\xff\xfe\x00", b"- 1\n", b"", b"&a [*a]"):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(UsageError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Config.model_fields, "tune", "train", "lora", "x", 1]), inner, max_size=4
            )
        ),
    )
)
def test_any_tree_is_a_configuration_or_one_line(value):
    for key in ("stages", "model", "training", "evaluation"):
        try:
            parse({key: value})
        except UsageError as error:
            assert key in str(error) and "\n" not in str(error)


def test_assignment_is_validated_too():
    config = load("mini")
    with pytest.raises(ValueError, match="workers"):
        config.training.workers = -1
    with pytest.raises(ValueError, match="no attribute .wokers."):
        config.training.wokers = 1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("interval", [0, 2, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ("none", []),
    ],
)
def test_sparse_layers(layers, expected):
    assert MoEConfig(layers=layers).sparse_layers(5) == expected


def test_connectors_of_a_run():
    train = {"connector.video.projection": 1e-3, "connector.image": 1e-3, "language": 1e-3}
    assert TrainRun(**RUN | {"train": train}).connectors() == ["image", "video"]


def test_several_align_runs_may_not_share_a_connector():
    align = {name: RUN | {"train": {f"connector.{name}": 1e-3}} for name in ("image", "audio")}
    assert set(parse({"stages": {"align": align}}).stages.align) == {"image", "audio"}
    align["audio"]["train"]["connector.image.projection"] = 1e-3
    with pytest.raises(UsageError, match="connector.image is trained by both 'image' and 'audio' of align"):
        parse({"stages": {"align": align}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serving.port=0", "serving.port is 0: Input should be greater than or equal to 1"),
        ("serving.enigne.max_running=2", "unknown key 'serving.enigne'; did you mean 'serving.engine'"),
        ("serving.image.min_replicas=3", r"min_replicas \(3\) is above max_replicas \(2\)"),
        ("serving.audio.initial_replicas=9", r"initial_replicas \(9\) is not between"),
        ("serving.language.min_replicas=0", "language.min_replicas is 0; allowed: from 1"),
        ("serving.engine.kv_tokens=0", "serving.engine.kv_tokens is 0: allowed: 'auto' or a number from 1"),
        ("serving.media_hosts=[https://example.org]", "'https://example.org' is not a host"),
        ("serving.model_name='two words'", "serving.model_name is 'two words'"),
    ],
)
def test_mistakes_in_the_serving_settings(override, message):
    with pytest.raises(UsageError, match=message):
        load("mini", [override])


def test_a_run_is_loaded_where_it_lies_with_changes_at_any_depth(tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(load("mini", ["serving.engine.max_running=3", "seed=5"])))
    settings = load_run(folder, ["serving.port=9000"], {"serving": {"engine": {"kv_tokens": 77}}})
    assert (settings.name, settings.runs_dir, settings.seed) == ("moved", str(tmp_path), 5)
    assert (settings.serving.port, settings.serving.engine.max_running, settings.serving.engine.kv_tokens) == (
        9000,
        3,
        77,
    )
    with pytest.raises(UnimoeError, match="no such run folder"):
        load_run(tmp_path / "gone")


def test_a_key_of_a_section_leaves_the_sections_other_defaults():
    ingress = load("mini", ["serving.ingress.max_replicas=4"]).serving.ingress
    assert (ingress.max_replicas, ingress.num_cpus, ingress.max_ongoing_requests) == (4, 0.5, 512)
    node = load("mini", ["kubernetes.nodes.large_gpu.gpus=4"]).kubernetes.nodes.large_gpu
    assert (node.gpus, node.gpu_memory_gib) == (4, 79)
