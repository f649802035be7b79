"""How good generated images are, by features of any model; letters: n images, F features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.distillation import evaluating
from squeezeheads.errors import RecipeError


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance between two Gaussians that are fitted to features: ‖m₁ − m₂‖² + tr(S₁ + S₂ − 2 (S₁
    S₂)^½), in float64.

    It is called FID where the features are those of one certain Inception network, and must not be where they are
    others. It is biased upwards for few images: compare values of equal numbers alone.

    Args:
        real: (n, F).
        generated: (m, F).

    Raises:
        ValueError: fewer than 2 images, or other features.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", arXiv
    1706.08500; Dowson, Landau 1982.
    """
    _check_features(real, generated, 2)
    means, covariances = zip(*(_moments(features) for features in (real, generated)), strict=True)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    # tr (S₁ S₂)^½ by way of a symmetric matrix of the same eigenvalues.
    inner = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * inner).clamp_min(0).item()


def precision_and_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated images that lie in the real images' manifold, and the other way round. A manifold is the union
    of balls around its images, each reaching to the image's ``neighbours``-th nearest other one.

    Args:
        real: (n, F).
        generated: (m, F).

    Raises:
        ValueError: no more images than ``neighbours``, or other features.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", arXiv
    1904.06991.
    """
    _check_features(real, generated, neighbours + 1)
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int, chunk: int = 1024) -> float:
    points, manifold = points.double(), manifold.double()
    # The nearest is the image itself.
    reach = torch.cat([torch.cdist(m, manifold).kthvalue(neighbours + 1, dim=1).values for m in manifold.split(chunk)])
    inside = sum(int((torch.cdist(p, manifold) <= reach).any(1).sum()) for p in points.split(chunk))
    return inside / len(points)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.double().mean(0), torch.cov(features.double().mT).reshape(features.shape[1], features.shape[1])


def _check_features(real: Tensor, generated: Tensor, least: int) -> None:
    for whose, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or len(features) < least:
            raise ValueError(f"{whose} features {tuple(features.shape)}: expected (n, F) of at least {least} images.")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real images have {real.shape[1]} features, generated ones {generated.shape[1]}.")


@torch.no_grad()
def features_of(module: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """What ``module`` makes of images (n, C, H, W), as (n, F) on the CPU, in eval mode on the module's device."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with evaluating(module):
        return torch.cat([module(part.to(device)).flatten(1).float().cpu() for part in images.split(batch_size)])


def class_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of images that the classifier puts into the class that they were asked for.

    Args:
        classifier: (B, C, H, W) → logits (B, classes).
        images: (n, C, H, W).
        labels: (n,).
    """
    guesses = features_of(classifier, images, batch_size).argmax(1)
    return (guesses == labels.cpu()).double().mean().item()


SPATIAL_CHANNELS = 7
"""Of the Inception network's spatial features that sFID goes by."""


def inception_metrics(real: Tensor, generated: Tensor, batch_size: int) -> dict[str, float]:
    """FID, sFID and Inception score with torch-fidelity's standard Inception network, which torchmetrics runs.

    sFID is the Fréchet distance on features that know where they are: the first 7 channels of the 17 × 17 map that the
    1 × 1 branch of the network's block Mixed_6d gives ("mixed_6/conv" in the network's original graph), side by side:
    2,023 features. They are watched during the forward pass of the FID.

    Args:
        real: (n, C, H, W) from 0 to 1; grey images are repeated.
        generated: (m, C, H, W).

    Returns:
        ``fid``; ``sfid``; ``inception_score``, the mean over ten parts (nats, exponentiated).

    Raises:
        RecipeError: a package or the network's weights are missing.

    Source of sFID: Nash et al., "Generating Images with Sparse Representations", arXiv 2103.03841; layer and channels
    as in the public evaluation code of Dhariwal, Nichol, arXiv 2105.05233.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        metrics: list[Any] = [FrechetInceptionDistance(), InceptionScore()]
    except (ImportError, OSError) as error:
        raise RecipeError(
            f"FID, sFID and Inception score need torchmetrics, torch-fidelity and the weights that it downloads: "
            f"{error} Install them with pip install torchmetrics torch-fidelity, or set sampling.inception to false: "
            "the Fréchet distance on other features needs neither."
        ) from error
    fid, score = metrics
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        maps.append(output[:, :SPATIAL_CHANNELS].flatten(1).cpu())

    handle = fid.inception.Mixed_6d.branch1x1.register_forward_hook(keep)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(batch_size):
            part = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            # Rounded here: torchmetrics cuts off, so that a real image's levels would not come back as they were.
            part = (part * 255).round().byte()
            fid.update(part, real=is_real)
            if not is_real:
                score.update(part)
    handle.remove()
    spatial = torch.cat(maps).split([len(real), len(generated)])
    with torch.random.fork_rng(devices=[]):  # the ten parts are drawn
        torch.default_generator.manual_seed(0)
        inception_score = float(score.compute()[0])
    return {
        "fid": float(fid.compute()),
        "sfid": frechet_distance(spatial[0], spatial[1]),
        "inception_score": inception_score,
    }
