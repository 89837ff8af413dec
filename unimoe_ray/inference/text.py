"""Tokens to text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from functools import lru_cache, partial

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.decoders import DecodeStream

from unimoe_ray.inference.pieces import PieceStream, is_sentencepiece, piece_bytes


class TextStream:
    """The text of one answer: all pieces together are what ``data.prompt.decode`` makes of all tokens.

    Held back until it is certain: incomplete characters, the beginning of a possible stop string, and white space that
    may turn out to be the end (outer spaces are no part of an answer).
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        if is_sentencepiece(tokenizer):
            self._step = PieceStream(tokenizer).step
        else:
            self._step = partial(DecodeStream(skip_special_tokens=True).step, tokenizer)
        self._tokens: list[int] = []
        self._decoded = 0
        self._pending = ""
        self._begun = False
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token makes certain. ``stopped`` is set when a stop string is complete; the text before it
        has then been given out."""
        self._tokens.append(token)
        piece = self._step(token) or ""
        self._decoded += len(piece)
        self._pending += piece
        if self._cut_at_stop():
            return self._take(len(self._pending.rstrip()))
        return self._take(len(self._pending) - self._held_back())

    def finish(self) -> str:
        """What was held back, when no token follows; bytes that are no character as U+FFFD."""
        self._pending += self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._decoded :]
        self._cut_at_stop()
        return self._take(len(self._pending.rstrip()))

    def _cut_at_stop(self) -> bool:
        places = [self._pending.find(stop) for stop in self._stop if stop in self._pending]
        if places:
            self._pending = self._pending[: min(places)]
            self.stopped = True
        return self.stopped

    def _held_back(self) -> int:
        """Length of the end of the pending text that may still become part of a stop string, or outer space."""
        text = self._pending
        if not self._stop:
            return len(text) - len(text.rstrip())
        longest = max(len(stop) - 1 for stop in self._stop)
        begins = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self._stop)
            ),
            0,
        )
        kept = text[: len(text) - begins]
        return begins + len(kept) - len(kept.rstrip())

    def _take(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


@lru_cache(maxsize=65536)
def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that one token stands for; a special token's are its name."""
    piece = tokenizer.id_to_token(token) or ""
    if is_sentencepiece(tokenizer):
        return piece_bytes(piece)
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return (tokenizer.decode([token], skip_special_tokens=False) or piece).encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes each byte (those of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
