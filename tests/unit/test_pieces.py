"""The stream of a SentencePiece tokenizer: what ``decode`` makes of all tokens, whatever they are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_vicuna import PIECES, model_file
from unimoe_ray.data.prompt import decode
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.inference.text import TextStream, token_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model_file(PIECES))
    return load_sentencepiece(path)


def pieces(tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.integers(3, 258), st.integers(259, len(PIECES) - 1), st.sampled_from([0, 1])), max_size=20)
)
def test_all_pieces_are_the_text_in_one_piece(tokenizer, tokens):
    assert "".join(pieces(tokenizer, tokens)) == decode(tokens, tokenizer)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20))
def test_no_character_is_split(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    parts = pieces(tokenizer, tokens)
    assert "".join(parts) == text.strip()
    assert b"".join(token_bytes(tokenizer, token) for token in tokens).decode() == (f" {text}" if text else "")


def test_text_does_not_wait(tokenizer):
    tokens = tokenizer.encode("ab cd", add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, tokens)[:-1]) == "ab cd"
    assert token_bytes(tokenizer, 2) == b"</s>"
