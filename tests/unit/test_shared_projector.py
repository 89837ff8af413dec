"""``model.connectors.video: image``: one projector for images and the frames of videos, one parameter everywhere."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMultimodalLM

import unimoe_ray.interop.huggingface  # noqa: F401
from tests.tiny import TinyRun, make_servable_run, make_tiny_run, tiny_config
from unimoe_ray.config import load, parse
from unimoe_ray.convert import export
from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.model.features import Features
from unimoe_ray.model.unimoe import Batch, UniMoE
from unimoe_ray.parameter_table import count_parameters
from unimoe_ray.training.checkpoint import WEIGHTS, load_connectors, load_model
from unimoe_ray.training.stages import make_trainable, start_model

SHARED = {"connectors": {"video": "image"}, "video": {"frames": 2, "pooling": "mean"}}
KINDS = {"mlp with rms": {"type": "mlp"}, "mlp2x_gelu": {"type": "mlp2x_gelu", "match_text_rms": False}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> TinyRun:
    return make_servable_run(tmp_path_factory.mktemp("shared"), model=SHARED | {"connector": KINDS[request.param]})


def frames(dim: int) -> Features:
    values = torch.randn(4, 9, dim)
    return Features(values, torch.full((4,), 9), torch.tensor([0, 0, 1, 1]))


def same(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    a, b = found.state_dict(), wanted.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_a_video_is_the_mean_of_its_frames_as_images(run):
    model, info, _ = load_model(final_model(run.config))
    features = frames(info.feature_dims["image"])
    images = model.connectors["image"](features).values
    torch.testing.assert_close(model.connectors["video"](features).values, images.view(2, 2, 9, -1).mean(1))


def test_it_is_one_parameter(run):
    model = run.info.build()
    assert not [name for name, _ in model.named_parameters() if name.startswith("connectors.video.")]
    groups = make_trainable(model, run.config.stages.tune["tune"])
    trained = [id(parameter) for group in groups for parameter in group.parameters]
    assert len(trained) == len(set(trained))
    assert all(p.requires_grad for p in model.connectors["video"].projection.parameters())
    sizes = count_parameters(run.config)
    assert sizes.connectors["video"] == 0
    assert sum(sizes.connectors.values()) == sum(p.numel() for p in model.connectors.parameters())


def test_model_folders_have_it_once_and_give_it_to_both(run):
    folder = final_model(run.config)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        held = [name for name in file.keys() if name.startswith("connectors.video.")]  # noqa: SIM118
    assert held == (["connectors.video.scale"] if run.config.model.connector.match_text_rms else [])
    model, *_ = load_model(folder)
    for modalities in (["image", "video"], ["video"]):
        served, _ = load_connectors(folder, modalities)
        assert all(same(served[modality], model.connectors[modality]) for modality in modalities)


def test_a_step_on_videos_trains_what_reads_images(tmp_path):
    run = make_tiny_run(tmp_path, model=SHARED)
    model: UniMoE = start_model(run.config, run.info, "tune")
    groups = make_trainable(model, run.config.stages.tune["tune"])
    batch = Batch(
        torch.tensor([[1, *[-400] * 9, 5, 6]]), torch.ones(1, 12, dtype=torch.bool), torch.full((1, 12), -100)
    )
    batch.labels[0, -1] = 6
    batch.features["video"] = Features(torch.randn(2, 9, 6), torch.full((2,), 9), torch.zeros(2, dtype=torch.int64))
    loss = model(batch)
    loss.token_loss.backward()
    (group,) = [group for group in groups if group.name == "connector.image.projection"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in group.parameters)


def test_transformers_save_it_once(run, tmp_path):
    export(run.config.run_dir, "hf", tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        held = [name for name in file.keys() if ".connectors.video." in name]  # noqa: SIM118
    assert [name for name in held if not name.endswith("scale")] == []
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "hf")
    model, *_ = load_model(final_model(run.config))
    assert same(whole.unimoe.connectors, model.connectors)
    video, image = (whole.unimoe.connectors[kind].projection for kind in ("video", "image"))
    assert video is image
    np.testing.assert_array_equal(*(next(part.parameters()).detach().numpy() for part in (video, image)))


def test_the_published_presets_share_it_and_mini_does_not():
    assert load("uni-moe-7b-4e").model.video_shares_image and load("uni-moe-7b-8e").model.video_shares_image
    assert not load("mini").model.video_shares_image


def test_mistakes(tmp_path):
    with pytest.raises(UsageError, match="video.pooling is frames, allowed: mean"):
        tiny_config(tmp_path, model={"connectors": {"video": "image"}})
    tree = tiny_config(tmp_path).model_dump(mode="json")
    tree["model"] |= {"connectors": {"video": "image"}, "video": {"frames": 2, "pooling": "mean"}}
    with pytest.raises(UsageError, match="stages.align.align trains connector.video, which is the image connector"):
        parse(tree)
    with pytest.raises(UsageError, match="model.connectors.video is 'speech'"):
        tiny_config(tmp_path, model={"connectors": {"video": "speech"}})
