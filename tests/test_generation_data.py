"""Images for generation: files, splits, latents that are encoded once."""

from __future__ import annotations

import gzip
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from squeezeheads.diffusion import latents
from squeezeheads.diffusion.latents import encode_images, latent_size, load_autoencoder
from squeezeheads.diffusion.specs import SamplingSpec
from squeezeheads.diffusion.square_images import SquareImages
from squeezeheads.errors import RecipeError
from squeezeheads.tasks import ImageGeneration, Pretrained
from squeezeheads.tasks.images import read_images

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 40)):
        images = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def image_folder(folder: Path, classes: dict[str, int], size: tuple[int, int] = (20, 14)) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shade = np.full((size[1], size[0], 3), 10 * i, dtype=np.uint8)
            shade[:, : (size[0] - size[1]) // 2] = 255  # what cropping takes away
            Image.fromarray(shade).save(folder / name / f"{i:02d}.png")
    return folder


def squares(source: str, size: int) -> SquareImages:
    images = read_images(source, None, None)["train"]
    return SquareImages(images, images.own_channels, size)


def test_pixels_are_scaled_from_their_levels():
    digits = squares("digits", 8)
    assert digits[0].shape == (1, 8, 8) and digits[0].min() == -1 and len(digits) == 1797
    raw = torch.from_numpy(digits.images.image(5, 1)).float()
    assert torch.equal(digits[5], raw / 8 - 1)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not installed: make assets-data")
def test_fashion_mnist():
    task, splits = load(data=str(FASHION), validation_size=1000, test_size=1000)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [59000, 1000, 1000]
    assert splits.test.labels[splits.test.chosen].bincount().tolist() == [100] * 10
    assert task.data_config()["sample_size"] == 28
    clean = splits.train[0]["clean"]
    assert clean.shape == (1, 28, 28) and clean.min() == -1 and 0.9 < clean.max() <= 1


def test_image_files_are_scaled_and_cropped_in_the_middle(tmp_path):
    image_folder(tmp_path, {"b": 3, "a": 2})
    images = squares(str(tmp_path), 7)
    assert images.images.classes == ["a", "b"] and images.images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images[3].shape == (3, 7, 7)
    inner = images[3][:, :, 2:]  # the crop's edge mixes with what lies beyond
    torch.testing.assert_close(inner, torch.full_like(inner, 10 / 127.5 - 1), atol=0.03, rtol=0)
    same = squares(str(tmp_path), 7).identity
    assert same == images.identity and squares(str(tmp_path), 8).identity != same
    (tmp_path / "a" / "00.png").write_bytes((tmp_path / "b" / "02.png").read_bytes())
    assert squares(str(tmp_path), 7).identity != same


def test_images_of_several_sizes_need_one(tmp_path):
    image_folder(tmp_path / "train", {"a": 20, "b": 20})
    with pytest.raises(RecipeError, match="image_size"):
        load(data=str(tmp_path), validation_size=10, test_size=10)
    task, splits = load(data=str(tmp_path), validation_size=10, test_size=10, image_size=8)
    assert splits.train[0]["clean"].shape == (3, 8, 8)
    assert task.data_config() == {"in_channels": 3, "out_channels": 6, "sample_size": 8, "num_embeds_ada_norm": 2}


def load(**options):
    task = ImageGeneration(**options)
    return task, task.load_data(Pretrained({"teacher": None}))


def test_splits_do_not_share_images_and_keep_classes_even(idx_folder):
    _, splits = load(validation_size=50, test_size=100)
    parts = [set(part.chosen) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [1647, 50, 100]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    counts = splits.test.labels[list(parts[2])].bincount()
    assert counts.min() >= 9 and counts.max() <= 11
    task, splits = load(data=str(idx_folder), validation_size=20, test_size=12)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 20, 12]
    assert splits.test.images is not splits.train.images, "the data's own test part"
    assert task.data_config() == {"in_channels": 1, "out_channels": 2, "sample_size": 12, "num_embeds_ada_norm": 4}
    assert len(load(data=str(idx_folder), validation_size=20, test_size=1000)[1].test) == 40
    with pytest.raises(RecipeError, match="validation_size=70"):
        load(data=str(idx_folder), validation_size=70)


def test_validation_and_test_draw_the_same_every_time():
    task, splits = load()
    again = load()[1]
    for part in ("validation", "test"):
        a, b = (task.collate([getattr(s, part)[i] for i in range(5)]) for s in (splits, again))
        assert all(torch.equal(a[key], b[key]) for key in a)
        held = getattr(splits, part)
        training = [held.seeded(seed)[0]["draw"] for seed in range(100)]
        assert held[0]["draw"] not in training, "other draws than those of a training"


# -- latents ---------------------------------------------------------------------------------------------------------


def autoencoder(seed: int = 0, channels: int = 1) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=2, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        sample_size=8, scaling_factor=0.7,
    ).eval()  # fmt: skip


