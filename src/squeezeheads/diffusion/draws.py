"""What is drawn for a batch: steps, noise, dropped labels, kept tokens. Drawn outside the models, so that teacher and
student share it, and from each sample's own seed, so that a resumed or differently cut run draws the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from squeezeheads.epochs import SharedEpoch
from squeezeheads.models import draw_kept_tokens, draw_mask_ratio

MASKED = "masked_"
"""Prefix of what the second pass of a batch has for its own."""


class SeededImages(Sequence[dict[str, Any]]):
    """Images with their class, and a seed that differs between samples and epochs.

    Args:
        images: (C, H, W) each.
        labels: (n,) classes.
        seed: of all draws.
        chosen: which of the images; all by default.
    """

    def __init__(
        self, images: Sequence[Tensor] | Tensor, labels: Tensor, seed: int = 0, chosen: Sequence[int] | None = None
    ) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.chosen = range(len(images)) if chosen is None else chosen
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, as in this epoch."""
        self._epoch.set(epoch)

    def seeded(self, seed: int) -> SeededImages:
        """The same images, other draws."""
        return SeededImages(self.images, self.labels, seed, self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        image = self.chosen[index]
        name = f"{self.seed}/{int(self._epoch)}/{image}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
        return {"clean": self.images[image], "class_labels": int(self.labels[image]), "draw": seed}


@dataclass(frozen=True)
class Noising:
    """Samples of ``SeededImages`` → a batch of ``Denoiser``'s inputs.

    With ``tokens`` also what a second, masked pass needs (see ``two_passes``): the same steps and labels, other noise,
    and the tokens that are kept. One share of masked tokens is drawn for a batch, and for each sample which.
    """

    scheduler: DDPMScheduler
    """Whose noise schedule it is."""
    classes: int
    """The label that stands for none."""
    label_drop: float = 0.0
    """Probability that a sample is without label."""
    tokens: int | None = None
    """N, tokens of an image, where there is a masked pass."""
    mask_ratio: tuple[float, float] = (0.3, 0.5)
    """Between which shares of masked tokens is drawn."""

    def unmasked(self) -> Noising:
        """Without a second pass."""
        return replace(self, tokens=None)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        generators = [torch.Generator().manual_seed(sample["draw"]) for sample in samples]
        clean = torch.stack([sample["clean"] for sample in samples])
        labels = torch.tensor([sample["class_labels"] for sample in samples])
        steps = self.scheduler.config.num_train_timesteps
        timestep = torch.cat([torch.randint(steps, (1,), generator=g) for g in generators])
        dropped = torch.cat([torch.rand(1, generator=g) < self.label_drop for g in generators])
        batch = {"timestep": timestep, "class_labels": labels.masked_fill(dropped, self.classes), "clean": clean}
        batch |= self._noise(clean, timestep, generators, "")
        if self.tokens is not None:
            batch |= self._noise(clean, timestep, generators, MASKED)
            # Each draws one, so that what follows is the same whether a sample comes first or not.
            ratio, *_ = [draw_mask_ratio(g, *self.mask_ratio) for g in generators]
            batch["keep"] = torch.cat([draw_kept_tokens(1, self.tokens, ratio, g) for g in generators])
        return batch

    def _noise(self, clean: Tensor, step: Tensor, generators: list[torch.Generator], prefix: str) -> dict[str, Tensor]:
        noise = torch.stack([torch.randn(image.shape, generator=g) for image, g in zip(clean, generators, strict=True)])
        return {f"{prefix}hidden_states": self.scheduler.add_noise(clean, noise, step), f"{prefix}noise": noise}


def two_passes(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The passes of a batch: all tokens; and, where the batch holds one, the masked pass."""
    own = {key: value for key, value in batch.items() if key.startswith(MASKED) or key == "keep"}
    first = {key: value for key, value in batch.items() if key not in own}
    if not own:
        return [first]
    return [first, {**first, **{key.removeprefix(MASKED): value for key, value in own.items()}}]
