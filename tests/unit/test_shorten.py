"""Conversations that are too long: what is cut, in which order, and what never is."""

import asyncio
import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.calls import Started, Task
from serve.language import LanguageModel
from tests.tiny import make_servable_run, tiny_config
from tests.unit.test_prepare import record, write_splits
from tests.unit.test_pretrained_language import prepare
from tests.unit.test_vicuna import PIECES, model_file
from unimoe_ray.chat import Conversation
from unimoe_ray.config import load_run
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.chatml import ChatMLTemplate
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.data.shorten import shorten
from unimoe_ray.data.template import CompactTemplate, Template
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from unimoe_ray.data.vicuna import VicunaTemplate
from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.inference.request import RequestRefused, SamplingParams


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, Template]:
    root = tmp_path_factory.mktemp("templates")
    small = train_tokenizer(["what is this? a red circle"] * 3, 300)
    small.save(str(root / "compact.json"))
    small.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    small.save(str(root / "chatml.json"))
    (root / "tokenizer.model").write_bytes(model_file(PIECES))
    return {
        "compact": CompactTemplate(load_tokenizer(root / "compact.json")),
        "vicuna": VicunaTemplate(load_sentencepiece(root / "tokenizer.model"), legacy=False),
        "chatml": ChatMLTemplate(load_tokenizer(root / "chatml.json"), "be good"),
    }


def sample_of(turns: list[tuple[str, str]]) -> Sample:
    kinds = [kind for question, _ in turns for kind in PLACEHOLDER.findall(question)]
    return Sample("0", "t", tuple(turns), tuple(Media(kind, (str(i),)) for i, kind in enumerate(kinds)), {})


WORDS = st.sampled_from(
    ["a", "b ", " red", "circle\n", "<image>", " <speech> ", "é", "supercalifragilistic", " ", "12"]
)
QUESTION = st.lists(WORDS, max_size=8).map("".join)
ANSWER = st.lists(st.sampled_from(["a", " red", "circle", "b"]), min_size=1, max_size=5).map("".join)
TURNS = st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    turns=TURNS,
    soft=st.integers(1, 9),
    limit=st.integers(1, 120),
    name=st.sampled_from(["compact", "vicuna", "chatml"]),
)
def test_answers_that_are_learned_survive(templates, turns, soft, limit, name):
    template, sample = templates[name], sample_of(turns)

    def length(part: Sample) -> int:
        return len(template.encode_sample(part).ids) + (soft - 1) * len(part.media)

    def learned(part: Sample) -> list[int]:
        return [label for label in template.encode_sample(part).labels if label >= 0]

    found = shorten(sample, lambda part: length(part) <= limit, keep_turns=True)
    bare = sample_of([("".join(f"<{kind}>" for kind in PLACEHOLDER.findall(q)), a) for q, a in turns])
    if found is None:
        assert length(bare) > limit
        return
    assert length(found.sample) <= limit
    assert found.sample.media == sample.media and found.media == found.turns == 0
    assert learned(found.sample) == learned(sample)
    assert [answer for _, answer in found.sample.turns] == [answer for _, answer in turns]
    if length(sample) <= limit:
        assert found.sample == sample and found.characters == 0
    assert shorten(sample, lambda part: length(part) <= limit, keep_turns=True) == found


@settings(max_examples=300, deadline=None)
@given(
    turns=TURNS,
    soft=st.integers(1, 9),
    limit=st.integers(1, 120),
    name=st.sampled_from(["compact", "vicuna", "chatml"]),
)
def test_prompts_lose_whole_turns_first(templates, turns, soft, limit, name):
    template, sample = templates[name], sample_of(turns)

    def length(part: Sample) -> int:
        return len(template.encode_prompt(part)) + (soft - 1) * len(part.media)

    found = shorten(sample, lambda part: length(part) <= limit, keep_turns=False)
    last = sample_of(turns[-1:])
    if found is None:
        assert length(last) > limit
        return
    assert length(found.sample) <= limit
    # A slow search for the same thing: as many of the last turns as fit.
    whole = [count for count in range(len(turns)) if length(sample_of(turns[count:])) <= limit]
    assert found.turns == (whole[0] if whole else len(turns) - 1)
    assert found.characters == 0 or not whole
    rest = sample_of(turns[found.turns :])
    assert [item.kind for item in found.sample.media] == [item.kind for item in rest.media]
    assert found.sample.media == sample.media[len(sample.media) - len(rest.media) :]
    assert [PLACEHOLDER.findall(q) for q, _ in found.sample.turns] == [PLACEHOLDER.findall(q) for q, _ in rest.turns]


