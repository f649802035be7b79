"""How good generated images are, by features of any model; letters: n images, F features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from squeezeheads.batches import evaluating

if TYPE_CHECKING:
    from squeezeheads.evaluation.inception import InceptionMetrics


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


def features_of(module: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """What ``module`` makes of images (n, C, H, W), as (n, F) on the CPU, in eval mode on the module's device."""
    return torch.cat([_features(module, part) for part in images.split(batch_size)])


@torch.no_grad()
def _features(module: nn.Module, images: Tensor) -> Tensor:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with evaluating(module):
        return module(images.to(device)).flatten(1).float().cpu()


def class_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of images that the classifier puts into the class that they were asked for.

    Args:
        classifier: (B, C, H, W) → logits (B, classes).
        images: (n, C, H, W).
        labels: (n,).
    """
    return _share_right(features_of(classifier, images, batch_size), labels)


def _share_right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels.cpu()).double().mean().item()


def measure_images(
    real: Iterable[Tensor],
    generated: Iterable[Tensor],
    *,
    features: nn.Module | None = None,
    real_features: Tensor | None = None,
    classifier: nn.Module | None = None,
    labels: Tensor | None = None,
    inception: InceptionMetrics | None = None,
) -> dict[str, float]:
    """All metrics that are asked for, of images that are seen once, batch by batch: only features are held.

    Args:
        real: batches (B, C, H, W) from 0 to 1; read where features or Inception's metrics need them.
        generated: batches likewise.
        features: (B, C, H, W) → (B, …): of the Fréchet distance, precision and recall; ``None`` leaves these out.
        real_features: (n, F), where those of the real images are known already.
        classifier: (B, C, H, W) → logits (B, classes); ``None`` leaves the accuracy out.
        labels: (n,) the classes that the generated images were asked for; goes with ``classifier``.
        inception: ``None`` leaves its metrics out. What it has counted before is forgotten.

    Returns:
        ``frechet_distance``, ``precision``, ``recall``; ``class_accuracy``; ``fid``, ``sfid``, ``inception_score``.

    Raises:
        ValueError: a classifier without labels, fewer than 4 images, features of other widths.
    """
    if classifier is not None and labels is None:
        raise ValueError("class_accuracy needs the labels that the generated images were asked for.")
    known: list[Tensor] = [] if real_features is None else [real_features]
    found: list[Tensor] = []
    logits: list[Tensor] = []
    metrics: dict[str, float] = {}
    if inception is not None:
        inception.reset()
    if inception is not None or (features is not None and real_features is None):
        for images in real:
            if inception is not None:
                inception.update(images, real=True)
            if features is not None and real_features is None:
                known.append(_features(features, images))
    for images in generated:
        if inception is not None:
            inception.update(images, real=False)
        if features is not None:
            found.append(_features(features, images))
        if classifier is not None:
            logits.append(_features(classifier, images))
    if features is not None:
        given, made = torch.cat(known), torch.cat(found)
        metrics["frechet_distance"] = frechet_distance(given, made)
        metrics["precision"], metrics["recall"] = precision_and_recall(given, made)
    if classifier is not None and labels is not None:
        metrics["class_accuracy"] = _share_right(torch.cat(logits), labels)
    if inception is not None:
        metrics |= inception.compute()
        inception.reset()
    return metrics
