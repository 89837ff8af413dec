"""LLaMA's ``tokenizer.model``, a SentencePiece BPE file, without the SentencePiece library: the few fields needed are
read from its protocol buffer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from unimoe_ray.errors import UnimoeError

_PIECES, _PIECE, _SCORE, _TYPE = 1, 1, 2, 3  # field numbers of ModelProto and SentencePiece
_UNKNOWN, _CONTROL = 2, 3  # types of pieces
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def load_sentencepiece(path: str | Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model``. Each text is encoded as if it began with a space, as LLaMA was trained;
    unknown characters become their bytes. Special tokens written in a text are plain characters, never control.

    Raises UnimoeError when the file is no such model.
    """
    try:
        pieces = list(_read_pieces(Path(path).read_bytes()))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise UnimoeError(f"{path}: not a SentencePiece model ({error})") from None
    unknown = [piece.text for piece in pieces if piece.kind == _UNKNOWN]
    if len(unknown) != 1:
        raise UnimoeError(f"{path}: not a SentencePiece model (it has {len(unknown)} unknown pieces, not 1)")
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces}
    bpe = models.BPE(vocab, _merges(vocab, scores), unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    controls = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """A piece is merged from any two that make it. The higher its score, the sooner: ids don't tell, as runs of spaces
    have low ids and the lowest scores."""
    merges = []
    for piece in sorted(vocab, key=lambda piece: -scores[piece]):
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in parts if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def _read_pieces(data: bytes) -> Iterator[_Piece]:
    """In the order of their ids."""
    for number, value in _fields(data):
        if number == _PIECES and isinstance(value, bytes):
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
            yield _Piece(fields[_PIECE].decode(), score, fields.get(_TYPE, 1))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message; groups do not occur."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
            value, at = data[at : at + size], at + size
        elif kind == _BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(data):
            raise ValueError("cut off")
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends."""
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1