def test_words_go_oldest_first():
    sample = sample_of([("one two <image> three", "x"), ("<audio>\nfour five", "y")])

    def after(most: int) -> list[str]:
        def characters(part: Sample) -> int:
            return sum(len("".join(PLACEHOLDER.sub("", question).split())) for question, _ in part.turns)

        found = shorten(sample, lambda part: characters(part) <= most, keep_turns=True)
        return [question for question, _ in found.sample.turns]

    assert after(19) == ["one two <image> three", "<audio>\nfour five"]
    assert after(17) == ["two <image> three", "<audio>\nfour five"]
    assert after(9) == ["<image>", "<audio>\nfour five"]
    assert after(5) == ["<image>", "<audio> five"]
    assert after(0) == ["<image>", "<audio>"]


def test_prepare_shortens_and_says_what(tmp_path):
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    long = {"id": "long", "task": "read", "conversations": turns("b " * 200 + "end?", "a", "b?", "b a")}
    hopeless = {"id": "hopeless", "task": "read", "conversations": turns("a", "b " * 200)}
    records = {"train": [record("0"), long, hopeless], "dev": [record("0")], "test": [record("0"), long]}
    prepared, rows = {}, {}
    for policy in ("refuse", "shorten"):
        root = tmp_path / policy
        root.mkdir()
        config = tiny_config(root, data={"too_long": policy, "max_bad_fraction": 1.0})
        write_splits(root / "source", **records)
        config.run_dir.mkdir(parents=True)
        prepared[policy] = prepare(config, root)
        for split in ("train", "test"):
            table = SampleTable(Path(preparing.source(config, split).samples))
            rows[policy, split] = {row.id: row for row in map(table.get, range(len(table)))}
    assert (prepared["refuse"].quarantined, prepared["refuse"].shortened) == (3, 0)
    assert (prepared["shorten"].quarantined, prepared["shorten"].shortened) == (1, 2)
    assert "long" not in rows["refuse", "train"]
    tokenizer = load_tokenizer(preparing.tokenizer_path(config))
    row = rows["shorten", "train"]["long"]
    assert row.length <= 64
    assert tokenizer.decode([label for label in row.labels if label >= 0]) == " a b a"
    assert tokenizer.decode(row.ids).strip().startswith("b b b")
    assert tokenizer.decode(rows["shorten", "test"]["long"].ids).strip() == "b?"
    lines = [json.loads(line) for line in (config.run_dir / preparing.SHORTENED).read_text().splitlines()]
    assert [(line["split"], line["id"]) for line in lines] == [("train", "long"), ("test", "long")]
    assert "characters of questions left out" in lines[0]["what"] and "the first 1 turns left out" in lines[1]["what"]


@lru_cache(maxsize=2)
def servable(root: Path, policy: str):
    return make_servable_run(root / policy, data={"too_long": policy}).config


def test_chat_and_the_endpoint_say_what_they_left_out(tmp_path):
    config = servable(tmp_path, "shorten")
    folder = final_model(config)
    talk = Conversation(load_run(config.run_dir), folder)
    for number in range(12):
        talk.ask(f"what is this? {number}", [])
    assert "the first" in talk.note and "turns left out: longer than the model can take" in talk.note
    assert Conversation(load_run(config.run_dir), folder).ask("a red circle " * 60, []) is not None
    assert len(talk._turns) == 12

    async def started(policy: str) -> Started:
        found = servable(tmp_path, policy)
        language = LanguageModel(found.model_dump(mode="json"), str(final_model(found)))
        task = Task(
            "0", (*[("what is this?", "a red circle")] * 9, ("what?", "")), (), SamplingParams(max_new_tokens=4)
        )
        try:
            return [told async for told in language.generate(task)][0][0]
        finally:
            language._running().close()

    first = asyncio.run(started("shorten"))
    assert "the first" in first.note and first.prompt_tokens <= 60
    with pytest.raises(RequestRefused, match="the model takes at most"):
        asyncio.run(started("refuse"))
    with pytest.raises(UsageError, match="start a new one"):
        Conversation(load_run(servable(tmp_path, "refuse").run_dir), final_model(servable(tmp_path, "refuse"))).ask(
            "a red circle " * 60, []
        )
