"""Tiny models with random weights, one of each family that is recorded without a change to it.

Each row of `FAMILIES` says how to build the model, how to feed it, and how to get its attention maps without recording:
from the model's own eager attention where it has one, else from a softmax over what its projections put out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

from squeezeheads.models import MDTTransformer2DModel

WIDTH, HEADS, LAYERS, VOCABULARY = 24, 4, 2, 40
LENGTHS = (6, 3, 1)  # of the samples of a padded batch


@dataclass(frozen=True)
class Batch:
    """What a forward pass takes; `real` (B, Q) is false on padding, None where there is none."""

    inputs: dict[str, Any]
    real: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """`make(implementation)` gives the bare model; `batch(padding)` its input; `maps(family, batch)` its own maps.

    `projection` ends the paths of the modules that put out what the output projections do. `causal`: no token sees a
    later one. `paddings`: the sides on which its batches can be padded.
    """

    name: str
    make: Callable[[str], nn.Module]
    batch: Callable[[str], Batch]
    maps: Callable[[Family, Batch], list[Tensor]]
    projection: str
    causal: bool = False
    paddings: tuple[str, ...] = ("none",)

    def build(self, implementation: str = "sdpa") -> nn.Module:
        """The model in eval mode, with the same weights at each call: large enough that no two maps are alike."""
        torch.manual_seed(0)
        model = self.make(implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.3 * noise)
        return model


def run(model: nn.Module, batch: Batch) -> Tensor:
    """A forward pass; its first output."""
    torch.manual_seed(1)  # the same dropout each time
    output = model(**batch.inputs)
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def watching(model: nn.Module, ending: str):
    """Lists (module, args, kwargs, output) of each call of the modules whose path ends so."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
    handles = [
        module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        for path, module in model.named_modules()
        if path.endswith(ending)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------ maps without recording


@torch.no_grad()
def own_maps(family: Family, batch: Batch) -> list[Tensor]:
    """What transformers returns under eager attention."""
    return list(family.build("eager")(**batch.inputs, output_attentions=True).attentions)


@torch.no_grad()
def weights_needed(family: Family, batch: Batch) -> list[Tensor]:
    """Each nn.MultiheadAttention asked again, for its weights."""
    model = family.build()
    with watching(model, family.projection) as calls:
        run(model, batch)
    return [
        module(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
        for module, args, kwargs, _ in calls
    ]


@torch.no_grad()
def softmax_of_projections(family: Family, batch: Batch) -> list[Tensor]:
    """softmax(q·k / √D), from what the query and key projections put out."""
    model = family.build()
    with watching(model, ".to_q") as queries, watching(model, ".to_k") as keys:
        run(model, batch)
    maps = []
    for (_, _, _, query), (_, _, _, key) in zip(queries, keys, strict=True):
        width = query.shape[-1] // HEADS
        query, key = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (query, key))
        key = key.repeat_interleave(HEADS // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2) / width**0.5
        if family.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        if batch.real is not None:
            scores = scores.masked_fill(~batch.real[:, None, None, :], -torch.inf)
        maps.append(scores.softmax(-1))
    return maps


@torch.no_grad()
def softmax_with_position_bias(family: Family, batch: Batch) -> list[Tensor]:
    """softmax(q·k / √D + the bias of the offset between the two tokens), offset by offset."""
    model = family.build()
    with watching(model, ".attn") as calls, watching(model, ".to_q") as queries, watching(model, ".to_k") as keys:
        run(model, batch)
    size = batch.inputs["hidden_states"].shape[-1] // model.config.patch_size
    every = torch.arange(size**2).expand(len(batch.inputs["timestep"]), -1)
    keep = batch.inputs.get("keep", every).sort().values
    maps = []
    for (module, *_), (*_, query), (*_, key) in zip(calls, queries, keys, strict=True):
        query, key = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        places = (keep if query.shape[2] == keep.shape[1] else every).tolist()
        for sample, tokens in enumerate(places):
            for i, a in enumerate(tokens):
                for j, b in enumerate(tokens):
                    down, right = a // size - b // size, a % size - b % size
                    offset = (down + size - 1) * (2 * size - 1) + right + size - 1
                    scores[sample, :, i, j] += module.relative_position_bias[:, offset]
        maps.append(scores.softmax(-1))
    return maps


# --------------------------------------------------------------------------------------------- hand-written models


class Attention(nn.Module):
    """Causal self-attention as anyone writes it, with grouped queries either way.

    A `gate` scales the output before `to_out`; it is computed "before" or "after" the attention.
    """

    def __init__(
        self,
        width: int = WIDTH,
        heads: int = HEADS,
        kv_heads: int | None = None,
        enable_gqa: bool = False,
        gate: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.enable_gqa = heads, kv_heads or heads, enable_gqa
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width // heads * self.kv_heads)
        self.to_v = nn.Linear(width, width // heads * self.kv_heads)
        self.to_out = nn.Linear(width, width)
        self.gate, self.gate_linear = gate, None if gate is None else nn.Linear(width, width)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            project(x).view(batch, length, -1, width // self.heads).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        if not self.enable_gqa:
            key, value = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (key, value))
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if real is not None:
            mask = mask & real[:, None, None, :]
        gate = self.gate_linear(x).sigmoid() if self.gate == "before" else 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.enable_gqa)
        if self.gate == "after":
            gate = self.gate_linear(x).sigmoid()
        out = out.transpose(1, 2).reshape(batch, length, width) * gate
        return self.to_out(out)


class Stack(nn.Module):
    """Residual blocks of anything; `rounds` runs them again with the same weights."""

    def __init__(self, *blocks: nn.Module, rounds: int = 1) -> None:
        super().__init__()
        self.blocks, self.rounds = nn.ModuleList(blocks), rounds

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(self.rounds):
            for block in self.blocks:
                x = x + block(x, **kwargs)
        return x


class SequenceFirst(nn.Module):
    """A plain nn.MultiheadAttention, sequence first, as its defaults are; asked for no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=~real, need_weights=False)[0]


# ---------------------------------------------------------------------------------------------------------- inputs


def seeded(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real_tokens(padding: str) -> Tensor | None:
    if padding == "none":
        return None
    lengths, place = torch.tensor(LENGTHS)[:, None], torch.arange(max(LENGTHS))
    return place < lengths if padding == "right" else place >= max(LENGTHS) - lengths


def text(padding: str, **more: Any) -> Batch:
    real = real_tokens(padding)
    tokens = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(5))
    mask = {} if real is None else {"attention_mask": real.long()}
    return Batch({"input_ids": tokens, **mask, **more}, real)


def causal_text(padding: str) -> Batch:
    return text(padding, use_cache=False)


def image(padding: str) -> Batch:
    return Batch({"pixel_values": seeded(2, 3, 12, 12)})


def noise(padding: str) -> Batch:
    return Batch(
        {
            "hidden_states": seeded(2, 4, 6, 6),
            "timestep": torch.tensor([3, 700]),
            "class_labels": torch.tensor([1, 2]),
        }
    )


def masked_noise(padding: str) -> Batch:
    """Of nine tokens each sample keeps five, its own, in no order."""
    return Batch(noise(padding).inputs | {"keep": torch.tensor([[7, 0, 3, 4, 2], [1, 8, 6, 3, 5]])})


def vectors(padding: str) -> Batch:
    real = real_tokens(padding)
    return Batch({"x": seeded(len(LENGTHS), max(LENGTHS), WIDTH)} | ({} if real is None else {"real": real}), real)


def vectors_sequence_first(padding: str) -> Batch:
    real = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.bool) if padding == "none" else real_tokens(padding)
    return Batch({"x": seeded(max(LENGTHS), len(LENGTHS), WIDTH), "real": real}, real)


def encoder_vectors(padding: str) -> Batch:
    real = real_tokens(padding)
    mask = {} if real is None else {"src_key_padding_mask": ~real}
    return Batch({"src": seeded(len(LENGTHS), max(LENGTHS), WIDTH)} | mask, real)


def decoder_vectors(padding: str) -> Batch:
    """Four tokens that attend to six."""
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    return Batch(
        {
            "tgt": seeded(3, 4, WIDTH),
            "memory": seeded(3, 6, WIDTH, seed=6),
            "tgt_mask": causal,
            "tgt_is_causal": True,
        }
    )


# ------------------------------------------------------------------------------------------------------- the table


def hugging_face(model: type, config: type, **settings: Any) -> Callable[[str], nn.Module]:
    def make(implementation: str) -> nn.Module:
        return model(config(**settings, attn_implementation=implementation))

    return make


_torch_layer: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 32, "batch_first": True}
_sizes: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
}
_text: dict[str, Any] = {**_sizes, "vocab_size": VOCABULARY}
_image: dict[str, Any] = {**_sizes, "image_size": 12, "patch_size": 4}
_gpt2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 16,
    "scale_attn_by_inverse_layer_idx": True,  # scores with another scale than 1/√D
}
_dinov2 = {k: v for k, v in _image.items() if k != "intermediate_size"} | {"mlp_ratio": 1}
_dit: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "in_channels": 4,
    "num_layers": LAYERS,
    "sample_size": 6,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
}
_mdt: dict[str, Any] = {k: v for k, v in _dit.items() if k not in ("num_layers", "norm_num_groups")} | {
    "num_layers": 4,
    "num_decoder_layers": 2,
}
_sides = ("none", "left", "right")

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gpt2",
            hugging_face(GPT2LMHeadModel, GPT2Config, **_gpt2),
            causal_text,
            own_maps,
            ".attn.c_proj",
            causal=True,
            paddings=_sides,
        ),
        Family(
            "llama",
            hugging_face(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, **_text),
            causal_text,
            own_maps,
            ".o_proj",
            causal=True,
            paddings=_sides,
        ),
        Family(
            "qwen3",  # heads that are wider than the model's width over their number
            hugging_face(Qwen3ForCausalLM, Qwen3Config, num_key_value_heads=2, head_dim=10, **_text),
            causal_text,
            own_maps,
            ".o_proj",
            causal=True,
            paddings=_sides,
        ),
        Family(
            "bert",
            hugging_face(BertModel, BertConfig, **_text),
            text,
            own_maps,
            "attention.output.dense",
            False,
            _sides,
        ),
        Family("vit", hugging_face(ViTModel, ViTConfig, **_image), image, own_maps, ".o_proj"),
        Family("deit", hugging_face(DeiTModel, DeiTConfig, **_image), image, own_maps, ".o_proj"),
        Family("dinov2", hugging_face(Dinov2Model, Dinov2Config, **_dinov2), image, own_maps, ".o_proj"),
        Family("dit", lambda _: DiTTransformer2DModel(**_dit), noise, softmax_of_projections, ".to_out.0"),
        Family("mdt", lambda _: MDTTransformer2DModel(**_mdt), noise, softmax_with_position_bias, ".to_out"),
        Family(
            "mdt-masked", lambda _: MDTTransformer2DModel(**_mdt), masked_noise, softmax_with_position_bias, ".to_out"
        ),
        Family(
            "encoder",
            lambda _: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_torch_layer), LAYERS),
            encoder_vectors,
            weights_needed,
            ".self_attn",
            paddings=_sides,
        ),
        Family(
            "decoder",
            lambda _: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_torch_layer), LAYERS),
            decoder_vectors,
            weights_needed,
            "_attn",  # .self_attn and the crosswise .multihead_attn
        ),
        Family(
            "multihead", lambda _: SequenceFirst(), vectors_sequence_first, weights_needed, "attention", False, _sides
        ),
        Family(
            "hand-written",
            lambda _: Stack(Attention(kv_heads=2), Attention(kv_heads=2, enable_gqa=True)),
            vectors,
            softmax_of_projections,
            ".to_out",
            causal=True,
            paddings=_sides,
        ),
    )
}
