"""LLaMA's tokenizer file and the Vicuna template, on a tokenizer made here."""

import string
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.data.vicuna import SYSTEM, VicunaTemplate
from unimoe_ray.errors import UnimoeError


def field(number: int, kind: int, value: bytes) -> bytes:
    size = len(value)
    length = bytes([size & 127 | 128, size >> 7]) if size > 127 else bytes([size])
    return bytes([number << 3 | kind]) + (length if kind == 2 else b"") + value


def model_file(pieces: list[tuple[str, float, int]]) -> bytes:
    """The bytes of a SentencePiece model: pieces with score and type, and a field that nobody reads."""
    messages = [
        field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, bytes([kind]))
        for text, score, kind in pieces
    ]
    return b"".join(field(1, 2, message) for message in messages) + field(2, 2, b"trainer" * 30)


CONTROL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
WORDS = [("▁▁", -1e9, 1), ("ab", -1.0, 1), ("▁ab", -2.0, 1), ("▁U", -3.0, 1), ("▁US", -4.0, 1), ("US", -5.0, 1)]
CHARACTERS = [(c, -100.0 - i, 1) for i, c in enumerate("▁" + string.ascii_letters + ":.,'")]
PIECES = CONTROL + BYTES + WORDS + CHARACTERS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model_file(PIECES))
    return load_sentencepiece(path)


def pieces_of(tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_pieces_are_merged_by_score(tokenizer):
    assert tokenizer.get_vocab_size() == len(PIECES)
    assert pieces_of(tokenizer, "ab") == ["▁ab"]
    assert pieces_of(tokenizer, " ab") == ["▁", "▁ab"]  # the run of spaces has the lowest score
    assert pieces_of(tokenizer, "b  ") == ["▁", "b", "▁▁"]
    assert pieces_of(tokenizer, "é\n") == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert pieces_of(tokenizer, "") == []
    assert "</s>" not in pieces_of(tokenizer, "a</s>b")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    whole = model_file(PIECES)
    for data in (whole[:1000], b"\x0b", model_file(PIECES[1:]), b"", model_file([("<unk>", 0.0, 2)])[:-3]):
        path.write_bytes(data)
        with pytest.raises(UnimoeError, match="not a SentencePiece model"):
            load_sentencepiece(path)


def conversation(*turns: tuple[str, str]) -> Sample:
    media = [Media(kind, ("x",)) for question, _ in turns for kind in PLACEHOLDER.findall(question)]
    return Sample("0", "t", turns, tuple(media), {})


def test_template_and_labels(tokenizer):
    encoded = VicunaTemplate(tokenizer).encode_sample(conversation(("<image>\na", "ab"), ("and <speech>", "a b")))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    image, speech = PLACEHOLDER_IDS["image"], PLACEHOLDER_IDS["speech"]
    parts = [
        ([1, *ids(f"{SYSTEM} USER: "), image, *ids("\na ASSISTANT:")], False),
        ([*ids("ab"), 2], True),
        ([*ids("USER: and "), speech, *ids(" ASSISTANT:")], False),
        ([*ids("a b"), 2], True),
    ]
    assert encoded.ids == [token for part, _ in parts for token in part]
    assert encoded.labels == [token if answer else IGNORE_INDEX for part, answer in parts for token in part]


def test_only_legacy_puts_a_space_after_the_end_token(tokenizer):
    sample = conversation(("a", "b"), ("a", "b"))
    for legacy, first in ((True, "▁US"), (False, "US")):
        ids = VicunaTemplate(tokenizer, legacy).encode_sample(sample).ids
        assert tokenizer.id_to_token(ids[ids.index(2) + 1]) == first


texts = st.lists(st.sampled_from(["a", "ab ", " ", "\n", "</s>", "USER: ", "é"]), max_size=4).map("".join)
questions = st.lists(st.one_of(texts, st.sampled_from([f"<{kind}>" for kind in PLACEHOLDER_IDS])), max_size=4)
turns = st.lists(st.tuples(questions.map("".join), texts.map(lambda text: f"{text}b")), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(turns, st.booleans())
def test_a_prompt_is_what_training_saw_before_the_last_answer(tokenizer, turns, legacy):
    sample, template = conversation(*turns), VicunaTemplate(tokenizer, legacy)
    encoded, prompt = template.encode_sample(sample), template.encode_prompt(sample)
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt) :] == encoded.ids[len(prompt) :]
    assert prompt.count(2) == len(turns) - 1, "a user's </s> ends no turn"
    names = {number: kind for kind, number in PLACEHOLDER_IDS.items()}
    assert [names[token] for token in prompt if token < 0] == [media.kind for media in sample.media]
    assert tokenizer.decode(encoded.ids[len(prompt) : -1]).strip() == turns[-1][1].strip()
