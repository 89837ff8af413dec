"""CLIP's vision transformer (Hugging Face's class) as the image tower of LLaVA-1.5 and Uni-MoE."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from unimoe_ray.model.towers import FrozenTower

_MEAN, _STD = (np.array(values, dtype=np.float32) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))


class ClipTower(FrozenTower):
    """Images and video frames. A window is one picture; its tokens are the patches, row by row, as layer
    ``select_layer`` (-2: the last but one) leaves them, without the class token (ViT-L/14 at 336 px: 576 x 1024).

    aspect: a picture that is not square is cropped to its centre (``crop``) or padded to a square with the mean colour
    (``pad``). The released Uni-MoE crops.
    """

    name = "clip"
    modality = "image"
    chunk_elements = 8 * 3 * 336 * 336

    def __init__(self, network: CLIPVisionModel, aspect: Literal["crop", "pad"] = "crop", select_layer: int = -2):
        """Takes the network over: the layers above ``select_layer`` are dropped."""
        layers = network.encoder.layers
        if not -len(layers) <= select_layer < 0:
            raise ValueError(f"select_layer is {select_layer}; allowed: -{len(layers)} to -1")
        del layers[len(layers) + 1 + select_layer :]
        super().__init__(network, {"aspect": aspect, "select_layer": select_layer, "resize": "bicubic"})
        self.aspect = aspect
        self.size = network.config.image_size
        self.feature_dim = network.config.hidden_size

    def preprocess(self, media: Image.Image | list[Image.Image]) -> np.ndarray:
        """An RGB picture, or a video's frames, to [W, 3, size, size] float32, as CLIPImageProcessor does it."""
        frames = media if isinstance(media, list) else [media]
        fit = _crop if self.aspect == "crop" else _pad
        pixels = np.stack([np.asarray(fit(frame, self.size), dtype=np.float32) for frame in frames])
        return np.ascontiguousarray(((pixels / 255.0 - _MEAN) / _STD).transpose(0, 3, 1, 2))

    def tokens_for(self, media: Image.Image | list[Image.Image]) -> list[int]:
        """Tokens of each picture."""
        side = self.size // self.network.config.patch_size
        return [side * side] * (len(media) if isinstance(media, list) else 1)

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, 3, size, size] to [B, N, D]."""
        return self.network(windows).last_hidden_state[:, 1:]


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size``, the middle of the longer one."""
    short = min(picture.size)
    width, height = (size if side == short else int(size * side / short) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def _pad(picture: Image.Image, size: int) -> Image.Image:
    """On a square of CLIP's mean colour, then resized to ``size``."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in OPENAI_CLIP_MEAN))
    square.paste(picture, tuple((side - own) // 2 for own in picture.size))
    return square.resize((size, size), Image.Resampling.BICUBIC)
