"""Tokens to text in pieces: nothing is lost, no character is split, stop strings never show."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unimoe_ray.data.prompt import decode
from unimoe_ray.data.tokenizer import SPECIALS, train_tokenizer
from unimoe_ray.inference.text import TextStream, token_bytes

TOKENIZER = train_tokenizer(["a red circle", "über Größe 漢字 🙂 über", "red red circle"] * 3, 320)
ORDINARY = st.integers(len(SPECIALS), TOKENIZER.get_vocab_size() - 1)


def pieces(tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(TOKENIZER, stop)
    out = []
    for token in tokens:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(st.lists(ORDINARY, max_size=40))
def test_all_pieces_are_the_text_in_one_piece(tokens):
    assert "".join(pieces(tokens)) == decode(tokens, TOKENIZER)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_character_is_split(text):
    parts = pieces(encode(text))
    assert "".join(parts) == decode(encode(text), TOKENIZER)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)


def test_an_emoji_of_several_tokens_comes_whole():
    tokens = encode("🙃")  # not in the vocabulary: its bytes
    assert len(tokens) > 1
    assert [part for part in pieces(tokens) if part] == ["🙃"]


def test_an_unfinished_character_at_the_end_is_a_replacement_character():
    assert "".join(pieces(encode("a🙃")[:-1])) == "a\ufffd"


@example("aba", ["b", "aba"])
@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abc xy", max_size=30), st.lists(st.text(alphabet="abc x", min_size=1, max_size=4), max_size=3))
def test_the_answer_ends_before_the_first_stop_string_that_is_complete(text, stop):
    """Another may begin before it: that it does not end is not known yet."""
    tokens = encode(text)
    wanted = TOKENIZER.decode(tokens)
    for count in range(len(tokens) + 1):
        said = TOKENIZER.decode(tokens[:count])
        if places := [said.find(s) for s in stop if s in said]:
            wanted = said[: min(places)]
            break
    assert "".join(pieces(tokens, tuple(stop))) == wanted.strip()


def test_text_before_a_possible_stop_string_is_not_kept_waiting():
    stream = TextStream(TOKENIZER, ("red circle",))
    given_out = [stream.push(token) for token in encode("a red sofa")]
    assert "".join(given_out) == "a red sofa" and not stream.stopped


@pytest.mark.parametrize("text", ["a red circle", "漢字🙃"])
def test_bytes_of_tokens_are_the_text(text):
    assert b"".join(token_bytes(TOKENIZER, token) for token in encode(text)).decode().strip() == text


def test_bytes_of_a_special_token_are_its_name():
    assert token_bytes(TOKENIZER, 2) == b"</s>"
