"""Rows with one placeholder per file, the way cases store them, to the batch that the model takes."""

from __future__ import annotations

import torch

from tests.golden.case import Case, Tensors
from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.batch import expand
from unimoe_ray.model.features import Features
from unimoe_ray.model.splice import splice

IMAGE, VIDEO, AUDIO = -200, -400, -300


def pad(rows: list[list[int]], value: int, width: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def expand_rows(
    ids: list[list[int]], labels: list[list[int]], counts: list[list[int]], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, labels and mask [B, width], each placeholder repeated as often as its file has soft tokens.

    The official code pads ids before it splices, and so some rows further than the longest one needs: ``width`` is its.
    """
    rows = [expand(*row) for row in zip(ids, labels, counts, strict=True)]
    mask = pad([[1] * len(row) for row, _ in rows], 0, width).bool()
    return pad([row for row, _ in rows], 0, width), pad([row for _, row in rows], IGNORE_INDEX, width), mask


def unpadded(case: Case, name: str) -> list[list[int]]:
    """Rows of an input of the case without what its attention mask leaves out."""
    rows = zip(case.inputs[name], case.inputs["attention_mask"], strict=True)
    return [row[mask].tolist() for row, mask in rows]


def to_features(files: list[torch.Tensor]) -> Features:
    """Files [windows, M, H], all with windows of one length."""
    owner = torch.arange(len(files)).repeat_interleave(torch.tensor([len(file) for file in files]))
    values = torch.cat(files)
    return Features(values, torch.full((len(values),), values.shape[1]), owner)


def multimodal_splice(case: Case) -> None:
    ids, labels = unpadded(case, "input_ids"), unpadded(case, "labels")
    table = case.weights()["embed_tokens.weight"]

    def soft_of(row: int) -> list[tuple[str, torch.Tensor]]:
        """Soft tokens [windows, M, H] of each placeholder of a row, as the connectors would have made them."""
        inputs, found, heard = case.inputs, [], 0
        for token in ids[row]:
            if token == IMAGE:
                found.append(("image", inputs["image_features"][row][None]))
            elif token == VIDEO:
                found.append(("video", inputs["video_features"][row].mean(0)[None]))
            elif token == AUDIO:
                heard += 1
                windows = inputs["features_mask"][row] == heard
                found.append(("audio", inputs["audio_features"][row][windows].flatten(1, 2)))
        return found

    def run(rows: list[int], soft: list[list[tuple[str, torch.Tensor]]], width: int) -> tuple[torch.Tensor, ...]:
        counts = [[tokens.shape[0] * tokens.shape[1] for _, tokens in files] for files in soft]
        input_ids, wanted, mask = expand_rows([ids[r] for r in rows], [labels[r] for r in rows], counts, width)
        by_kind: Tensors = {}
        for kind in PLACEHOLDER_IDS:
            files = [tokens for row in soft for name, tokens in row if name == kind]
            if files:
                by_kind[kind] = to_features(files)
        return splice(table[input_ids.clamp(min=0)], input_ids, by_kind), wanted, mask

    def width(name: str) -> int:
        return case.outputs[name].shape[1]

    everything = list(range(len(ids)))
    embeddings, spliced_labels, mask = run(everything, [soft_of(row) for row in everything], width("inputs_embeds"))
    case.check("attention_mask", mask)
    case.check("labels", spliced_labels)
    case.check("inputs_embeds", embeddings, where=mask)

    row = case.spec["equal_case"]["row"]
    flipped = [(kind, tokens.flip(-1) if kind == "audio" else tokens) for kind, tokens in soft_of(row)]
    embeddings, spliced_labels, mask = run([row, row], [soft_of(row), flipped], width("equal.inputs_embeds"))
    case.check("equal.attention_mask", mask)
    case.check("equal.labels", spliced_labels)
    case.check("equal.inputs_embeds", embeddings, where=mask)

    row = case.spec["infer_case"]["row"]
    case.check("infer.inputs_embeds", run([row], [soft_of(row)], width("infer.inputs_embeds"))[0])