def test_latents_are_those_of_the_autoencoder_and_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART", 4)
    vae = autoencoder()
    digits = read_images("digits", None, None)["train"]
    images = SquareImages(replace(digits, pixels=digits.pixels[:10], labels=digits.labels[:10]), 1, 8)
    told = []
    found = encode_images(images, images.identity, vae, tmp_path, batch_size=3, told=told.append)
    pixels = torch.stack([images[i] for i in range(10)])
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * 0.7
    assert len(found) == 10 and len(told) == 1
    torch.testing.assert_close(torch.stack([found[i] for i in range(10)]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(found))[9], expected[9], rtol=1e-4, atol=1e-5)
    (folder,) = tmp_path.iterdir()
    assert [len(load_file(file)["latents"]) for file in sorted(folder.iterdir())] == [4, 4, 2]

    # Again: nothing is encoded. One part is missing: that part alone is.
    def refuse(*_):
        raise AssertionError("encoded again")

    calls, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", refuse)
    encode_images(images, images.identity, vae, tmp_path)
    monkeypatch.setattr(vae, "encode", lambda x: calls.append(len(x)) or encode(x))
    sorted(folder.iterdir())[1].unlink()
    again = encode_images(images, images.identity, vae, tmp_path)
    assert calls == [4] and torch.equal(again[5], found[5])

    # Another autoencoder, other images, another factor: a folder of their own.
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3
    encode_images(images, images.identity, vae, tmp_path)
    encode_images(images, [*images.identity, "changed"], vae, tmp_path)
    vae.register_to_config(scaling_factor=0.8)
    encode_images(images, images.identity, vae, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_sizes_that_the_autoencoder_does_not_divide_are_named():
    assert latent_size(autoencoder(), 8) == (2, 4)
    with pytest.raises(ValueError, match="image_size=7 is no multiple of 2"):
        latent_size(autoencoder(), 7)


def test_denoising_in_latents(tmp_path, capsys):
    """Models are made for the latents, noise is added to them, and generated images are decoded."""
    autoencoder().save_pretrained(tmp_path / "vae")
    task, splits = load(autoencoder=str(tmp_path / "vae"), latent_cache=str(tmp_path / "cache"))
    told = capsys.readouterr()
    assert told.out == "", "`evaluate` prints JSON there"
    assert "encoding 1797 images" in told.err
    assert task.data_config() == {"in_channels": 2, "out_channels": 4, "sample_size": 4, "num_embeds_ada_norm": 10}
    given = task.collate([splits.train[i] for i in range(3)])
    vae = load_autoencoder(str(tmp_path / "vae"))
    digits = squares("digits", 8)
    pixels = torch.stack([digits[splits.train.chosen[i]] for i in range(3)])
    torch.testing.assert_close(given["clean"], vae.encode(pixels).latent_dist.mode() * 0.7, rtol=1e-4, atol=1e-5)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2}
    model = task.build(task.new_config({"model_type": "dit", **sizes}, "teacher.config"), "sdpa")
    assert model.loss.levels == 256, "latents of digits are taken for bytes too"
    plain, _ = load()
    assert plain.build(plain.new_config({"model_type": "dit", **sizes}, "teacher.config"), "sdpa").loss.levels == 17
    task.sampling.steps, task.sampling.images = 2, 20
    images = task.generate(model, torch.tensor([1, 2]))
    assert images.shape == (2, 1, 8, 8)
    assert not task.pipeline(model).scheduler.config.clip_sample, "latents are not kept within -1 and 1"
    metrics = task.measure(model, splits.test, 10)
    assert metrics["frechet_distance"] > 0 and metrics["noise_error"] > 0.5
    with pytest.raises(RecipeError, match="nowhere"):
        load(autoencoder=str(tmp_path / "nowhere"))


def test_grey_images_are_compared_with_what_an_autoencoder_of_colours_makes_of_them(tmp_path):
    """It was found out when all was trained: 64 features against 192."""
    autoencoder(channels=3).save_pretrained(tmp_path / "vae")
    task, splits = load(
        autoencoder=str(tmp_path / "vae"), latent_cache=str(tmp_path / "cache"),
        sampling=SamplingSpec(steps=1, images=20),
    )  # fmt: skip
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2}
    model = task.build(task.new_config({"model_type": "dit", **sizes}, "teacher.config"), "sdpa")
    assert task.measure(model, splits.test, 100)["frechet_distance"] > 0


def test_a_latent_cache_that_cannot_be_written_to_is_told_first(tmp_path, capsys):
    autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "a file").write_text("")
    options = {"autoencoder": str(tmp_path / "vae"), "latent_cache": str(tmp_path / "a file" / "within")}
    with pytest.raises(RecipeError, match="latent_cache='.*within' cannot be made or written to"):
        load(**options)
    assert "encoding" not in capsys.readouterr().err
    sketch = ImageGeneration(**options).sketch_data(Pretrained({}))
    assert [key for key, _ in sketch.problems] == ["latent_cache"]
