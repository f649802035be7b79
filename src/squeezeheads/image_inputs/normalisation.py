"""Each model gets the pixels in its own normalisation: a batch carries the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.errors import RecipeError


@dataclass(frozen=True)
class Normalisation:
    """``(x − mean) / std`` for pixels x from 0 to 1, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_channels(self, channels: int, where: str) -> Normalisation:
        """One number is for all channels.

        Raises:
            RecipeError: another number of them; names ``where``.
        """
        if {len(self.mean), len(self.std)} - {1, channels}:
            raise RecipeError(
                f"{where}: mean {list(self.mean)} and std {list(self.std)} do not fit images of {channels} channels."
            )
        mean, std = ((v * channels if len(v) == 1 else v) for v in (self.mean, self.std))
        return Normalisation(mean, std)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(…, C, H, W) from 0 to 1 → normalised."""
        mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device) for v in (self.mean, self.std))
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def converted(self, pixels: Tensor, other: Normalisation) -> Tensor:
        """Pixels in this normalisation → the same pixels in another."""
        own_mean, own_std, mean, std = (
            torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std, other.mean, other.std)
        )
        factor, shift = own_std / std, (own_mean - mean) / std
        factor, shift = (v.to(pixels.device, pixels.dtype)[:, None, None] for v in (factor, shift))
        return pixels * factor + shift


def renormalise_inputs(model: nn.Module, given: Normalisation, own: Normalisation) -> nn.Module:
    """Have a model convert its ``pixel_values`` at its entrance, from the normalisation of the batch to its own.

    A teacher then sees the image that the student sees, mixed, cropped and erased alike, as it was trained to see
    images. Nothing changes where both are equal. It is a forward pre-hook, no part of a saved model.

    Args:
        model: changed in place.
        given: how batches are normalised: for the student.
        own: how the model was trained.

    Returns:
        The model.
    """
    if given != own:
        model.register_forward_pre_hook(_Renormalise(given, own), with_kwargs=True)
    return model


class _Renormalise:
    def __init__(self, given: Normalisation, own: Normalisation) -> None:
        self.given, self.own = given, own

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (self.given.converted(args[0], self.own), *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": self.given.converted(kwargs["pixel_values"], self.own)}


def normalisation_of(processor: Any) -> Normalisation:
    """What an image processor does after scaling pixels to 0 … 1: nothing, where it is told not to.

    Raises:
        RecipeError: it does what no mean and standard deviation say.
    """
    for option, usual in (("do_rescale", True), ("rescale_offset", False), ("do_flip_channel_order", False)):
        given = getattr(processor, option, None)
        if given is not None and given != usual:
            raise RecipeError(
                f"{type(processor).__name__} has {option}={given}: models get pixels from 0 to 1 here, in the order "
                "red, green, blue, less a mean and divided by a standard deviation. Choose another pretrained model."
            )
    if not getattr(processor, "do_normalize", True):
        return Normalisation((0.0,), (1.0,))
    mean, std = (v if isinstance(v, list | tuple) else [v] for v in (processor.image_mean, processor.image_std))
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
