"""Which experts each token went to, with which weights, as a Parquet file for analysis."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from unimoe_ray.config.model import PLACEHOLDER_IDS, TOKEN_KINDS
from unimoe_ray.data.batch import collate
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.answer import Lookup
from unimoe_ray.model.language import mixtures
from unimoe_ray.model.unimoe import UniMoE, to_batch, token_kinds

_PLACEHOLDERS = {number: f"<{kind}>" for kind, number in PLACEHOLDER_IDS.items()}


def schema(layers: list[int], slots: list[str], top_k: int) -> pa.Schema:
    """One row per token of a prompt, padding left out, L mixture layers and K experts of a token:

    sample    id of the prompt's sample; rows of one prompt are together, by position
    task      its task
    position  place in the spliced prompt, from 0; a media file takes as many as it has soft tokens
    kind      text, image, video, audio or speech
    token     its text; ``<kind>`` for a soft token
    token_id  its id; the placeholder's, below 0, for a soft token
    experts   [L][K] numbers of the chosen experts, best first
    weights   [L][K] their weights, which add up to 1

    The file's metadata has ``layers`` (the decoder layer of each mixture, from 0) and ``experts`` (what fills each
    slot), separated by commas.
    """
    size = len(layers)
    columns = {
        "sample": pa.string(),
        "task": pa.dictionary(pa.int32(), pa.string()),
        "position": pa.int32(),
        "kind": pa.dictionary(pa.int32(), pa.string()),
        "token": pa.string(),
        "token_id": pa.int32(),
        "experts": pa.list_(pa.list_(pa.int16(), top_k), size),
        "weights": pa.list_(pa.list_(pa.float32(), top_k), size),
    }
    metadata = {"layers": ",".join(map(str, layers)), "experts": ",".join(slots)}
    return pa.schema(list(columns.items()), metadata=metadata)


@torch.no_grad()
def write_token_routing(
    path: Path, model: UniMoE, tokenizer: Tokenizer, prompts: list[PreparedSample], features: Lookup, *, batch_size: int
) -> int:
    """Routing of every token of ``prompts``; returns how many tokens were written. The file is there only when it is
    complete. Raises UnimoeError for a dense model, or where the file cannot be written."""
    found = mixtures(model)
    if not found:
        raise UnimoeError(f"{path}: the model has no experts, so no token is routed; the model of stage tune has")
    decoder = model.language.get_decoder()
    numbers = [index for index, layer in enumerate(decoder.layers) if layer.mlp in found]
    columns = schema(numbers, model.config.moe.slots, found[0].top_k)

    @cache
    def text_of(token: int) -> str:
        return _PLACEHOLDERS.get(token) or tokenizer.decode([token], skip_special_tokens=False)

    temporary, written = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with pq.ParquetWriter(temporary, columns, compression="zstd") as writer:
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                table = _table(model, part, features, text_of, columns)
                writer.write_table(table)
                written += len(table)
        temporary.replace(path)
    except OSError as error:
        raise UnimoeError(f"{path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _table(model: UniMoE, prompts: list[PreparedSample], features: Lookup, text_of, columns: pa.Schema) -> pa.Table:
    batch = to_batch(collate(prompts, features, with_labels=False))
    model(batch)
    rows, positions = (index.tolist() for index in batch.mask.nonzero(as_tuple=True))
    ids = batch.input_ids[batch.mask]
    kinds = pa.DictionaryArray.from_arrays(pa.array(token_kinds(ids).numpy(), pa.int32()), list(TOKEN_KINDS))
    layers = [stats.routing for stats in model.recorder.layers]
    arrays = {
        "sample": pa.array([prompts[row].id for row in rows]),
        "task": pa.array([prompts[row].task for row in rows]).dictionary_encode(),
        "position": pa.array(positions, pa.int32()),
        "kind": kinds,
        "token": pa.array([text_of(token) for token in ids.tolist()]),
        "token_id": pa.array(ids.numpy(), pa.int32()),
        "experts": _nested(torch.stack([routing.experts for routing in layers], 1).numpy().astype(np.int16)),
        "weights": _nested(torch.stack([routing.weights for routing in layers], 1).float().numpy()),
    }
    return pa.Table.from_arrays([arrays[name] for name in columns.names], schema=columns)


def _nested(values: np.ndarray) -> pa.Array:
    """[T, L, K] as a column of [L][K] lists."""
    _, layers, top_k = values.shape
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), top_k)
    return pa.FixedSizeListArray.from_arrays(inner, layers)
