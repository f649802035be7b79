"""Latents of an autoencoder, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from squeezeheads.errors import RecipeError, in_short
from squeezeheads.named_models import looking_for

PART = 4096
"""Images encoded between writes: a run that is stopped goes on after the last whole part."""


class Latents(Sequence[Tensor]):
    """Latents (C, h, w) in files, read when they are asked for."""

    def __init__(self, files: Sequence[Path], count: int) -> None:
        self._files, self._count = list(files), count
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        file, place = self._files[index // PART], index % PART
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").get_slice("latents")
        return self._open[file][place].float()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files are no part of a copy for another process


def load_autoencoder(path: str) -> AutoencoderKL:
    """An ``AutoencoderKL`` from a folder or the hub, of its own or inside a pipeline: safetensors alone, float32,
    frozen.

    Raises:
        OSError, ValueError: there is none.
    """
    subfolder = {"subfolder": "vae"} if (Path(path) / "model_index.json").is_file() else {}
    with looking_for(path):
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **subfolder)
    return vae.eval().requires_grad_(False)


def latent_size(vae: AutoencoderKL, image_size: int) -> tuple[int, int]:
    """Channels, and height and width, of the latents of square images.

    Raises:
        ValueError: a size that the autoencoder does not divide.
    """
    return _latent_size(vae.config, image_size)


def latent_shape(path: str, image_size: int) -> tuple[int, int]:
    """``latent_size`` by the autoencoder's configuration alone.

    Raises:
        RecipeError: there is none, or a size that the autoencoder does not divide.
    """
    subfolder = {"subfolder": "vae"} if (Path(path) / "model_index.json").is_file() else {}
    try:
        with looking_for(path):
            config = SimpleNamespace(**AutoencoderKL.load_config(path, **subfolder))
        return _latent_size(config, image_size)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"autoencoder={path!r} cannot be loaded: {in_short(error)}") from error


def _latent_size(config: Any, image_size: int) -> tuple[int, int]:
    factor = 2 ** (len(config.block_out_channels) - 1)
    if image_size % factor:
        raise ValueError(f"image_size={image_size} is no multiple of {factor}, by which the autoencoder divides it.")
    return config.latent_channels, image_size // factor


@torch.no_grad()
def encode_images(
    images: Sequence[Tensor],
    identity: Sequence[Any],
    vae: AutoencoderKL,
    cache: Path,
    *,
    batch_size: int = 32,
    told: Callable[[str], None] = lambda text: None,
) -> Latents:
    """Latents of all images, times the autoencoder's ``scaling_factor``: the mean of its posterior, in float32.

    They are kept under ``cache`` in a folder that is named after the images' identity and the autoencoder's weights and
    configuration: encoded again if any of these change, and only then.

    Args:
        images: (C, H, W) from −1 to 1.
        identity: plain data that changes when the images do.
        vae: on the device where it is to run.
        cache: folder; made if it is not there.
        batch_size: images encoded at a time.
        told: is told what is encoded, once.
    """
    folder = cache / _key(identity, vae)
    files = [folder / f"{start:09d}.safetensors" for start in range(0, len(images), PART)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        told(f"encoding {len(images)} images into {folder}")
    for file in missing:
        folder.mkdir(parents=True, exist_ok=True)
        begin = int(file.stem)
        end = min(begin + PART, len(images))
        parts = []
        for start in range(begin, end, batch_size):
            pixels = torch.stack([images[i] for i in range(start, min(start + batch_size, end))])
            pixels = pixels.expand(-1, vae.config.in_channels, -1, -1) if pixels.shape[1] == 1 else pixels
            parts.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().float().cpu())
        part = file.with_suffix(".part")
        save_file({"latents": (torch.cat(parts) * vae.config.scaling_factor).contiguous()}, part)
        part.replace(file)
    return Latents(files, len(images))


def _key(identity: Sequence[Any], vae: AutoencoderKL) -> str:
    digest = hashlib.sha256(json.dumps(list(identity)).encode())
    config = {key: value for key, value in dict(vae.config).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
