"""A vision model that is asked about images: for features, or for classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezeheads.errors import RecipeError, in_short
from squeezeheads.image_inputs.normalisation import Normalisation
from squeezeheads.image_inputs.processing import View, own_processor
from squeezeheads.named_models import check_attention, find_config


class ImageModel(nn.Module):
    """A vision model of transformers that is given images from 0 to 1 as it was trained on them.

    Size, mean and deviation are those of the folder's image processor. Without one, images are scaled to −1 … 1 (as the
    image classifiers of this package are trained). Grey images are repeated for models that take three channels.

    Args:
        path: folder or hub name; safetensors alone.
        classifies: with its head: logits; otherwise features, the mean over its last tokens or positions.

    Raises:
        RecipeError: it cannot be loaded, a classifier lacks weights, or its image processor says what is not
            understood here.
    """

    def __init__(self, path: str, *, classifies: bool) -> None:
        super().__init__()
        from transformers import AutoModel, AutoModelForImageClassification

        kind = AutoModelForImageClassification if classifies else AutoModel
        try:
            # No attention is asked for, since not every vision model has one; and none is taken from the folder.
            check_attention(find_config(path)._attn_implementation or "sdpa")
            model, found = kind.from_pretrained(
                path, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"{path}: cannot be loaded as a vision model: {error}") from error
        missing = sorted(found["missing_keys"])
        if classifies and missing:
            raise RecipeError(
                f"{path}: {missing[0]} and {len(missing) - 1} more weights are not in the file; random ones would "
                "judge. Name a model that was trained to classify."
            )
        self.model = model.eval()
        self.classifies = classifies
        self.channels = int(getattr(self.model.config, "num_channels", 3))
        processor = own_processor(path)
        self.normalisation, self.size = Normalisation((0.5,), (0.5,)), getattr(self.model.config, "image_size", None)
        if processor is not None:
            view = View(processor, self.channels, white=255)
            self.normalisation, self.size = view.normalisation, view.size

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return int(self.model.config.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) from 0 to 1 → (B, classes) logits or (B, F) features."""
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        size = [self.size, self.size] if isinstance(self.size, int) else self.size
        if size is not None and list(images.shape[2:]) != list(size):
            images = F.interpolate(images, list(size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        outputs = self.model(pixel_values=self.normalisation(images))
        if self.classifies:
            return outputs.logits
        states = outputs.last_hidden_state
        return states.mean(1) if states.dim() == 3 else states.flatten(2).mean(2)


def load_judge(path: str, image_shape: tuple[int, int], key: str, *, classifies: bool) -> ImageModel:
    """A vision model that was tried on one image: not every model that can be loaded takes images.

    Args:
        path: folder or hub name.
        image_shape: channels, and height and width, of the images that it is to judge.
        key: where the path stands in the recipe, for messages.
        classifies: as for ``ImageModel``.

    Raises:
        RecipeError: it cannot be loaded, or takes no such images; names ``key``.
    """
    channels, size = image_shape
    try:
        model = ImageModel(path, classifies=classifies)
        with torch.no_grad():
            model(torch.zeros(1, channels, size, size))
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from error
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise RecipeError(
            f"{key}={path!r} cannot judge images of {channels} × {size} × {size}: {in_short(error)} Name a vision "
            "model of transformers."
        ) from error
    return model
