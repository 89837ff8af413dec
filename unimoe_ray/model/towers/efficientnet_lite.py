"""EfficientNet-Lite0 (ImageNet-1k, 4.65 M parameters) as an image tower.

Architecture: Tan and Le, "EfficientNet" (2019), in the Lite variant of TensorFlow's TPU models: no squeeze-and-excite,
ReLU6, stem and head not scaled. The published PyTorch weights keep TensorFlow's "same" padding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unimoe_ray.model.towers import FrozenTower

# expansion, kernel, stride, input channels, output channels, blocks
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if down == right and down % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, down // 2, 1, self.groups)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, expansion: int, kernel: int, stride: int, inputs: int, outputs: int):
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand_conv = SameConv2d(inputs, inner, 1) if expansion > 1 else None
        self.bn0 = _batch_norm(inner) if expansion > 1 else None
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, inner)
        self.bn1 = _batch_norm(inner)
        self.project_conv = SameConv2d(inner, outputs, 1)
        self.bn2 = _batch_norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand_conv is None else F.relu6(self.bn0(self.expand_conv(x)), inplace=True)
        y = F.relu6(self.bn1(self.depthwise_conv(y)), inplace=True)
        y = self.bn2(self.project_conv(y))
        return y.add_(x) if self.residual else y


class EfficientNetLite0(nn.Module):
    """[B, 3, height, width] normalised RGB to 1,000 ImageNet logits. For inference: works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, 2)
        self.bn0 = _batch_norm(32)
        self.blocks = nn.ModuleList(
            Block(expansion, kernel, stride if first else 1, inputs if first else outputs, outputs)
            for expansion, kernel, stride, inputs, outputs, blocks in STAGES
            for first in [True] + [False] * (blocks - 1)
        )
        self.conv_head = SameConv2d(320, 1280, 1)
        self.bn1 = _batch_norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def features(self, x: torch.Tensor, last_block: int) -> torch.Tensor:
        """The output [B, channels, height, width] of block ``last_block``, counted from 0."""
        x = F.relu6(self.bn0(self.conv_stem(x)), inplace=True)
        for block in self.blocks[: last_block + 1]:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn1(self.conv_head(self.features(x, len(self.blocks) - 1))), inplace=True)
        return self.fc(x.mean((2, 3)))


def fold_batch_norm(network: EfficientNetLite0) -> EfficientNetLite0:
    """Move every batch norm into the convolution before it (the same function to rounding), in place."""
    network.eval()
    pairs = [(network, "conv_stem", "bn0"), (network, "conv_head", "bn1")]
    for block in network.blocks:
        pairs += [(block, "depthwise_conv", "bn1"), (block, "project_conv", "bn2")]
        if block.expand_conv is not None:
            pairs.append((block, "expand_conv", "bn0"))
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return network


class EfficientNetLiteTower(FrozenTower):
    """Images and video frames. A window is one picture, resized to ``size`` x ``size`` pixels without cropping; its
    tokens are the positions of block ``last_block``'s output, row by row (64 px, block 10: 16 tokens x 112)."""

    name = "efficientnet_lite0"
    modality = "image"
    chunk_elements = 32 * 3 * 64 * 64

    def __init__(self, network: EfficientNetLite0, size: int = 64, last_block: int = 10):
        """Takes the network over: batch norms are folded and the blocks beyond ``last_block`` dropped."""
        fold_batch_norm(network)
        del network.conv_head, network.bn1, network.fc, network.blocks[last_block + 1 :]
        network.to(memory_format=torch.channels_last)
        super().__init__(network, {"size": size, "last_block": last_block, "resize": "bicubic"})
        self.size = size
        self.last_block = last_block
        self.feature_dim = network.blocks[-1].project_conv.out_channels

    def preprocess(self, media: Image.Image | list[Image.Image]) -> np.ndarray:
        """An RGB picture, or a video's frames, to [W, 3, size, size] float32."""
        frames = media if isinstance(media, list) else [media]
        target = (self.size, self.size)
        pixels = np.stack(
            [
                np.asarray(frame if frame.size == target else frame.resize(target, Image.Resampling.BICUBIC))
                for frame in frames
            ]
        )
        scaled = (pixels.astype(np.float32) / 255.0 - _MEAN) / _STD
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def tokens_for(self, media: Image.Image | list[Image.Image]) -> list[int]:
        """Tokens of each picture."""
        stride = 2 * int(np.prod([block.depthwise_conv.stride[0] for block in self.network.blocks]))
        return [(-(-self.size // stride)) ** 2] * (len(media) if isinstance(media, list) else 1)

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """[B, 3, size, size] to [B, N, D]."""
        maps = self.network.features(windows.contiguous(memory_format=torch.channels_last), self.last_block)
        return maps.flatten(2).transpose(1, 2)
