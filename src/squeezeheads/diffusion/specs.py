"""What a recipe says of noise and of samples. Needs nothing of the extra ``diffusion``: `--help` is without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LEAST_IMAGES = 4
"""Images that precision and recall need: one, and its three nearest others."""


@dataclass
class DiffusionSpec:
    """How images are noised and what a denoiser is trained by."""

    steps: int = 1000
    """Steps T of the noise schedule."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule, by diffusers' names."""
    beta_start: float = 0.0001
    """Noise variance of the first step (of the schedules that have ends)."""
    beta_end: float = 0.02
    """Noise variance of the last step."""
    learned_variance: bool = True
    """Whether new models predict the variance of a step beside the noise."""
    variational_weight: float = 0.001
    """Factor of T times the variational term (bits per element), which trains the learned variance; 0 leaves it out."""
    min_snr: float = 0.0
    """k of the Min-SNR weight min(SNR, k) / SNR of the squared error; MDTv2 takes 5. 0 weighs all steps alike."""
    label_drop: float = 0.1
    """Probability that a training image is without its label, for classifier-free guidance."""
    mask_ratio: list[float] = field(default_factory=lambda: [0.3, 0.5])
    """Where the student is an MDT: between which shares of tokens the second pass of a batch masks. [] leaves that pass
    out."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what is saved and measured; DiT takes 0.9999 with long
    training. 0: the weights themselves."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}: expected at least 2.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end}: expected 0 < beta_start ≤ beta_end < 1."
            )
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop={self.label_drop}: expected a probability of less than 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number below 1, or 0 for no average.")
        if self.mask_ratio and (len(self.mask_ratio) != 2 or not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1):
            raise ValueError(f"mask_ratio={self.mask_ratio}: expected two shares [low, high] from 0 to below 1, or [].")
        if not self.variational_weight >= 0:
            raise ValueError(f"variational_weight={self.variational_weight}: expected at least 0.")
        if not self.min_snr >= 0:
            raise ValueError(f"min_snr={self.min_snr}: expected a positive number, or 0 for no weights.")


@dataclass
class SamplingSpec:
    """How images are generated, and how they are measured."""

    sampler: Literal["ddim", "dpm", "ddpm"] = "ddim"
    """diffusers' scheduler: DDIM, DPM-Solver++, or ancestral sampling with the learned variance."""
    steps: int = 50
    """Steps of the sampler."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is without."""
    seed: int = 0
    """Of the noise that images start from."""
    batch_size: int = 64
    """Images generated at a time; the images do not depend on it."""
    images: int | Literal["all"] = "all"
    """Images generated for the metrics, evenly over the classes, compared with as many of the test split, likewise
    evenly; all: as many as the test split has. 0 leaves those metrics out."""
    features: str | None = "pixels"
    """Features of the Fréchet distance, precision and recall: "pixels", or folder or hub name of a vision model of
    transformers. null leaves these metrics out: for large images without such a model, because memory grows with the
    square of the number of features."""
    inception: bool = False
    """Also FID, sFID and Inception score, where torch-fidelity and its weights are installed."""
    grid_every: int = 0
    """Steps of training between grids of samples under figures/training; 0 draws one at the end alone."""
    grid_columns: int = 8
    """Images of each class in a grid."""

    def __post_init__(self) -> None:
        if self.features == "None":  # so jsonargparse hands on the null of a command line, this deep in a recipe
            self.features = None
        for name in ("steps", "batch_size", "grid_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("grid_every", "guidance", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0.")
        if self.images != "all" and self.images != 0 and self.images < LEAST_IMAGES:
            raise ValueError(
                f"images={self.images}: expected at least {LEAST_IMAGES} (each has a third nearest other), 0 for no "
                "metrics of images, or all."
            )
