"""A stream of tensors to safetensors shards with an index, as Hugging Face lays them out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

MAX_SHARD_BYTES = 4 * 10**9


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_bytes: int = MAX_SHARD_BYTES,
    stem: str = "model",
) -> None:
    """``<stem>-00001-of-00002.safetensors``, ... and ``<stem>.safetensors.index.json``; one shard is
    ``<stem>.safetensors`` without an index. Holds one shard in memory. A tensor larger than ``max_bytes`` has a shard
    of its own."""
    parts: list[Path] = []
    where: dict[str, int] = {}
    total = 0

    def flush(shard: dict[str, torch.Tensor]) -> None:
        part = folder / f".{stem}.{len(parts)}"
        save_file(shard, part, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, len(parts)))
        parts.append(part)

    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_bytes:
            flush(shard)
            shard, held = {}, 0
        # A clone: views of one larger tensor would be refused, or stored whole.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held += size
        total += size
    flush(shard)

    if len(parts) == 1:
        parts[0].replace(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for part, name in zip(parts, names, strict=True):
        part.replace(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[part] for name, part in where.items()}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
