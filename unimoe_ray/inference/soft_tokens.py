"""Features of media files to soft tokens, one array per file."""

from __future__ import annotations

import numpy as np
import torch

from unimoe_ray.data.batch import stack_features
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.model.connectors import Connector
from unimoe_ray.model.features import Features


@torch.inference_mode()
def soft_tokens(connector: Connector, modality: str, files: list[StoredFeatures]) -> list[np.ndarray]:
    """[M, H] of each file of one modality: the valid tokens of its windows, in order. fp32; on a GPU fp16."""
    parameter = next(connector.parameters())
    arrays = stack_features(modality, files)
    values, lengths, owner = (torch.from_numpy(arrays[f"{modality}.{n}"]) for n in ("values", "lengths", "owner"))
    soft = connector(Features(values.to(parameter), lengths.to(parameter.device), owner.to(parameter.device)))
    kept = soft.values.to("cpu", torch.float32 if parameter.device.type == "cpu" else torch.float16)
    lengths, owner = soft.lengths.cpu(), soft.owner.cpu()
    valid = torch.arange(kept.shape[1]) < lengths[:, None]
    per_file = torch.zeros(len(files), dtype=torch.int64).index_add_(0, owner, lengths)
    return [part.numpy() for part in kept[valid].split(per_file.tolist())]
