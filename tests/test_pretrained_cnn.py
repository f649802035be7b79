"""A real pretrained CNN (see `make assets`): it knows photographs, and its features tell images from noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks.assets import AssetError
from benchmarks.efficientnet import Features, load_efficientnet
from sklearn.datasets import load_digits, load_sample_images

from squeezeheads.evaluation.image_metrics import features_of, frechet_distance

pytestmark = pytest.mark.assets
PALACE, DAISY = 698, 985  # ImageNet's


@pytest.fixture(scope="module", autouse=True)
def here():
    try:
        load_efficientnet()
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("index", "expected"), [(0, PALACE), (1, DAISY)], ids=["china.jpg", "flower.jpg"])
def test_it_names_scikit_learns_photographs(index, expected):
    picture = torch.tensor(load_sample_images().images[index]).permute(2, 0, 1).float() / 255
    square = picture[:, :, (picture.shape[2] - picture.shape[1]) // 2 :][:, :, : picture.shape[1]]
    images = 2 * F.interpolate(square[None], (224, 224), mode="bicubic", antialias=True) - 1
    with torch.no_grad():
        assert load_efficientnet().classify(images).argmax() == expected


def test_its_distance_grows_with_noise():
    images = torch.tensor(load_digits().images[:600, None] / 16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    features = Features()
    assert features_of(features, images[:2], 2).shape == (2, 1280)
    real = features_of(features, images[:300], 100)
    distances = []
    for strength in (0.0, 0.1, 0.4):
        noisy = images[300:] + strength * torch.randn(300, 1, 8, 8, generator=generator)
        distances.append(frechet_distance(real, features_of(features, noisy, 100)))
    assert 0 < distances[0] < distances[1] < distances[2]
