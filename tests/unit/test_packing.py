"""Rows that samples share: the layout, what is collated, and a model that sees no other sample."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_tiny_run
from unimoe_ray.config.model import MoEConfig
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate, from_bytes, samples_in, to_bytes
from unimoe_ray.data.layout import pack, padded_tokens
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.errors import UnimoeError
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import Batch, UniMoE, to_batch
from unimoe_ray.training.stages import make_trainable, start_model


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(16, 120))
def test_rows(lengths, row_tokens):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums, default=0) <= max(row_tokens, *lengths.tolist(), 0)
    assert padded_tokens(lengths, row_tokens) == len(rows) * max(sums, default=0)
    # Longest first leaves rows even to a sample.
    if rows:
        assert max(sums) - min(sums) <= lengths.max()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def source(run):
    return prepare.source(run.config, "train")


@pytest.fixture(scope="module", params=["watch", "ask", "read"])
def samples(source, request):
    """Of one modality group, as a micro-batch has them."""
    table = SampleTable(Path(source.samples))
    return [table.get(row) for row in table.by_task()[request.param][:7]]


@pytest.fixture(scope="module", params=["dense", "sparse", "dense LoRA", "sparse LoRA"])
def model(run, request) -> UniMoE:
    stage = "tune" if request.param.startswith("sparse") else "experts"
    model = start_model(run.config, run.info, stage)
    for number, layer in enumerate(mixtures(model)):
        torch.manual_seed(number)
        torch.nn.init.normal_(layer.gate.weight)
    with torch.no_grad():  # random weights of this size would only echo the last token
        for name, parameter in model.language.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(8)
    if request.param.endswith("LoRA"):
        make_trainable(model, getattr(run.config.stages, stage)["tune" if stage == "tune" else "image"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.3)
    return model.eval()


def batch_of(samples, source, row_tokens=0) -> Batch:
    arrays = collate(samples, lambda name: read_features(source, name), row_tokens=row_tokens)
    assert samples_in(arrays) == len(samples)
    return to_batch(from_bytes(to_bytes(arrays)))


def by_sample(batch: Batch, values: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """[B, S, ...] values of each sample's tokens, by its ids."""
    found = {}
    owners, ids, flat = batch.owners(), batch.input_ids[batch.mask], values[batch.mask]
    for owner in range(batch.samples):
        found[tuple(ids[owners == owner].tolist())] = flat[owners == owner]
    return found


@pytest.mark.parametrize("row_tokens", [40, 1000])
def test_packed_samples_are_those_alone(model, samples, source, row_tokens):
    packed = batch_of(samples, source, row_tokens)
    assert packed.packing is not None and packed.samples == len(samples)
    assert len(packed.input_ids) < len(samples) or row_tokens == 40
    assert packed.longest == max(sample.length for sample in samples)
    head = model.language.get_output_embeddings()
    found = by_sample(packed, head(model.hidden_states(packed)))
    found_routing = [stats.sums for stats in model.recorder.layers]

    alone, routing = [batch_of([sample], source) for sample in samples], []
    for batch in alone:
        (ids, wanted), *none = by_sample(batch, head(model.hidden_states(batch))).items()
        routing.append([stats.sums for stats in model.recorder.layers])
        assert not none
        torch.testing.assert_close(found[ids], wanted, atol=1e-5, rtol=1e-5)
    for layer, sums in enumerate(found_routing):
        wanted = sum((of_sample[layer] for of_sample in routing[1:]), routing[0][layer])
        for one, other in zip(sums.tensors(), wanted.tensors(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)

    # In fp32 the rounding of 1e-7 that the order of a sum leaves grows to 1e-5 on its way back through such weights.
    loss, grads = gradients(model.double(), [in_double(packed)])
    wanted_loss, wanted = gradients(model, [in_double(batch) for batch in alone])
    model.float()
    assert loss == pytest.approx(wanted_loss, rel=1e-6)  # summed in fp32
    assert grads.keys() == wanted.keys() and any(grad.any() for grad in grads.values())
    for name, grad in grads.items():
        assert torch.allclose(grad, wanted[name], atol=1e-12 * max(1.0, wanted[name].abs().max().item())), name


def in_double(batch: Batch) -> Batch:
    features = {modality: replace(f, values=f.values.double()) for modality, f in batch.features.items()}
    return replace(batch, features=features)


def gradients(model: UniMoE, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total, answers = 0.0, 0
    for batch in batches:
        loss = model(batch)
        loss.token_loss.backward()
        total += loss.token_loss.item()
        answers += int(loss.answer_tokens)
    assert answers == sum(int((batch.labels >= 0).sum()) for batch in batches)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_nothing_of_one_sample_reaches_another(model, samples, source):
    """Other words in the first sample of a row change that sample's hidden states only."""
    packed = batch_of(samples, source, 1000)
    first = packed.mask & (packed.packing.positions.eq(0).cumsum(1) == 1)
    with torch.no_grad():
        before = model.hidden_states(packed)
        packed.input_ids[first & (packed.input_ids > 3)] += 1
        after = model.hidden_states(packed)
    assert not torch.allclose(before[first], after[first], atol=1e-2)
    torch.testing.assert_close(before[~first], after[~first], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", ["multimodal_loss_coef", "kl_loss_coef", "balance_coef"])
def test_losses_of_the_router_are_of_samples_not_of_rows(run, source, loss):
    slots = ["base", "image", "speech", "audio"]
    run_model = start_model(run.config, run.info, "tune").eval()
    run_model.config.moe = MoEConfig(slots=slots, top_k=2, **{loss: 1.0})
    table = SampleTable(Path(source.samples))
    samples = [table.get(row) for row in table.by_task()["ask"][:5]]
    with torch.no_grad():
        wanted = run_model(batch_of(samples, source)).router_loss
        found = run_model(batch_of(samples, source, 1000)).router_loss
    assert float(wanted) != 0 and float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_a_row_may_be_longer_than_a_sample_may_be(model, samples, source):
    packed = batch_of(samples * 3, source, 10_000)
    assert packed.input_ids.shape[1] > model.max_positions
    model(packed)
    packed.packing.longest = model.max_positions + 1
    with pytest.raises(UnimoeError, match=f"{model.max_positions + 1} tokens"):
        model(packed)


def test_rows_of_one_sample_need_no_positions(samples, source):
    assert batch_of(samples[:1], source, 1000).packing is None
    assert batch_of([], source, 1000).packing is None
