"""Which tokens a masked pass of MDT keeps: drawn outside the model, so that teacher and student see the same."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_mask_ratio(generator: torch.Generator | None = None, low: float = 0.3, high: float = 0.5) -> float:
    """Share of the tokens that a batch masks, uniform in [``low``, ``high``].

    Args:
        generator: where the random number comes from; torch's default on the CPU if ``None``.
        low: least share. MDTv2 is published with 0.3 and 0.5, drawn once per batch.
        high: greatest share.

    Raises:
        ValueError: not 0 ≤ ``low`` ≤ ``high`` < 1.
    """
    if not 0 <= low <= high < 1:
        raise ValueError(f"low={low}, high={high}: a mask ratio lies in [0, 1), and low is not above high.")
    draw = torch.rand((), generator=generator, device=_device(generator), dtype=torch.float64)
    return low + (high - low) * draw.item()


def draw_kept_tokens(batch: int, tokens: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """The tokens that each sample of a batch keeps, drawn without replacement, each sample by itself.

    Args:
        batch: number of samples ``B``.
        tokens: number of tokens of a sample ``N``, ``(sample_size / patch_size) ** 2``.
        ratio: share of the tokens that is masked. ⌊N · (1 − ratio)⌋ are kept.
        generator: where the random numbers come from; torch's default on the CPU if ``None``.

    Returns:
        (B, kept) int64, ascending in each row, on the generator's device. With ``ratio`` 0 it is all tokens.

    Raises:
        ValueError: a ratio outside [0, 1), or one that keeps no token.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio}: the share of masked tokens lies in [0, 1).")
    kept = int(tokens * (1 - ratio))
    if kept < 1:
        raise ValueError(f"ratio={ratio} masks all of {tokens} tokens: at least one has to be kept.")
    noise = torch.rand(batch, tokens, generator=generator, device=_device(generator))
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
