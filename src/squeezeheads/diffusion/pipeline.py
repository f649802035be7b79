"""Images from a denoiser: a diffusers pipeline that saves and loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput
from torch import Tensor, nn

SAMPLERS = ("ddim", "dpm", "ddpm")


class ClassConditionalPipeline(DiffusionPipeline):
    """Class-conditional images in pixel space, or through an ``AutoencoderKL`` from its latents, with classifier-free
    guidance. ``save_pretrained`` and ``from_pretrained`` as of any diffusers pipeline.

    diffusers' own ``DiTPipeline`` takes the same models where there is an autoencoder and 1,000 classes: it takes no
    other label for "no class" than 1000, and no model without an autoencoder.

    Args:
        transformer: ``DiTTransformer2DModel`` or ``MDTTransformer2DModel``.
        scheduler: any of diffusers that goes by predicted noise. A DDIM that clips takes for a sample's noise what the
            clipped image leaves of it, which diffusers does on request alone.
        vae: ``None`` in pixel space.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: nn.Module, scheduler: Any, vae: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image a label.

        Args:
            class_labels: B classes.
            guidance_scale: s in ε(no class) + s · (ε(class) − ε(no class)); 1 takes ε(class) alone.
            num_inference_steps: steps of the scheduler.
            generator: one, or one an image: then an image does not depend on what else is in the batch.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), values from 0 to 1.

        Raises:
            ValueError: a class that there is not, an unknown ``output_type``.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is unknown: expected pil, np or pt.")
        from diffusers.utils.torch_utils import randn_tensor

        options = self.transformer.config
        classes, channels, size = options.num_embeds_ada_norm, options.in_channels, options.sample_size
        device, dtype = self.transformer.device, self.transformer.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the steps: bfloat16 would round small ones away
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels={labels.tolist()}: expected at least one class from 0 to {classes - 1}.")
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, classes)])
        shape = (len(labels) // (2 if guided else 1), channels, size, size)
        images = randn_tensor(shape, generator=generator, device=device, dtype=exact)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        images = images * self.scheduler.init_noise_sigma
        takes_variance = str(self.scheduler.config.get("variance_type")).startswith("learned")
        extra = _step_options(self.scheduler, generator)
        for step in self.progress_bar(self.scheduler.timesteps):
            given = self.scheduler.scale_model_input(torch.cat([images, images]) if guided else images, step)
            out = self.transformer(given.to(dtype), timestep=step.expand(len(given)), class_labels=labels).sample
            out = out.to(exact)
            noise, rest = out[:, :channels], out[:, channels:]
            if guided:
                with_class, without = noise.chunk(2)
                noise, rest = without + guidance_scale * (with_class - without), rest.chunk(2)[0]
            predicted = torch.cat([noise, rest], 1) if takes_variance else noise
            images = self.scheduler.step(predicted, step, images, **extra).prev_sample
        if self.vae is not None:
            images = self.vae.decode((images / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (images / 2 + 0.5).clamp(0, 1).float()
        self.maybe_free_model_hooks()
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=arrays if output_type == "np" else self.numpy_to_pil(arrays))


def make_sampler(name: str, noising: DDPMScheduler, learned_variance: bool, pixels: bool) -> Any:
    """A scheduler for sampling, with the noise schedule of training.

    Args:
        name: "ddim" (deterministic), "dpm" (multistep DPM-Solver++), "ddpm" (ancestral; with the learned variance where
            there is one).
        noising: the scheduler of training.
        learned_variance: whether the model predicts v.
        pixels: images lie between −1 and 1, and are kept there.

    Raises:
        ValueError: an unknown name.
    """
    if name == "ddim":
        return DDIMScheduler.from_config(noising.config, clip_sample=pixels, set_alpha_to_one=True)
    if name == "dpm":
        # Kept in bounds by a quantile of each image's values, which DPM-Solver++ has in place of clipping.
        return DPMSolverMultistepScheduler.from_config(noising.config, thresholding=pixels, variance_type=None)
    if name == "ddpm":
        kind = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler.from_config(noising.config, clip_sample=pixels, variance_type=kind)
    raise ValueError(f"sampler={name!r} is unknown: expected {', '.join(SAMPLERS)}.")


def generate(
    pipeline: ClassConditionalPipeline, labels: Tensor, *, guidance: float, steps: int, seed: int, batch_size: int
) -> Tensor:
    """(n, C, H, W) images from 0 to 1 on the CPU, one a label; the same for every batch size."""
    options: Any = {"guidance": guidance, "steps": steps, "seed": seed, "batch_size": batch_size}
    return torch.cat(list(generate_batches(pipeline, labels, **options)))


def generate_batches(
    pipeline: ClassConditionalPipeline, labels: Tensor, *, guidance: float, steps: int, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """The images of ``generate``, ``batch_size`` at a time, each made when it is asked for."""
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        generators = [torch.Generator().manual_seed(_seed(seed, start + i)) for i in range(len(part))]
        yield pipeline(part, guidance, steps, generators, output_type="pt").images.cpu()


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**32


def _step_options(scheduler: Any, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
    """What a step of this scheduler is given beside prediction, timestep and images."""
    import inspect

    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in known else {}
    # Where DDIM clips the clean image, the noise has to be what is left of the sample beside the clipped one, as in its
    # public code. With the predicted noise, which belongs to the image before clipping, each step that clips shifts the
    # sample away from all that the model has seen, the more so the stronger the guidance.
    clips = scheduler.config.get("clip_sample") or scheduler.config.get("thresholding")
    if clips and "use_clipped_model_output" in known:
        options["use_clipped_model_output"] = True
    return options
