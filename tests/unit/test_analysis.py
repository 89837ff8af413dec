"""Figures of soft tokens and routing by hand, an expert switched off, and the analysis of a tiny run."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_run, save_start
from unimoe_ray.analysis.measures import (
    common_paths,
    mutual_information,
    nearest_words,
    principal_plane,
    specialisation,
    token_statistics,
)
from unimoe_ray.analysis.switch import without_expert
from unimoe_ray.analysis.unseen import Combined, as_prompt, combine
from unimoe_ray.cli import main
from unimoe_ray.config import dump
from unimoe_ray.data import prepare
from unimoe_ray.data.batch import collate
from unimoe_ray.data.loader import read_features
from unimoe_ray.data.samples import PreparedSample, SampleTable
from unimoe_ray.data.template import CompactTemplate
from unimoe_ray.data.tokenizer import train_tokenizer
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import to_batch
from unimoe_ray.training.recipe import run_seed
from unimoe_ray.training.stages import start_model


def test_statistics_of_tokens_by_hand():
    opposite = token_statistics(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))
    assert opposite == pytest.approx({"norm": 5, "norm_sd": 0, "spread": 1, "alike": -1})
    same = token_statistics(torch.tensor([[1.0, 0.0]] * 3))
    assert same == pytest.approx({"norm": 1, "norm_sd": 0, "spread": 0, "alike": 1})
    crossed = token_statistics(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    assert crossed["norm"] == 2 and crossed["norm_sd"] == 1 and crossed["alike"] == pytest.approx(0)
    assert crossed["spread"] == pytest.approx(math.sqrt(2.5) / math.sqrt(5))  # mean (.5, 1.5)
    assert math.isnan(token_statistics(torch.ones(1, 2))["alike"])


def test_nearest_words_go_by_direction():
    vocabulary = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    tokens = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.1, 5.0]])
    cosine, words = nearest_words(tokens, vocabulary, ["right", "up"], 5)
    assert words == [("up", 0.75), ("right", 0.25)]
    assert cosine == pytest.approx((1 + 0.8 + 1 + 5 / math.hypot(0.1, 5)) / 4)


@pytest.mark.parametrize(
    ("counts", "bits", "score"),
    [
        ([[5, 0, 0, 0], [0, 9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]], 2.0, 1.0),
        ([[3, 3], [8, 8]], 0.0, 0.0),
        ([[1, 3], [10, 30]], 0.0, 0.0),
        ([[3, 1], [10, 30]], 1 - (0.25 * 2 + 0.75 * math.log2(4 / 3)), 1 - (0.25 * 2 + 0.75 * math.log2(4 / 3))),
        ([[7, 0], [0, 0], [0, 7]], 1.0, 1.0),  # a kind without tokens does not count
        ([[4, 0, 0], [0, 4, 4]], 1.0, 1.0),
        ([[4, 5]], 0.0, 0.0),
        ([[0, 0]], 0.0, 0.0),
    ],
)
def test_mutual_information_of_known_tables(counts, bits, score):
    assert mutual_information(torch.tensor(counts)) == pytest.approx(bits, abs=1e-9)
    assert specialisation(torch.tensor(counts)) == pytest.approx(score, abs=1e-9)


def test_the_plane_in_which_points_differ_most():
    line = torch.tensor([[-2.0, -2.0, 5.0], [0.0, 0.0, 5.0], [2.0, 2.0, 5.0]])
    plane, explained = principal_plane(line)
    assert plane[:, 0].tolist() == pytest.approx([-math.sqrt(8), 0, math.sqrt(8)])
    assert explained == pytest.approx([1, 0]) and torch.allclose(principal_plane(line.flip(0))[0].flip(0), plane)
    one, nothing = principal_plane(torch.ones(1, 3))
    assert one.tolist() == [[0, 0]] and nothing == [0, 0]
    random = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    plane, explained = principal_plane(random)
    variance = torch.linalg.eigvalsh(torch.cov(random.double().T)).flip(0)
    assert plane.var(dim=0).tolist() == pytest.approx(variance[:2].tolist())
    assert explained == pytest.approx((variance[:2] / variance.sum()).tolist())


def test_common_paths_by_hand():
    first = torch.tensor([[0, 1], [0, 1], [2, 1], [0, 0]])
    found = common_paths(first, ["text", "image", "image", "image"], 1)
    assert found == [{"path": [0, 1], "shares": {"text": 1.0, "image": pytest.approx(1 / 3)}}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose stage 3 changed nothing."""
    run = make_tiny_run(tmp_path_factory.mktemp("tiny"), evaluation={"tasks": []})
    torch.manual_seed(run_seed(run.config, "tune", "tune"))
    model = start_model(run.config, run.info, "tune")
    save_start(replace(run, info=replace(run.info, sparse=True)), model, "tune", "tune")
    table = SampleTable(Path(prepare.source(run.config, "test").samples))
    with open(prepare.data_dir(run.config) / "test.jsonl", "w") as file:
        for row in range(len(table)):
            about = {"id": str(row), "task": table.get(row).task, "question": "", "answer": "x", "media": []}
            file.write(json.dumps(about) + "\n")
    (run.config.run_dir / "config.yaml").write_text(dump(run.config))
    return run


