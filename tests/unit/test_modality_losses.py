"""The official 8 experts' multimodal and KL losses in training: those of the reference functions on the same logits."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.tiny import DIMS, tiny_config
from unimoe_ray.config import load
from unimoe_ray.config.model import PLACEHOLDER_IDS, TOKEN_KINDS, MoEConfig
from unimoe_ray.errors import UsageError
from unimoe_ray.interop import official_8e
from unimoe_ray.model.features import Features
from unimoe_ray.model.language import RoutingRecorder
from unimoe_ray.model.modality_losses import kl_losses, multimodal_losses
from unimoe_ray.model.unimoe import Batch, UniMoE

EXPERTS = {"image": [2, 3, 4], "video": [2, 3], "audio": [0, 4, 5]}
GOLDEN = Path(os.environ.get("UNIMOE_GOLDEN", "../shared/golden"))


def stretches(kinds: list[list[str]]) -> dict[str, list[list[list[int]]]]:
    """As the reference functions want them: of each kind, for each sample, [start, end) of its tokens."""
    return {
        kind: [[[place, place + 1] for place, found in enumerate(row) if found == kind] for row in kinds]
        for kind in ("image", "audio", "video", "text")
    }


def flat(kinds: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.tensor([TOKEN_KINDS.index(kind) for row in kinds for kind in row])
    return index, torch.tensor([owner for owner, row in enumerate(kinds) for _ in row])


ROW = st.lists(st.sampled_from(["text", "image", "audio", "video"]), min_size=12, max_size=12)


@settings(max_examples=80, deadline=None)
@given(kinds=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_they_are_those_of_the_reference_functions(kinds, seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(len(kinds), 12, 6, dtype=torch.float64)
    index, owners = flat(kinds)
    ranges, tokens = stretches(kinds), logits.view(-1, 6)
    found = multimodal_losses(tokens, index, owners, len(kinds), EXPERTS)
    torch.testing.assert_close(found.sum(), official_8e.multimodal_loss(logits, ranges, EXPERTS))
    torch.testing.assert_close(kl_losses(tokens, index, owners, len(kinds)).sum(), official_8e.kl_loss(logits, ranges))


def test_they_are_those_of_the_official_code():
    if not (GOLDEN / "losses_8e.json").is_file():
        pytest.skip(f"no losses_8e in {GOLDEN}")
    spec = json.loads((GOLDEN / "losses_8e.json").read_text())
    tensors, config = load_file(GOLDEN / "losses_8e.safetensors"), spec["config"]
    size = (config["batch"], config["length"])
    kinds = torch.full(size, -1)
    for kind, samples in spec["token_ranges"].items():
        for row, parts in enumerate(samples):
            for start, end in parts:
                kinds[row, start:end] = TOKEN_KINDS.index(kind)
    listed = kinds.view(-1) >= 0
    owners = torch.arange(size[0]).repeat_interleave(size[1])
    experts = {kind: config[f"{kind}_expert_indices"] for kind in ("image", "video", "audio")}
    layers = [tensors[name] for name in tensors if "gate_logits_layer" in name]
    plain = tensors["outputs/loss_ce"]
    kl = sum(kl_losses(layer[listed], kinds.view(-1)[listed], owners[listed], size[0]).sum() for layer in layers)
    torch.testing.assert_close(plain + config["coef"] * kl, tensors["outputs/loss_ce_kl"], atol=1e-5, rtol=0)
    # Tokens that no range lists count for the length of their sample.
    marked = kinds.view(-1).clamp(min=0)
    found = sum(multimodal_losses(layer, marked, owners, size[0], experts).sum() for layer in layers)
    wanted = tensors["outputs/loss_ce_multimodal"]
    torch.testing.assert_close(plain + config["coef"] * found, wanted, atol=1e-5, rtol=0)


def model_and_batch(**moe) -> tuple[UniMoE, Batch]:
    torch.manual_seed(0)
    slots = ["base", "image", "speech", "audio"]
    model = UniMoE(tiny_config(Path("."), model={"moe": {"slots": slots} | moe}).model, 300, DIMS)
    model.make_sparse()
    ids = torch.tensor(
        [[1, *[PLACEHOLDER_IDS["image"]] * 4, 7, 8, 9], [1, 5, *[PLACEHOLDER_IDS["audio"]] * 3, 6, 0, 0]]
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    labels = torch.where(mask & (ids > 5), ids, -100)
    features = {
        "image": Features(torch.randn(1, 4, DIMS["image"]), torch.tensor([4]), torch.tensor([0])),
        "audio": Features(torch.randn(1, 3, DIMS["audio"]), torch.tensor([3]), torch.tensor([0])),
    }
    return model, Batch(ids, mask, labels, features)


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_training_adds_them_without_padding(over):
    coefs = {"multimodal_loss_coef": 0.3, "kl_loss_coef": 0.2, "balance_over_layers": over}
    model, batch = model_and_batch(**coefs)
    loss = model(batch)
    kinds = [["text", *["image"] * 4, "text", "text", "text"], ["text", "text", *["audio"] * 3, "text"]]
    experts = {"image": [1], "video": [1], "audio": [3], "speech": [2]}
    wanted = 0.0
    for stats in model.recorder.layers:
        for row, logits in enumerate(stats.routing.logits.split([8, 6])):
            ranges = stretches([kinds[row]])
            of_sample = 0.3 * official_8e.multimodal_loss(logits[None], ranges, experts)
            wanted = wanted + (of_sample + 0.2 * official_8e.kl_loss(logits[None], ranges)) / 2
    wanted = wanted / 2 if over == "mean" else wanted
    torch.testing.assert_close(loss.router_loss, wanted)
    loss.router_loss.backward()
    for layer in (model.language.model.layers[index].mlp for index in range(2)):
        assert layer.gate.weight.grad.abs().sum() > 0


def test_the_gradient_sends_tokens_to_their_modalitys_expert():
    model, batch = model_and_batch(multimodal_loss_coef=1.0)
    gates = [layer.mlp.gate.weight for layer in model.language.model.layers]
    optimizer = torch.optim.Adam(gates, lr=0.03)

    def at_home() -> torch.Tensor:
        model(batch)
        place = batch.input_ids[batch.mask] == PLACEHOLDER_IDS["image"]
        return torch.stack([s.routing.logits[place].softmax(-1)[:, 1].mean() for s in model.recorder.layers])

    before = at_home()
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).router_loss.backward()
        optimizer.step()
    assert (at_home() > before + 0.2).all()


def test_parts_of_a_group_add_up_to_its_mean():
    """As two processes would compute it, one of them without a sample in one of its rows."""
    model, batch = model_and_batch(multimodal_loss_coef=1.0, kl_loss_coef=1.0)
    whole = model(batch).router_loss.detach()
    parts = []
    for row, kind in enumerate(("image", "audio")):
        model.recorder.group_sum = lambda tensor: tensor + 1 if tensor.ndim == 0 else tensor
        part = Batch(batch.input_ids[[row]], batch.mask[[row]], batch.labels[[row]], {kind: batch.features[kind]})
        parts.append(model(part).router_loss.detach())
    torch.testing.assert_close(sum(parts), whole)
    model.recorder.group_sum = None
    empty = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool), torch.full((1, 1), -100))
    assert model(empty).router_loss == 0


def test_experts_are_found_by_the_names_of_slots():
    assert load("uni-moe-7b-8e").model.moe.experts_by_modality() == {
        "image": [3, 4],
        "video": [3, 4],
        "audio": [0],
        "speech": [4, 5, 7],
    }
    assert MoEConfig(slots=["video", "image"]).experts_by_modality() == {"image": [1], "video": [0]}
    with pytest.raises(UsageError, match="none of slots .base, base. is named after a modality"):
        load("mini", ["model.moe.slots=[base, base]", "model.moe.multimodal_loss_coef=0.1"])
    assert RoutingRecorder().loss(MoEConfig(kl_loss_coef=1.0)) == 0.0
