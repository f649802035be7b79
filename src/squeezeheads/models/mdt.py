"""MDTv2, the masked diffusion transformer (Gao et al., arXiv 2303.14389), built from its published description.

A diffusion transformer that is also trained on images with a part of their tokens taken away. Letters: ``B`` samples,
``C`` channels, ``N`` tokens of an image, ``M`` tokens that run, ``H`` heads, ``D`` width of a head, ``E`` width of the
model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

# Of the published models: DiT's layers, widths and heads, four layers of the decoder.
MDT_SIZES: dict[str, dict[str, int]] = {
    name: {
        "num_layers": layers,
        "num_decoder_layers": 4,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": 2,
    }
    for name, layers, width, heads in (
        ("S/2", 12, 384, 6),
        ("B/2", 12, 768, 12),
        ("L/2", 24, 1024, 16),
        ("XL/2", 28, 1152, 16),
    )
}
"""Constructor arguments of each published size: ``MDTTransformer2DModel(**MDT_SIZES["S/2"], out_channels=8)``."""

FREQUENCIES = 256  # width of the sinusoidal embedding of the timestep, as in DiT


class MDTTransformer2DModel(ModelMixin, ConfigMixin):
    """MDTv2. Called, saved and loaded as ``diffusers.DiTTransformer2DModel`` is, and it can stand in its place.

    The encoder is two halves: each layer of the second takes in, through a linear layer on the two side by side, what
    a layer of the first put out, the last one first. Each layer of the decoder takes in the embedded image in the same
    way. Every attention layer has a learned bias for each offset between two tokens and each head. In a masked pass the
    encoder sees the kept tokens alone; the side-interpolater, one layer that only this pass runs, fills in the others
    before the decoder.

    The model draws nothing at random: labels are dropped, and tokens masked, by whoever calls it. So teacher and
    student can be given the same.

    Args:
        num_attention_heads: ``H``.
        attention_head_dim: ``D``; the width of the model is ``E = H · D``, a multiple of 4.
        in_channels: channels of the (noisy) image or latent.
        out_channels: as ``in_channels`` by default; twice as many where the variance is learned.
        num_layers: layers of encoder and decoder together, without the side-interpolater.
        num_decoder_layers: how many of them are the decoder's. An even number has to be left for the encoder.
        mlp_ratio: width of the feed-forward layers over ``E``.
        attention_bias: whether the projections to query, key and value have biases.
        relative_position_bias: whether attention has the learned bias. MDTv2 has it.
        sample_size: height and width of the image, a multiple of ``patch_size``. ``N = (sample_size / patch_size)²``.
        patch_size: height and width of a token's patch.
        activation_fn: of the feed-forward layers, by diffusers' names.
        num_embeds_ada_norm: number of classes. One more label, ``num_embeds_ada_norm`` itself, stands for no class.
        norm_eps: added to the variance in layer norms.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "relative_position_bias"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_decoder_layers: int = 4,
        mlp_ratio: float = 4.0,
        attention_bias: bool = True,
        relative_position_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        _check_sizes(width, num_layers, num_decoder_layers, sample_size, patch_size)
        self.out_channels = in_channels if out_channels is None else out_channels
        # DiTPipeline compares it with in_channels to see whether the variance is learned.
        self.register_to_config(out_channels=self.out_channels)
        self.grid_size = sample_size // patch_size
        self.gradient_checkpointing = False
        tokens = self.grid_size**2

        self.patch_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width, pos_embed_type=None)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.time_proj = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, width)
        self.class_embedder = nn.Embedding(num_embeds_ada_norm + 1, width)

        def layer(skip: bool) -> MDTBlock:
            return MDTBlock(
                width,
                num_attention_heads,
                mlp_ratio=mlp_ratio,
                attention_bias=attention_bias,
                activation_fn=activation_fn,
                norm_eps=norm_eps,
                offsets=(2 * self.grid_size - 1) ** 2 if relative_position_bias else None,
                skip=skip,
            )

        half = (num_layers - num_decoder_layers) // 2
        self.encoder_in_blocks = nn.ModuleList(layer(skip=False) for _ in range(half))
        self.encoder_out_blocks = nn.ModuleList(layer(skip=True) for _ in range(half))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.side_block = layer(skip=False)
        self.decoder_blocks = nn.ModuleList(layer(skip=True) for _ in range(num_decoder_layers))

        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=norm_eps)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)

        self.register_buffer("offset_index", _offset_index(self.grid_size), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights as DiT has them, so that every layer starts as the identity (up to its skip) and the output
        at 0: Xavier for linear layers, sines and cosines for positions, 0 for all modulations and the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MDTAttention):
                module.reset_parameters()
            elif isinstance(module, MDTBlock):
                nn.init.zeros_(module.modulation.weight)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)
        positions = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.grid_size, base_size=self.grid_size)
        for embedding in (self.pos_embed, self.decoder_pos_embed):
            embedding.copy_(positions[None])
        for small in (
            self.timestep_embedder.linear_1.weight,
            self.timestep_embedder.linear_2.weight,
            self.class_embedder.weight,
            self.mask_token,
        ):
            nn.init.normal_(small, std=0.02)
        nn.init.zeros_(self.modulation_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        *,
        keep: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            hidden_states: (B, in_channels, sample_size, sample_size), noisy images or latents.
            timestep: (B,).
            class_labels: (B,) int64; ``num_embeds_ada_norm`` for no class.
            keep: (B, M) int64: a masked pass, in which the encoder sees these tokens of each sample alone (row by row
                over the grid, from 0; see ``draw_kept_tokens``). Their order means nothing: they run in ascending
                order. ``None``: all tokens, without the side-interpolater. With all tokens kept, a masked pass puts
                out exactly what an unmasked one does: the side-interpolater changes masked tokens only.
            return_dict: a ``Transformer2DModelOutput`` if true, else a tuple of its one tensor.

        Returns:
            ``sample`` (B, out_channels, sample_size, sample_size).

        Raises:
            ValueError: shapes that do not fit; labels or tokens that do not exist, or a token kept twice. Values are
                looked at where they lie on the CPU; on another device each look would stop it.
        """
        self._check_inputs(hidden_states, timestep, class_labels, keep)
        frequencies = self.time_proj(timestep).to(hidden_states.dtype)
        condition = self.timestep_embedder(frequencies) + self.class_embedder(class_labels)
        embedded = self.patch_embed(hidden_states) + self.pos_embed

        if keep is None:
            tokens = self._encode(embedded, condition, self.offset_index) + self.decoder_pos_embed
        else:
            keep = keep.to(embedded.device).sort(dim=1).values
            # (B, M, M): one lookup for all layers of the pass.
            offsets = self.offset_index[keep[:, :, None], keep[:, None, :]]
            places = keep[:, :, None].expand(-1, -1, embedded.shape[-1])
            tokens = self._encode(embedded.gather(1, places), condition, offsets)
            tokens = self._interpolate(tokens, condition, keep, places)

        for block in self.decoder_blocks:
            tokens = self._run(block, tokens, condition, self.offset_index, embedded)

        shift, scale = self.modulation_out(F.silu(condition))[:, None].chunk(2, dim=-1)
        sample = self._to_image(self.proj_out(self.norm_out(tokens) * (1 + scale) + shift))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _encode(self, tokens: Tensor, condition: Tensor, offsets: Tensor) -> Tensor:
        """(B, M, E) → (B, M, E)."""
        passed: list[Tensor] = []
        for block in self.encoder_in_blocks:
            tokens = self._run(block, tokens, condition, offsets)
            passed.append(tokens)
        for block in self.encoder_out_blocks:
            tokens = self._run(block, tokens, condition, offsets, passed.pop())
        return tokens

    def _interpolate(self, tokens: Tensor, condition: Tensor, keep: Tensor, places: Tensor) -> Tensor:
        """The kept tokens (B, M, E), and what the side-interpolater makes of the mask token at the other places:
        (B, N, E), with the decoder's positions."""
        batch, everywhere = tokens.shape[0], self.decoder_pos_embed.shape[1]
        filled = self.mask_token.to(tokens.dtype).expand(batch, everywhere, -1).scatter(1, places, tokens)
        filled = filled + self.decoder_pos_embed
        guessed = self._run(self.side_block, filled, condition, self.offset_index)
        masked = torch.ones(batch, everywhere, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
        return torch.where(masked[:, :, None], guessed, filled)

    def _run(
        self, block: nn.Module, tokens: Tensor, condition: Tensor, offsets: Tensor, skip: Tensor | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, tokens, condition, offsets, skip)
        return block(tokens, condition, offsets, skip)

    def _to_image(self, tokens: Tensor) -> Tensor:
        """(B, N, patch · patch · C) → (B, C, sample_size, sample_size)."""
        grid, patch = self.grid_size, self.config.patch_size
        tokens = tokens.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, (grid, grid))
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), self.out_channels, grid * patch, grid * patch)

    def _check_inputs(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, keep: Tensor | None) -> None:
        size, classes = self.config.sample_size, self.config.num_embeds_ada_norm
        expected = (self.config.in_channels, size, size)
        if hidden_states.dim() != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}, expected (B, in_channels, sample_size, "
                f"sample_size) = (B, {', '.join(map(str, expected))}). The relative positions are learned for one size."
            )
        batch = hidden_states.shape[0]
        for name, value in (("timestep", timestep), ("class_labels", class_labels)):
            if tuple(value.shape) != (batch,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one for each sample: ({batch},).")
        if class_labels.device.type == "cpu" and not _within(class_labels, classes + 1):
            raise ValueError(
                f"class_labels holds {class_labels.min().item()} to {class_labels.max().item()}, but this model has "
                f"the classes 0 to {classes - 1}, and {classes} for no class."
            )
        if keep is None:
            return
        tokens = self.grid_size**2
        if keep.dtype != torch.int64 or keep.dim() != 2 or keep.shape[0] != batch or not 1 <= keep.shape[1] <= tokens:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)} and dtype {keep.dtype}, expected (B, kept) of torch.int64 with "
                f"{batch} samples and 1 to {tokens} tokens, as draw_kept_tokens({batch}, {tokens}, ratio) gives it."
            )
        if keep.device.type != "cpu":
            return
        if not _within(keep, tokens):
            raise ValueError(
                f"keep holds {keep.min().item()} to {keep.max().item()}, but an image has the tokens 0 to {tokens - 1}."
            )
        if (keep.sort(dim=1).values.diff(dim=1) == 0).any():
            raise ValueError("keep names a token twice in one sample. draw_kept_tokens draws without replacement.")


