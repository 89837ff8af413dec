"""SentencePiece tokens to text as they come.

``tokenizers.DecodeStream`` is made for byte-level tokenizers: of bytes that are no character it raises, which would end
the engine.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether pieces write a space as ▁ and a byte as <0x0A>, as LLaMA's do, not each byte as one character."""
    return not isinstance(tokenizer.decoder, ByteLevel)


def piece_bytes(piece: str) -> bytes:
    """What a piece stands for."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class PieceStream:
    """The text of tokens; all together, what ``tokenizer.decode`` makes of them, special tokens skipped.

    Bytes wait for the next token that is none: all in a row are a text, or each is U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._bytes = b""
        self._begun = False

    def step(self, token: int) -> str:
        """Text that this token makes certain."""
        if token in self._special:
            return ""
        piece = self._tokenizer.id_to_token(token) or ""
        if _BYTE.fullmatch(piece):
            self._bytes += piece_bytes(piece)
            return ""
        text = self._waiting() + piece.replace("▁", " ")
        if text and not self._begun:
            self._begun, text = True, text.removeprefix(" ")
        return text

    def _waiting(self) -> str:
        run, self._bytes = self._bytes, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)
