"""What a denoiser is trained by: the squared error of its noise, and the variational term of a learned variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

OPEN_ENDED = 0.999
"""Clean values beyond ±0.999 count as the first or last level, whose bin has no outer end (as in the source)."""


class DiffusionLoss(nn.Module):
    """Loss of a model that predicts noise ε, and optionally a variance, under a schedule of T steps.

    A sample's loss is ``w_t · mean((ε̂ − ε)²)``, mean over elements; with a learned variance plus
    ``variational_weight · T · L_t``. ``L_t`` is the term of step t in the variational bound, in **bits per element**
    (mean over elements, divided by ln 2): for t > 0 the KL between the true posterior q(x_{t−1} | x_t, x_0) and the
    model's Gaussian, for t = 0 the negative log-likelihood of the clean value's level under it. The predicted mean
    is detached there: the term trains the variance alone. With 1,000 steps and a weight of 0.001 the factor is 1, as in
    DiT.

    The model's log-variance is ``v' log β_t + (1 − v') log β̃_t`` with ``v' = (v + 1) / 2``, v being the second half of
    its channels and β̃_t the posterior's variance (that of step 1 at step 0, where it is 0).

    Min-SNR: ``w_t = min(SNR_t, k) / SNR_t``, ``SNR_t = ᾱ_t / (1 − ᾱ_t)``; it weighs the squared error alone.

    Args:
        betas: (T,) noise variance of each step, for example of a diffusers scheduler.
        variational_weight: factor of T · L_t; 0 leaves it out.
        min_snr: k; ``None`` weighs all steps alike.
        levels: equally spaced values that clean elements take between −1 and 1, for t = 0 (256 for bytes). Latents take
            no such levels; they are treated as bytes, as in DiT.

    Raises:
        ValueError: betas outside (0, 1), fewer than 2 of them, a weight or k that makes no sense.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; Nichol, Dhariwal, "Improved
    Denoising Diffusion Probabilistic Models", arXiv 2102.09672 (learned variance); Hang et al., "Efficient Diffusion
    Training via Min-SNR Weighting Strategy", arXiv 2303.09556. The normal distribution function at t = 0 is exact here;
    the public code approximates it by a tanh.
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        variational_weight: float = 0.001,
        min_snr: float | None = None,
        levels: int = 256,
    ) -> None:
        super().__init__()
        betas = betas.detach().double().cpu()
        if betas.dim() != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas {tuple(betas.shape)}: expected at least 2 numbers between 0 and 1.")
        if not (math.isfinite(variational_weight) and variational_weight >= 0):
            raise ValueError(f"variational_weight={variational_weight!r}: expected a finite number of at least 0.")
        if min_snr is not None and not min_snr > 0:
            raise ValueError(f"min_snr={min_snr!r}: expected a positive number, or null for none.")
        if levels < 2:
            raise ValueError(f"levels={levels!r}: expected at least 2.")
        self.steps = len(betas)
        self.variational_weight = variational_weight
        self.min_snr = min_snr
        self.levels = levels
        kept = (1 - betas).cumprod(0)  # ᾱ
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]
        snr = kept / (1 - kept)
        # Float64, because they are made once; each is used in the prediction's type.
        tables = {
            "error_weight": torch.ones_like(snr) if min_snr is None else snr.clamp(max=min_snr) / snr,
            "log_beta": betas.log(),
            "log_posterior": posterior.log(),
            # x_t is made of clean values and noise, so the posterior means differ by a multiple of the noise's error.
            "mean_of_noise": betas / ((1 - betas) * (1 - kept)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, prediction: Tensor, noise: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        """Each sample's loss (B,).

        Args:
            prediction: (B, C, H, W) noise, or (B, 2C, H, W) with v.
            noise: (B, C, H, W) that the noisy image was made with.
            clean: (B, C, H, W) the image.
            timestep: (B,) from 0 to T − 1.

        Raises:
            ValueError: a prediction of other channels.
        """
        channels = noise.shape[1]
        if prediction.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model predicts {prediction.shape[1]} channels for images of {channels}: expected {channels}, or "
                f"{2 * channels} with a learned variance."
            )
        prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
        guess = prediction[:, :channels]
        loss = self._at("error_weight", timestep, noise)[:, 0, 0, 0] * (guess - noise).square().flatten(1).mean(1)
        if self.variational_weight and prediction.shape[1] == 2 * channels:
            bound = self.variational_term(guess.detach(), prediction[:, channels:], noise, clean, timestep)
            loss = loss + self.variational_weight * self.steps * bound
        return loss

    def variational_term(self, guess: Tensor, v: Tensor, noise: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        """L_t of each sample (B,), bits per element, differentiable in the predicted noise ``guess`` and in ``v``; both
        (B, C, H, W)."""
        share = (v + 1) / 2
        low, high = self._at("log_posterior", timestep, v), self._at("log_beta", timestep, v)
        log_variance = share * high + (1 - share) * low
        offset = self._at("mean_of_noise", timestep, v) * (noise - guess)  # model's mean less the true one
        nats = 0.5 * (log_variance - low + (low - log_variance).exp() + offset.square() * (-log_variance).exp() - 1)
        first = timestep == 0
        if first.any():
            likelihood = self._level_nats(offset[first], log_variance[first], clean[first])
            nats = nats.index_put((first,), likelihood.to(nats.dtype))
        return nats.flatten(1).mean(1) / math.log(2)

    def _level_nats(self, offset: Tensor, log_variance: Tensor, clean: Tensor) -> Tensor:
        """−log of the probability that a Gaussian around ``clean + offset`` gives the level of ``clean``, per element.
        At step 0 the posterior's mean is the clean image itself."""
        half = 1 / (self.levels - 1)
        deviation = (0.5 * log_variance.double()).exp()
        lower, upper = (-half - offset.double()) / deviation, (half - offset.double()) / deviation
        # Both ends on the side where the distribution function is small: nothing is lost in their difference.
        flip = lower + upper > 0
        lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        below, above = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
        inside = above + (-torch.expm1(below - above)).log()
        at_bottom = torch.special.log_ndtr((half - offset.double()) / deviation)
        at_top = torch.special.log_ndtr((half + offset.double()) / deviation)
        return -torch.where(clean < -OPEN_ENDED, at_bottom, torch.where(clean > OPEN_ENDED, at_top, inside))

    def _at(self, name: str, timestep: Tensor, like: Tensor) -> Tensor:
        """A table's entries for these steps, (B, 1, 1, 1)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.get_buffer(name)[timestep].to(dtype)[:, None, None, None]
