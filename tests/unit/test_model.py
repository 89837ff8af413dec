"""Connectors, splice and the whole model, each against a slow computation of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.tiny import TASKS, make_tiny_run
from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS, ConnectorConfig, MoEConfig, VideoConfig
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import PreparedSample, SampleTable
from unimoe_ray.evaluation.answer import answer, expert_load
from unimoe_ray.model.connectors import VideoConnector, build_connector, merge_patches
from unimoe_ray.model.features import Features
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.splice import splice
from unimoe_ray.model.unimoe import Batch, UniMoE, to_batch
from unimoe_ray.training.checkpoint import checkpoint_dir, load_model
from unimoe_ray.training.stages import start_model


def features(*lengths: int, dim: int = 6, seed: int = 0) -> Features:
    """One window a file."""
    torch.manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths), dim)
    for row, length in enumerate(lengths):
        values[row, length:] = 0
    return Features(values, torch.tensor(lengths), torch.arange(len(lengths)))


# Connectors


def test_mlp_connector():
    torch.manual_seed(0)
    connector = build_connector("image", 6, 8, ConnectorConfig(match_text_rms=False), VideoConfig())
    x = features(3, 2)
    out = connector(x)
    y = (x.values - x.values.mean(-1, keepdim=True)) / (x.values.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = F.linear(y, connector.input.weight, connector.input.bias)
    y = F.linear(0.5 * y * (1 + torch.erf(y / 2**0.5)), connector.projection.weight, connector.projection.bias)
    assert torch.allclose(out.values, y, atol=1e-6)
    assert out.lengths.tolist() == [3, 2] and out.owner.tolist() == [0, 1]


@pytest.mark.parametrize("modality", PLACEHOLDER_IDS)
def test_soft_tokens_have_the_scale_of_the_text(modality):
    torch.manual_seed(0)
    connector = build_connector(modality, 6, 8, ConnectorConfig(), VideoConfig(frames=2))
    connector.scale.fill_(0.02)
    soft = connector(features(4, 4, 4, 4)).values
    assert torch.allclose(soft.pow(2).mean(-1).sqrt(), torch.tensor(0.02), rtol=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_merge_patches(spatial, temporal, steps, blocks, batch):
    frames, side, dim = steps * temporal, blocks * spatial, 2
    values = torch.arange(batch * frames * side * side * dim, dtype=torch.float32).view(batch, frames, side * side, dim)
    merged = merge_patches(values, spatial, temporal)
    for b in range(batch):
        expected = []
        for step in range(steps):  # time first, then rows, then columns
            for row in range(blocks):
                for column in range(blocks):
                    block = [
                        values[b, step * temporal + t, (row * spatial + y) * side + column * spatial + x]
                        for t in range(temporal)
                        for y in range(spatial)
                        for x in range(spatial)
                    ]
                    expected.append(torch.cat(block))
        assert torch.equal(merged[b], torch.stack(expected))


@pytest.mark.parametrize(("patches", "spatial"), [(6, 2), (9, 2), (3, 1)])
def test_frames_must_be_square_and_divisible(patches, spatial):
    with pytest.raises(ValueError, match=f"a frame has {patches} patches; a square grid whose side {spatial} divides"):
        merge_patches(torch.zeros(1, 2, patches, 3), spatial, 2)


@pytest.mark.parametrize("match_text_rms", [False, True])
def test_video_mean_is_the_mean_over_frames_after_the_projection(match_text_rms):
    torch.manual_seed(0)
    connector = VideoConnector(6, 8, match_text_rms, VideoConfig(frames=3, pooling="mean"))
    frames = features(*[4] * 6)
    frames.owner = torch.tensor([0, 0, 0, 1, 1, 1])
    out = connector(frames)
    each = connector.project(frames.values)
    assert torch.allclose(out.values[0], (each[0] + each[1] + each[2]) / 3, atol=1e-6)
    assert torch.allclose(out.values[1], (each[3] + each[4] + each[5]) / 3, atol=1e-6)
    assert out.lengths.tolist() == [4, 4] and out.owner.tolist() == [0, 1]


def test_video_frames_keep_the_order_of_time():
    torch.manual_seed(0)
    connector = VideoConnector(6, 8, True, VideoConfig(frames=4, temporal_merge=2))
    frames = features(*[4] * 4)
    forward = connector(frames).values[0]
    swapped = connector(Features(frames.values[[2, 3, 0, 1]], frames.lengths, frames.owner)).values[0]
    assert torch.allclose(swapped, forward.flip(0), atol=1e-6)
    backward = connector(Features(frames.values.flip(0), frames.lengths, frames.owner)).values[0]
    assert not torch.allclose(backward, forward.flip(0), atol=1e-2)


@pytest.mark.parametrize(
    ("modality", "video", "windows"),
    [
        ("image", VideoConfig(), [5]),
        ("speech", VideoConfig(), [3, 3, 3]),
        ("video", VideoConfig(frames=4, spatial_merge=2, temporal_merge=2), [16] * 4),
        ("video", VideoConfig(frames=4, spatial_merge=1, temporal_merge=4), [16] * 4),
        ("video", VideoConfig(frames=3, pooling="mean"), [16] * 3),
    ],
)
def test_soft_tokens_are_counted_without_running(modality, video, windows):
    connector = build_connector(modality, 6, 8, ConnectorConfig(), video)
    out = connector(features(*windows))
    assert connector.soft_tokens(windows) == int(out.lengths.sum())


# Splice

ids_of_kind = st.sampled_from([7, 7, *PLACEHOLDER_IDS.values()])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.data())
def test_splice_against_one_place_at_a_time(batch, width, data):
    ids = torch.tensor(
        data.draw(st.lists(st.lists(ids_of_kind, min_size=width, max_size=width), min_size=batch, max_size=batch))
    )
    embeddings = torch.randn(batch, width, 3, requires_grad=True)
    soft = {}
    for number, (kind, placeholder) in enumerate(PLACEHOLDER_IDS.items()):
        left = int((ids == placeholder).sum())
        lengths = []
        while left:
            lengths.append(data.draw(st.integers(1, left)))
            left -= lengths[-1]
        if lengths:
            soft[kind] = features(*lengths, dim=3, seed=number)
            soft[kind].values[torch.arange(max(lengths)) >= soft[kind].lengths[:, None]] = 99.0  # never read
            soft[kind].values.requires_grad_()
    found = splice(embeddings, ids, soft)

    kinds = {number: kind for kind, number in PLACEHOLDER_IDS.items()}
    waiting = {k: [f.values[i, j] for i, n in enumerate(f.lengths.tolist()) for j in range(n)] for k, f in soft.items()}
    for row in range(batch):
        for place in range(width):
            token = int(ids[row, place])
            expected = waiting[kinds[token]].pop(0) if token < 0 else embeddings[row, place]
            assert torch.equal(found[row, place], expected)
    found.sum().backward()
    assert torch.equal(embeddings.grad[..., 0] == 1, ids >= 0)
    for kind in soft.values():
        assert torch.equal(kind.values.grad[..., 0] == 1, torch.arange(kind.values.shape[1]) < kind.lengths[:, None])


@pytest.mark.parametrize("lengths", [(1, 1), (2, 2)])
def test_splice_refuses_another_number_of_soft_tokens(lengths):
    with pytest.raises(ValueError, match=f"audio: 3 placeholders for {sum(lengths)} soft tokens"):
        splice(torch.zeros(1, 4, 3), torch.tensor([[5, -300, -300, -300]]), {"audio": features(*lengths, dim=3)})


# The whole model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def source(run):
    return prepare.source(run.config, "train")


@pytest.fixture(scope="module")
def samples(source) -> list[PreparedSample]:
    """Three of every task."""
    table = SampleTable(Path(source.samples))
    return [table.get(int(row)) for rows in table.by_task().values() for row in rows[:3]]


@pytest.fixture(scope="module", params=["dense", "sparse"])
def model(run, request) -> UniMoE:
    model = start_model(run.config, run.info, "tune" if request.param == "sparse" else "experts")
    for number, layer in enumerate(mixtures(model)):
        torch.manual_seed(number)
        torch.nn.init.normal_(layer.gate.weight)
    with torch.no_grad():  # random weights of this size would only echo the last token
        for name, parameter in model.language.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(8)
    return model.eval()


def batch_of(samples, source, **how) -> Batch:
    return to_batch(collate(samples, lambda name: read_features(source, name), **how))


def gradients(model: UniMoE, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch).token_loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_padded_batch_is_the_sum_of_its_samples(model, samples, source):
    together = batch_of(samples, source)
    assert not together.mask.all() and set(together.features) == set(PLACEHOLDER_IDS)
    alone = [batch_of([sample], source) for sample in samples]
    assert all(batch.mask.all() for batch in alone)
    loss, grads = gradients(model, [together])
    wanted_loss, wanted = gradients(model, alone)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert model(together).answer_tokens == sum(model(batch).answer_tokens for batch in alone)
    for name, grad in grads.items():
        assert torch.allclose(grad, wanted[name], atol=1e-5 * max(1.0, wanted[name].abs().max().item())), name
        assert wanted[name].any(), name


def test_loss_is_the_cross_entropy_of_the_answers(model, samples, source):
    sample = samples[0]
    batch = batch_of([sample], source)
    model.recorder.start(None)
    logits = model.language(inputs_embeds=model.embed(batch)).logits[0]
    wanted = 0.0
    for place, label in enumerate(batch.labels[0].tolist()):
        if label != IGNORE_INDEX:
            wanted -= logits[place - 1].log_softmax(-1)[label].item()
    loss = model(batch)
    assert loss.token_loss.item() == pytest.approx(wanted, rel=1e-5)
    assert int(loss.answer_tokens) == sum(label >= 0 for label in sample.labels)


def test_a_micro_batch_without_samples_has_zero_loss_and_all_gradients(model, source):
    loss, grads = gradients(model, [batch_of([], source)])
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_padding_is_not_routed(model, samples, source):
    batch = batch_of(samples, source)
    model(batch)
    tokens = int(batch.mask.sum())
    assert len(model.recorder.layers) == len(mixtures(model))
    assert all(int(stats.tokens_per_expert.sum()) == 2 * tokens for stats in model.recorder.layers)


@pytest.mark.parametrize("layers", ["all", "interval", "second_half"])
def test_upcycling_changes_nothing_at_first(run, samples, source, layers):
    dense = start_model(run.config, run.info, "experts")
    sparse = start_model(run.config, run.info, "experts")
    sparse.config.moe = MoEConfig(slots=["base"] * 3, top_k=2, layers=layers)
    sparse.make_sparse()
    assert [layer.mlp in mixtures(sparse) for layer in sparse.language.model.layers] == [
        index in sparse.config.moe.sparse_layers(2) for index in range(2)
    ]
    batch = batch_of(samples, source)
    assert sparse(batch).token_loss.item() == pytest.approx(dense(batch).token_loss.item(), rel=1e-5)


def test_text_rms(run):
    model = run.info.build()
    with torch.no_grad():
        model.language.get_input_embeddings().weight.copy_(torch.tensor([1.0, -1.0]).repeat(8)[None] * 3)
    model.match_text_rms()
    assert all(connector.scale.item() == pytest.approx(3) for connector in model.connectors.values())


# Generation


@torch.no_grad()
def slow_greedy(model: UniMoE, prompt: PreparedSample, source, new: int, end: int) -> list[int]:
    """One prompt, without a cache: the whole sequence again for every token."""
    batch = batch_of([prompt], source, with_labels=False)
    sequence, answer = model.embed(batch), []
    model.recorder.start(None)
    while len(answer) < new and end not in answer:
        answer.append(int(model.language(inputs_embeds=sequence, use_cache=False).logits[0, -1].argmax()))
        token = model.language.get_input_embeddings()(torch.tensor([[answer[-1]]]))
        sequence = torch.cat([sequence, token], dim=1)
    return answer


def prompts_of(samples: list[PreparedSample]) -> list[PreparedSample]:
    """Up to where the answer begins."""
    cut = [s.labels.index(next(label for label in s.labels if label >= 0)) for s in samples]
    return [
        PreparedSample(s.id, s.task, s.group, s.ids[:n], [], s.media, s.soft_tokens)
        for s, n in zip(samples, cut, strict=True)
    ]


def test_generation_equals_greedy_without_cache(model, samples, source):
    prompts = prompts_of(samples)
    never = [slow_greedy(model, prompt, source, 8, -1) for prompt in prompts]
    assert len({tuple(row) for row in never}) > 3
    # A token that some answers have and some don't, as the end: rows end at different places.
    end = max({t for row in never for t in row}, key=lambda t: -abs(sum(t in row for row in never) - len(never) / 2))
    wanted = [row[: row.index(end) + 1] if end in row else row for row in never]
    batch = batch_of(prompts, source, pad_left=True, with_labels=False)
    assert not batch.mask[:, 0].all() and batch.mask[:, -1].all()
    found = model.generate(batch, 8, end).tolist()
    assert len({len(row) for row in wanted}) > 1
    for row, expected in zip(found, wanted, strict=True):
        assert row[: len(expected)] == expected
        assert not any(row[len(expected) :])


def test_answers_come_in_the_order_of_their_prompts(run, model, samples, source):
    folder = checkpoint_dir(run.config.run_dir, "align", "align")
    _, _, tokenizer = load_model(folder)
    prompts = prompts_of(samples)[::-1]

    def ask(items, batch_size):
        return answer(
            model, tokenizer, items, lambda n: read_features(source, n), batch_size=batch_size, max_new_tokens=5
        )

    alone = [ask([prompt], 1)[0] for prompt in prompts]
    assert ask(prompts, 4) == ask(prompts, 100) == alone
    assert len(set(alone)) > 3
    assert ask([], 4) == []


def test_expert_load_counts_every_token_once_per_choice(model, samples, source):
    load = expert_load(model, samples, lambda name: read_features(source, name), batch_size=4)
    if not mixtures(model):
        assert load == {}
        return
    batch = batch_of(samples, source)
    ids = batch.input_ids[batch.mask]
    for kind, counts in load.items():
        tokens = int((ids >= 0).sum()) if kind == "text" else int((ids == PLACEHOLDER_IDS[kind]).sum())
        assert counts.shape == (2, 4) and counts.sum(1).tolist() == [2 * tokens] * 2 and tokens > 0
    model(batch)
    total = [stats.tokens_per_expert.tolist() for stats in model.recorder.layers]
    assert sum(load.values()).tolist() == total


def test_batches_move_between_devices(samples, source):
    batch = batch_of(samples, source).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.mask, batch.labels)} == {"meta"}
    assert {f.values.device.type for f in batch.features.values()} == {"meta"}
    assert len(TASKS) * 3 == len(batch.input_ids)
    assert batch.features["image"].values.dtype == torch.float32
    assert batch_of(samples, source).features["image"].values.numpy().dtype == np.float32
