"""A diffusers transformer as the rest of the package sees a model: one call gives loss, prediction, hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from squeezeheads.diffusion.loss import DiffusionLoss
from squeezeheads.models import MDTTransformer2DModel
from squeezeheads.named_models import looking_for


@dataclass
class DenoiserConfig:
    """What a denoiser is made by."""

    model_type: str
    """A key of ``model_types``."""
    options: dict[str, Any] = field(default_factory=dict)
    """The arguments of that class, all of them."""


@dataclass
class DenoiserOutput(BaseOutput):
    """What ``Denoiser`` returns."""

    logits: Tensor | None = None
    """(B, out, H, W): predicted noise, then v where the variance is learned. Named as objectives look for it."""
    loss: Tensor | None = None
    """Mean of the samples' losses, see ``DiffusionLoss``; ``None`` where the batch holds no noise."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, N, E) after the patch embedding and after each block, where asked for."""


class Denoiser(nn.Module):
    """A class-conditional denoiser of diffusers, ``DiTTransformer2DModel`` or ``MDTTransformer2DModel``, with its loss.

    Labels are dropped outside, so that teacher and student share it: the dropping that diffusers' label embeddings do
    in training, anew in every block, is switched off.

    ``save_pretrained`` writes the inner model's own folder, which diffusers opens without this package (MDT: with
    it).

    Args:
        model: the inner model.
        loss: ``None`` for a model that is only asked for predictions.
    """

    each_layer_once = True
    """For ``Distillation``: passes may run other layers (MDT's masked pass): planned ones are known by their path."""

    def __init__(self, model: nn.Module, loss: DiffusionLoss | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        kind, config = model_type_of(model), dict(model.config)  # type: ignore[arg-type]
        self.config = DenoiserConfig(kind, {key: value for key, value in config.items() if not key.startswith("_")})
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        noise: Tensor | None = None,
        clean: Tensor | None = None,
        keep: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> DenoiserOutput:
        """Predict the noise.

        Args:
            hidden_states: (B, C, H, W) noisy images.
            timestep: (B,) step of each.
            class_labels: (B,) classes; the number of classes stands for none.
            noise: (B, C, H, W) what was added; asks for the loss.
            clean: (B, C, H, W) the images without it; goes with ``noise``.
            keep: (B, kept) token indices of a masked pass; MDT alone.
            output_hidden_states: whether tokens after the embedding and each block are returned.
        """
        masked = {} if keep is None else {"keep": keep}
        noisy = hidden_states.to(self.dtype)  # a teacher may be held in bfloat16; batches are float32
        with self._watching(output_hidden_states) as states:
            prediction = self.model(noisy, timestep=timestep, class_labels=class_labels, **masked).sample
        loss = None
        if noise is not None and clean is not None and self.loss is not None:
            loss = self.loss(prediction, noise, clean, timestep).mean()
        return DenoiserOutput(logits=prediction, loss=loss, hidden_states=tuple(states) or None)

    @contextmanager
    def _watching(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Collects the tokens after the embedding and after each block."""
        states: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        modules = token_modules(self.model) if wanted else []
        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Number of parameters of the inner model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tokens(self) -> int:
        """Tokens of an image, N."""
        return (self.config.options["sample_size"] // self.config.options["patch_size"]) ** 2

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """As transformers' models have it, for the trainer.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``.

        Raises:
            ValueError: what diffusers' models cannot do: some layers alone, or offloading.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"gradient checkpointing with every_n_layers={every_n_layers}, offload={offload}: diffusers' models "
                "checkpoint every layer and keep it where it is. Leave both out."
            )
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.model.enable_gradient_checkpointing(partial(checkpoint, **options))  # type: ignore[operator]

    def activation_checkpointing_disable(self) -> None:
        """Undo it."""
        self.model.disable_gradient_checkpointing()  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        """The inner model's folder: configuration and safetensors."""
        self.model.save_pretrained(folder)  # type: ignore[operator]


def model_types() -> dict[str, type[nn.Module]]:
    """Kinds of denoisers by the names that recipes use."""
    return {"dit": DiTTransformer2DModel, "mdt": MDTTransformer2DModel}


def model_type_of(model: nn.Module) -> str:
    """The name of a model's kind.

    Raises:
        TypeError: it is none of ``model_types``.
    """
    for name, kind in model_types().items():
        if isinstance(model, kind):
            return name
    kinds = ", ".join(kind.__name__ for kind in model_types().values())
    raise TypeError(f"{type(model).__name__} is no denoiser that is known here: expected one of {kinds}.")


def build_model(config: DenoiserConfig) -> nn.Module:
    """A new inner model, initialised as the source does."""
    model = model_types()[config.model_type](**config.options)
    if config.model_type == "dit":
        initialise_dit(model)
    return model


def load_config(path: str) -> tuple[DenoiserConfig, dict[str, str]]:
    """The configuration in a folder or on the hub, of a model or of a pipeline around one; and where in it the model
    is, as options of ``from_pretrained``.

    Raises:
        OSError: there is none.
        ValueError: another kind of model.
    """
    pipeline = (Path(path) / "model_index.json").is_file()
    where = {"subfolder": "transformer"} if pipeline else {}
    with looking_for(path):
        try:
            found = DiTTransformer2DModel.load_config(path, **where)
        except OSError:
            if where or Path(path).exists():
                raise
            where = {"subfolder": "transformer"}  # the hub's DiT are pipelines
            found = DiTTransformer2DModel.load_config(path, **where)
    name = found.get("_class_name")
    # DiT was saved under the name of diffusers' general transformer once.
    if name == "Transformer2DModel" and found.get("norm_type") == "ada_norm_zero":
        name = DiTTransformer2DModel.__name__
    for model_type, kind in model_types().items():
        if kind.__name__ == name:
            known: Any = kind
            options, _, _ = known.extract_init_dict(found)
            return DenoiserConfig(model_type, {k: v for k, v in options.items() if not k.startswith("_")}), where
    kinds = ", ".join(kind.__name__ for kind in model_types().values())
    raise ValueError(f"it holds a {name or json.dumps(found)[:60]}, expected one of {kinds}.")


def load_model(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A pretrained inner model: safetensors alone.

    Raises:
        OSError, ValueError: as in ``load_config``.
    """
    config, where = load_config(path)
    kind: Any = model_types()[config.model_type]
    return kind.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **where)


def token_modules(model: nn.Module) -> list[nn.Module]:
    """The modules after which tokens are hidden states, in order of execution: embedding, then blocks."""
    inner: Any = model
    if isinstance(model, MDTTransformer2DModel):
        # The side-interpolater runs in masked passes alone: it is no layer that could be counted.
        return [inner.patch_embed, *inner.encoder_in_blocks, *inner.encoder_out_blocks, *inner.decoder_blocks]
    return [inner.pos_embed, *inner.transformer_blocks]


def initialise_dit(model: nn.Module) -> None:
    """DiT's initialisation in place of PyTorch's: each block starts as the identity and the prediction as 0.

    Xavier-uniform linear layers (the patch embedding as one of them) without bias, embeddings of step and class normal
    of deviation 0.02, modulations and output 0.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, and its public code.
    """
    inner: Any = model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(inner.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(inner.pos_embed.proj.bias)
    for block in inner.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (inner.proj_out_1, inner.proj_out_2):
        nn.init.zeros_(layer.weight)
