"""FID, sFID and Inception score of images that are fed in batches."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.errors import MachineError, RecipeError
from squeezeheads.evaluation.image_metrics import frechet_distance

SPATIAL_CHANNELS = 7
"""Of the Inception network's spatial features that sFID goes by."""


NEEDED = ("torchmetrics", "torch_fidelity")


def check_installed() -> None:
    """
    Raises:
        MachineError: a package of these metrics is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MachineError(
            f"FID, sFID and Inception score need torchmetrics, torch-fidelity and the weights that it downloads: "
            f"{' and '.join(missing)} missing. {_WAY_OUT}"
        )


_WAY_OUT = (
    "Install them with pip install torchmetrics torch-fidelity, or set sampling.inception to false: the Fréchet "
    "distance on other features needs neither."
)


class InceptionMetrics:
    """FID, sFID and Inception score with torch-fidelity's standard Inception network, which torchmetrics runs.

    sFID is the Fréchet distance on features that know where they are: the first 7 channels of the 17 × 17 map that the
    1 × 1 branch of the network's block Mixed_6d gives ("mixed_6/conv" in the network's original graph), side by side:
    2,023 features. They are watched during the forward pass of the FID.

    Raises:
        RecipeError: a package or the network's weights are missing.

    Source of sFID: Nash et al., "Generating Images with Sparse Representations", arXiv 2103.03841; layer and channels
    as in the public evaluation code of Dhariwal, Nichol, arXiv 2105.05233.
    """

    def __init__(self) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.inception import InceptionScore

            self.fid: Any = FrechetInceptionDistance()
            self.score: Any = InceptionScore()
        except (ImportError, OSError) as error:
            raise RecipeError(
                f"FID, sFID and Inception score need torchmetrics, torch-fidelity and the weights that it downloads: "
                f"{error} {_WAY_OUT}"
            ) from error
        self._maps: dict[bool, list[Tensor]] = {}
        self.reset()

    def to(self, device: torch.device) -> InceptionMetrics:
        """Both networks, and what they have counted, on a device."""
        self.fid.to(device)
        self.score.to(device)
        return self

    def reset(self) -> None:
        """Forget all images."""
        self.fid.reset()
        self.score.reset()
        self._maps = {True: [], False: []}

    def update(self, images: Tensor, *, real: bool) -> None:
        """A batch (B, C, H, W) from 0 to 1, of real or of generated images; grey ones are repeated."""
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        # Rounded here: torchmetrics cuts off, so that a real image's levels would not come back as they were.
        levels = (images * 255).round().byte().to(self.fid.device)

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._maps[real].append(output[:, :SPATIAL_CHANNELS].flatten(1).cpu())

        handle = self.fid.inception.Mixed_6d.branch1x1.register_forward_hook(keep)
        try:
            self.fid.update(levels, real=real)
        finally:
            handle.remove()
        if not real:
            self.score.update(levels)

    def compute(self) -> dict[str, float]:
        """``fid``; ``sfid``; ``inception_score``, the mean over ten parts (nats, exponentiated)."""
        with torch.random.fork_rng(devices=[]):  # the ten parts are drawn
            torch.default_generator.manual_seed(0)
            inception_score = float(self.score.compute()[0])
        return {
            "fid": float(self.fid.compute()),
            "sfid": frechet_distance(torch.cat(self._maps[True]), torch.cat(self._maps[False])),
            "inception_score": inception_score,
        }
