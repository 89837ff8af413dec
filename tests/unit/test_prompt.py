"""Tokenizer and prompts: any text goes through, nothing a user writes is control, only answers are labelled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.prompt import decode, encode_prompt, encode_sample
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample, parse_record
from unimoe_ray.data.tokenizer import ASSISTANT, BOS, EOS, PAD, SPECIALS, load_tokenizer, train_tokenizer

TEXTS = ["what shape is it?", "a red circle", "</s> <s> <pad> <|assistant|>", "le garçon 你好"] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 400).save(str(path))
    return load_tokenizer(path)


def conversation(*turns: tuple[str, str]) -> Sample:
    kinds = [kind for question, _ in turns for kind in PLACEHOLDER.findall(question)]
    return Sample("0", "t", turns, tuple(Media(kind, ("x",)) for kind in kinds), {})


def text_ids(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_vocabulary(tokenizer):
    assert [tokenizer.token_to_id(t) for t in (PAD, BOS, EOS, ASSISTANT)] == [0, 1, 2, 3]
    assert 4 + 256 < tokenizer.get_vocab_size() <= 400
    assert train_tokenizer([], 1000).get_vocab_size() == 4 + 256
    assert train_tokenizer(TEXTS, 400).to_str() == train_tokenizer(list(TEXTS), 400).to_str()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    words = " ".join(text.split())
    ids = encode_sample(conversation(("", text)), tokenizer).ids
    start, end = ids.index(3) + 1, ids.index(2)
    assert end == len(ids) - 1
    assert decode(ids[start:], tokenizer) == words


specials = st.sampled_from([*SPECIALS, "<s", "</s", "s>", "<|", "assistant", "|>", " ", "a"])


@settings(max_examples=200, deadline=None)
@given(st.lists(specials, min_size=1, max_size=6).map("".join), st.lists(specials, max_size=6).map("".join))
def test_special_tokens_in_text_are_plain_characters(tokenizer, question, answer):
    encoded = encode_sample(conversation((question, answer), (question, answer)), tokenizer)
    controls = [token for token in encoded.ids if token < 4]
    assert controls == [1, 3, 2, 3, 2]
    assert decode(encoded.ids[encoded.ids.index(3) + 1 :], tokenizer) == " ".join(answer.split())


def test_template_and_labels(tokenizer):
    sample = conversation(("<image>\nwhat shape  is it?", "a circle"), ("<speech> and <image>", "red"))
    encoded = encode_sample(sample, tokenizer)
    what, circle, and_, red = (text_ids(t, tokenizer) for t in ("what shape is it?", "a circle", "and", "red"))
    image, speech = PLACEHOLDER_IDS["image"], PLACEHOLDER_IDS["speech"]
    parts = [([1, image, *what, 3], False), ([*circle, 2], True), ([speech, *and_, image, 3], False), ([*red, 2], True)]
    assert encoded.ids == [token for ids, _ in parts for token in ids]
    assert encoded.labels == [t if labelled else IGNORE_INDEX for ids, labelled in parts for t in ids]
    assert encode_prompt(sample, tokenizer) == encoded.ids[: -len(red) - 1]


parts = st.lists(
    st.sampled_from(["<image>", "<video>", "<audio>", "<speech>", "what", " ", "\n", "<image", ">", "</s>"]), max_size=6
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(parts.map("".join), st.sampled_from(["red", "a b", "</s>"])), min_size=1, max_size=3))
def test_a_prompt_is_what_training_saw_before_the_last_answer(tokenizer, turns):
    fields = {k: [] for k in PLACEHOLDER_IDS}
    for question, _ in turns:
        for kind in PLACEHOLDER.findall(question):
            fields[kind].append("file.x")
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    sample = parse_record({"conversations": messages, **fields}, 0)
    encoded, prompt = encode_sample(sample, tokenizer), encode_prompt(sample, tokenizer)
    assert encoded.ids[: len(prompt)] == prompt
    assert decode(encoded.ids[len(prompt) :], tokenizer) == turns[-1][1]
    assert all(label != IGNORE_INDEX for label in encoded.labels[len(prompt) :])
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    names = {number: kind for kind, number in PLACEHOLDER_IDS.items()}
    assert [names[token] for token in prompt if token < 0] == [media.kind for media in sample.media]


def test_decode_stops_at_the_end_token(tokenizer):
    ids = text_ids("a circle", tokenizer)
    assert decode([*ids, 2, *ids, 2], tokenizer) == "a circle"
    assert decode([*ids, 0, 0], tokenizer) == "a circle"
    assert decode([2], tokenizer) == decode([], tokenizer) == ""
    assert decode([200, 130], tokenizer)  # half of a character: shown, not raised
