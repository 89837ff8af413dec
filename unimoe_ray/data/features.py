"""One media file to the features of its frozen tower: what the encoding pipeline, chat and the endpoint share."""

from __future__ import annotations

import numpy as np

from unimoe_ray.config.data import DataConfig
from unimoe_ray.data.locations import open_media
from unimoe_ray.data.media import load_audio, load_image, load_video, pick_frames
from unimoe_ray.data.schema import Media
from unimoe_ray.data.store import DTYPES, StoredFeatures
from unimoe_ray.errors import UnimoeError

TOWER_OF = {"image": "image", "video": "image", "audio": "audio", "speech": "speech"}
_FP16 = DTYPES["fp16"]


def decode_media(media: Media, frames: int, data: DataConfig):
    """A media file as its tower takes it (see ``model.features.Tower``). Raises BadMedia."""
    files = media.paths
    if media.kind == "video" and len(files) > 1:
        files = pick_frames(list(files), frames)
    opened = [open_media(file, data.max_bytes) if isinstance(file, str) else file for file in files]
    if media.kind == "image":
        return load_image(opened[0], data.max_pixels)
    if media.kind == "video":
        if len(opened) > 1:
            return [load_image(file, data.max_pixels) for file in opened]
        return load_video(opened[0], frames, data.max_pixels, data.max_seconds)
    return load_audio(opened[0], data.max_seconds)


def encode_files(tower, decoded: list) -> list[StoredFeatures]:
    """Features of decoded files of one tower, fp16, one entry a file."""
    return encode_windows(tower, [tower.preprocess(media) for media in decoded])


def encode_windows(tower, windows: list[np.ndarray], dtype: np.dtype = _FP16) -> list[StoredFeatures]:
    """``encode_files`` from the tower's own input windows. Raises UnimoeError for values beyond the dtype's range."""
    if not windows:
        return []
    features = tower(windows)
    values, lengths, owner = (t.cpu().numpy() for t in (features.values, features.lengths, features.owner))
    stored = []
    for index in range(len(windows)):
        mine = owner == index
        n = int(lengths[mine].max())
        kept = values[mine][:, :n]
        if np.abs(kept).max(initial=0) > np.finfo(dtype).max:
            raise UnimoeError(
                f"features of the {tower.name} tower are beyond the range of {dtype}: data.store_dtype=fp32"
            )
        stored.append(StoredFeatures(kept.astype(dtype), lengths[mine].tolist()))
    return stored
