"""Models that no library ships: MDTv2. Needs the extra ``diffusion``."""

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"squeezeheads.models needs the package {error.name!r}: pip install 'squeezeheads[diffusion]'.", name=error.name
    ) from error

from squeezeheads.models.masking import draw_kept_tokens, draw_mask_ratio
from squeezeheads.models.mdt import MDT_SIZES, MDTTransformer2DModel

__all__ = ["MDT_SIZES", "MDTTransformer2DModel", "draw_kept_tokens", "draw_mask_ratio"]
