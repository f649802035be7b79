"""Which extra brings a package that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# As in pyproject.toml, by the name that is imported. What these packages bring themselves is not listed.
EXTRAS = {
    "accelerate": "hf",
    "datasets": "hf",
    "diffusers": "diffusion",
    "docstring_parser": "hf",  # of jsonargparse[signatures]
    "jsonargparse": "hf",
    "lm_eval": "eval",
    "matplotlib": "hf",
    "peft": "peft",
    "rich": "hf",
    "rouge_score": "eval",
    "safetensors": "hf",
    "sklearn": "hf",
    "timm": "timm",
    "torchmetrics": "eval",
    "torchvision": "timm",
    "transformers": "hf",
    "trl": "trl",
    "yaml": "hf",
}
"""Package → extra of squeezeheads."""


def how_to_install(package: str | None) -> str:
    """What a user does about a missing package, as a sentence.

    Args:
        package: the name that could not be imported, submodules included.
    """
    extra = EXTRAS.get((package or "").split(".")[0])
    if extra is None:
        return "No extra of squeezeheads brings it by name: install it by itself, or install squeezeheads[all] anew."
    return f"Install it with pip install 'squeezeheads[{extra}]'."


@contextmanager
def needs_triton() -> Iterator[None]:
    """Around the import of a module with kernels.

    Raises:
        ImportError: Triton is not installed; says what brings it.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ImportError(
            f'implementation="triton" needs the package {missing.name!r}, which the CUDA builds of torch for Linux '
            'bring (elsewhere: pip install triton); "tiled" works without.'
        ) from missing