class MDTBlock(nn.Module):
    """One layer: attention and feed-forward, each scaled, shifted and gated by the condition (adaLN-zero).

    Args:
        width: ``E``.
        heads: ``H``.
        offsets: number of offsets that the position bias tells apart; ``None`` for no bias.
        skip: whether it takes in a second sequence, through a linear layer on the two side by side.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float,
        attention_bias: bool,
        activation_fn: str,
        norm_eps: float,
        offsets: int | None,
        skip: bool,
    ) -> None:
        super().__init__()
        self.skip_proj = nn.Linear(2 * width, width) if skip else None
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=norm_eps)
        self.attn = MDTAttention(width, heads, attention_bias, offsets)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(width, activation_fn=activation_fn, inner_dim=int(width * mlp_ratio))

    def forward(self, tokens: Tensor, condition: Tensor, offsets: Tensor, skip: Tensor | None = None) -> Tensor:
        """tokens, skip (B, M, E); condition (B, E); offsets (M, M) or (B, M, M) → (B, M, E)."""
        if self.skip_proj is not None:
            tokens = self.skip_proj(torch.cat([tokens, skip], dim=-1))  # type: ignore[list-item]
        modulation = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        tokens = tokens + gate * self.attn(self.norm1(tokens) * (1 + scale) + shift, offsets)
        return tokens + gate_ff * self.ff(self.norm2(tokens) * (1 + scale_ff) + shift_ff)


class MDTAttention(nn.Module):
    """Self-attention with a learned bias for each head and each offset between two tokens."""

    def __init__(self, width: int, heads: int, attention_bias: bool, offsets: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=attention_bias)
        self.to_k = nn.Linear(width, width, bias=attention_bias)
        self.to_v = nn.Linear(width, width, bias=attention_bias)
        self.to_out = nn.Linear(width, width)
        # Heads first, so that a lookup gives (H, …, M, M) as the kernel wants it, without a copy.
        self.relative_position_bias = None if offsets is None else nn.Parameter(torch.empty(heads, offsets))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT draws query, key and value as one matrix (3E, E): the bound of Xavier's range is that of its shape."""
        for projection in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
        if self.relative_position_bias is not None:
            nn.init.trunc_normal_(self.relative_position_bias, std=0.02)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """tokens (B, M, E); offsets (M, M) or (B, M, M), indices of the bias → (B, M, E)."""
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        bias = None
        if self.relative_position_bias is not None:
            bias = self.relative_position_bias.to(query.dtype)[:, offsets]
            bias = bias[None] if offsets.dim() == 2 else bias.transpose(0, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _offset_index(grid: int) -> Tensor:
    """(N, N): which of the (2·grid − 1)² offsets lies between query and key: ``(dy + grid − 1) · (2·grid − 1) + dx +
    grid − 1``, with dy and dx the query's row and column less the key's."""
    place = torch.arange(grid)
    row, column = place.repeat_interleave(grid), place.repeat(grid)
    dy, dx = row[:, None] - row, column[:, None] - column
    return (dy + grid - 1) * (2 * grid - 1) + dx + grid - 1


def _within(values: Tensor, end: int) -> bool:
    """Whether all integers are in [0, end)."""
    return values.numel() == 0 or bool((values.min() >= 0) & (values.max() < end))


def _check_sizes(width: int, layers: int, decoder_layers: int, sample_size: int, patch_size: int) -> None:
    if width % 4:
        raise ValueError(
            f"num_attention_heads · attention_head_dim = {width}: the positions need a width that is a multiple of 4."
        )
    encoder_layers = layers - decoder_layers
    if decoder_layers < 0 or encoder_layers < 2 or encoder_layers % 2:
        raise ValueError(
            f"num_layers={layers} with num_decoder_layers={decoder_layers} leaves {encoder_layers} layers for the "
            "encoder: it needs an even number, two at least, because each layer of its second half takes in one of "
            "its first."
        )
    if patch_size < 1 or sample_size < patch_size or sample_size % patch_size:
        raise ValueError(f"sample_size={sample_size} is no multiple of patch_size={patch_size}.")