@torch.no_grad()
def test_an_expert_that_is_switched_off_gets_no_tokens(run):
    source = prepare.source(run.config, "test")
    table = SampleTable(Path(source.samples))
    batch = to_batch(collate([table.get(0), table.get(40)], partial(read_features, source), with_labels=False))
    model = start_model(run.config, run.info, "tune").eval()
    layer = mixtures(model)[1]
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    whole = model.hidden_states(batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert layer.num_experts == 4 and all(stats.tokens_per_expert[2] > 0 for stats in model.recorder.layers)
    with without_expert(model, 2):
        less = model.hidden_states(batch)
        assert [stats.tokens_per_expert.shape for stats in model.recorder.layers] == [(3,), (3,)]
        y, stats = super(type(layer), layer).forward(inputs[0])
    hook.remove()
    assert not torch.equal(less, whole)
    logits = inputs[0] @ layer.gate.weight.T
    logits[..., 2] = -math.inf
    top, experts = logits.topk(2, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, experts, top.softmax(-1))
    wanted = sum(weights[..., e : e + 1] * layer.experts[e](inputs[0]) for e in range(4))
    assert torch.allclose(y, wanted, atol=1e-6) and not (experts == 2).any()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.hidden_states(batch), whole)
    with pytest.raises(ValueError, match="expert 4 of 4"), without_expert(model, 4):
        pass


def test_the_analysis_of_a_run_and_its_report(run, capsys):
    folder = run.config.run_dir
    main_returns(["analyse", str(folder), "--samples", "3"], 0)
    shown = capsys.readouterr()
    assert str(folder / "analysis.json") in shown.out and "without expert 4 of 4" in shown.err
    found = json.loads((folder / "analysis.json").read_text())
    assert set(found["soft_tokens"]) == {"text", "image", "video", "audio", "speech"}
    # The routers before stage 3 are random: those that training began with.
    routing = found["routing"]
    assert routing["before"] == routing["after"] and len(routing["after"]["score"]) == 2
    slots = {kind: [sum(layer) for layer in layers] for kind, layers in routing["after"]["routed"].items()}
    assert slots["speech"] == [2 * found["soft_tokens"]["speech"]["tokens"]] * 2
    assert found["off"]["questions"]["see"] == 3 and len(found["off"]["without"]) == 4
    assert found["unseen"] is None  # not of the mini suite
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    for text in ("Soft tokens beside text", "Specialisation before", "Without one expert", "Paths of tokens"):
        assert f"<h3>{text}" in page
    assert "training did not have" not in page and "damaged" not in page
    assert f">{routing['after']['score'][1]:.3f}<" in page
    (folder / "analysis.json").write_text(json.dumps(found | {"off": {"all": {"see": 1}}}))
    main_returns(["report", str(folder)], 0)
    assert "analysis.json is damaged here" in (folder / "report" / "index.html").read_text(encoding="utf-8")
    main_returns(["analyse", str(folder), "--samples", "0"], 2)


def main_returns(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == code


def test_new_combinations_are_made_of_held_out_files():
    spoken = "media/speech/test_what_{}_voice_0.wav"
    asked = {
        3: ("spoken_question", "circle", {"image": "a.png", "speech": spoken.format("shape_is_in_the_image")}),
        4: ("spoken_question", "light blue", {"image": "b.png", "speech": spoken.format("color_is_the_shape")}),
        5: ("spoken_word", "turn left", {"speech": "c.wav"}),
        6: ("sound_event", "piano", {"audio": "d.wav"}),
        7: ("video_object", "light blue square", {"video": "e.mp4"}),
        8: ("text", "yes", {}),
    }
    records = {
        row: {"task": task, "answer": answer, "media": [{"kind": k, "path": p} for k, p in media.items()]}
        for row, (task, answer, media) in asked.items()
    }
    pairs = combine(records, 4)
    assert len(pairs) == 4 * 5 and combine(records, 4) == pairs
    items = {item for item, _ in pairs}
    shape, colour = "what shape is in the image", "what color is the shape"
    assert (
        Combined("image_and_sound", f"{shape} and what do you hear", "circle piano", ((3, "image"), (6, "audio")))
        in items
    )
    assert Combined("image_beside_sound", colour, "light blue", ((4, "image"), (6, "audio"))) in items
    on_video = {item for item in items if item.task == "spoken_question_on_video"}
    assert on_video == {
        Combined("spoken_question_on_video", "answer the question", "square", ((7, "video"), (3, "speech"))),
        Combined("spoken_question_on_video", "answer the question", "light blue", ((7, "video"), (4, "speech"))),
    }
    alone = {known for item, known in pairs if item.task == "speech_beside_sound"}
    assert alone == {Combined("spoken_word", "what was said", "turn left", ((5, "speech"),))}
    left = combine(records, 4, {"image+speech", "audio+image"})
    assert {item.task for item, _ in left} == {"speech_beside_sound", "spoken_question_on_video"}
    del records[7]
    assert combine(records, 4) == []

    template = CompactTemplate(train_tokenizer([f"{shape} and what do you hear"] * 3, 300))
    samples = {
        3: PreparedSample(
            "3", "spoken_question", "image+speech", [1, -200, -500], [], ["image/aa", "speech/bb"], [4, 7]
        ),
        6: PreparedSample("6", "sound_event", "audio", [1, -300], [], ["audio/cc"], [3]),
    }
    item = next(item for item, _ in pairs if item.task == "image_and_sound" and item.expected == "circle piano")
    prompt = as_prompt(item, samples, template)
    assert (prompt.media, prompt.soft_tokens, prompt.group) == (["image/aa", "audio/cc"], [4, 3], "audio+image")
    assert prompt.ids[1:3] == [-200, -300] and prompt.length == len(prompt.ids) + 5
    assert template.tokenizer.decode([i for i in prompt.ids if i >= 0]).strip() == f"{shape} and what do you hear"
