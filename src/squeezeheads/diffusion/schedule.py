"""The noise schedule of training: made of a recipe's keys, read beside a model, compared."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler

from squeezeheads.diffusion.specs import DiffusionSpec
from squeezeheads.errors import RecipeError


def make_schedule(spec: DiffusionSpec, *, pixels: bool) -> DDPMScheduler:
    """The schedule that a recipe names.

    Args:
        pixels: images lie between −1 and 1, and samplers keep them there.
    """
    with torch.device("cpu"):  # also where a model is planned without weights
        return DDPMScheduler(
            num_train_timesteps=spec.steps,
            beta_schedule=spec.schedule,
            beta_start=spec.beta_start,
            beta_end=spec.beta_end,
            prediction_type="epsilon",
            clip_sample=pixels,
        )


def load_schedule(path: str) -> DDPMScheduler | None:
    """The noise schedule that lies beside a model, in a folder or on the hub; ``None`` where there is none.

    Raises:
        ValueError: one that cannot be read.
    """
    if Path(path).is_dir() and not (Path(path) / "scheduler").is_dir():
        return None
    try:
        found = DDPMScheduler.load_config(path, subfolder="scheduler")
    except OSError as error:
        if Path(path).is_dir():
            raise ValueError(f"{path}/scheduler: {error}") from error
        return None
    # Whichever sampler was saved: of its options, those that say how images are noised.
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type")
    return DDPMScheduler(**{name: found[name] for name in names if name in found})


def check_schedule(path: str, whose: str, mine: DDPMScheduler) -> None:
    """Whether a model was trained on the recipe's noise schedule, where one lies beside it: what it predicts on
    another's images means nothing, and nothing would fail.

    Args:
        path: the model's, folder or hub name.
        mine: the recipe's schedule.

    Raises:
        RecipeError: it was trained on another, it predicts something else than noise, or its schedule cannot be read;
            names ``whose``.
    """
    try:
        theirs = load_schedule(path)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"{whose}: its noise schedule cannot be read: {error}") from error
    if theirs is None:
        return
    if theirs.config.prediction_type != "epsilon":
        raise RecipeError(f"{whose} predicts {theirs.config.prediction_type}: expected a model that predicts noise.")
    if theirs.betas.shape != mine.betas.shape or not torch.allclose(theirs.betas, mine.betas, rtol=1e-3, atol=0):
        raise RecipeError(
            f"{whose} was trained with another noise schedule, {_described(theirs)}; the recipe's is "
            f"{_described(mine)}. Set steps, schedule, beta_start and beta_end of task.image_generation.diffusion "
            "as the model has them."
        )


def _described(scheduler: DDPMScheduler) -> str:
    options = scheduler.config
    if options.trained_betas is not None:
        return f"{options.num_train_timesteps} steps of its own"
    ends = "" if options.beta_schedule == "squaredcos_cap_v2" else f" from {options.beta_start} to {options.beta_end}"
    return f"{options.num_train_timesteps} steps, {options.beta_schedule}{ends}"
