"""A model without weights: its parameters, its recorded attention, what a step of it saves and computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from squeezeheads.attention import AttentionRecord
from squeezeheads.batches import evaluating
from squeezeheads.objectives.base import output_named
from squeezeheads.recording import record_attention
from squeezeheads.token_layout import Layout, known_layout


@dataclass
class Shape:
    """What a model is like. Tensors in it are on the meta device: shapes without numbers."""

    model: nn.Module
    parameters: int
    weight_bytes: int
    layers: list[AttentionRecord] = field(default_factory=list)
    """Its attention calls in order of execution."""
    layout: Layout | None = None
    """Its special tokens, where they are known."""
    outputs: Any = None
    """What it returned."""
    output_bytes: int = 0
    """Of all tensors in that, each storage once."""
    forward_flops: int = 0
    """Products of one forward pass, two a multiplication with its addition; attention under a causal mask by half."""
    tried: bool = False
    """Whether its forward pass ran without weights: only then is anything known beside its parameters."""


def shape_of(model: nn.Module) -> Shape:
    """A model's parameters."""
    weights = list(model.parameters())
    return Shape(
        model,
        sum(p.numel() for p in weights),
        sum(t.numel() * t.element_size() for t in (*weights, *model.buffers())),
        layout=known_layout(model),
    )


def try_forward(shape: Shape, batch: Mapping[str, Tensor], hidden_states: bool, attends: bool) -> None:
    """Run a model on a batch on the meta device, without gradients, in eval mode; note what it did.

    Args:
        hidden_states: whether these are asked for.
        attends: whether its attention is recorded.

    Raises:
        RecordingError: no attention that can be recorded.
        Exception: whatever a model raises that cannot run without weights.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    asked = {"output_hidden_states": True} if hidden_states else {}
    attention = _WithoutNumbers()
    with torch.device("meta"), torch.no_grad(), evaluating(shape.model), attention:
        watched: Any = record_attention(shape.model) if attends else nullcontext([])
        with FlopCounterMode(display=False) as products, watched as recording:
            shape.outputs = shape.model(**inputs, **asked)
    shape.layers = list(recording)
    shape.forward_flops = products.get_total_flops() + attention.flops
    # What a distillation asks for: the cache of a language model, which is there too, is switched off by it.
    told = [output_named(shape.outputs, name) for name in ("logits", "hidden_states")]
    shape.output_bytes = sum(size for size, _ in _storages(told).values())
    shape.tried = True


def saved_bytes(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    precision: str,
    checkpointed: Callable[[nn.Module], Any] | None = None,
) -> int:
    """Bytes that one forward pass in training mode keeps for the backward pass: each storage once, weights aside,
    those of weights in another precision with them.

    Args:
        batch: on the meta device, with labels.
        precision: "fp32", "bf16" or "fp16": of mixed precision.
        checkpointed: a context in which the model checkpoints its layers, where training does. Then what a layer keeps
            is counted as one layer's share and one (B, N, E) state a layer.
    """
    whole = _saved(model, batch, precision)
    if checkpointed is None:
        return whole
    with checkpointed(model):
        outside = _saved(model, batch, precision)
    states = _layer_states(model, batch)
    return outside + sum(states) + max(whole - outside, 0) // max(len(states), 1)


def _saved(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> int:
    known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Any]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other takes its number
        return tensor

    numbers = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    training = model.training
    with torch.device("meta"), torch.enable_grad(), _WithoutNumbers(), _MixedPrecision(numbers):
        model.train()
        try:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = model(**batch)
        finally:
            model.train(training)
    found = {key: size for key, (size, _) in kept.items()}
    for key, (size, _) in _storages(outputs).items():  # alive as long as the loss
        found.setdefault(key, size)
    return sum(found.values())


def _layer_states(model: nn.Module, batch: Mapping[str, Tensor]) -> list[int]:
    """Bytes of each layer's state (B, N, E), as checkpointing keeps them."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.device("meta"), torch.no_grad(), evaluating(model), _WithoutNumbers():
        states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None) or ()
    return [state.numel() * state.element_size() for state in states[1:]]


def _storages(value: Any) -> dict[int, tuple[int, Any]]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage._cdata: (storage.nbytes(), storage)}
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, list | tuple) else []
    return {key: found for part in parts for key, found in _storages(part).items()}


_QUESTIONS: dict[Any, bool] = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


class _WithoutNumbers(TorchFunctionMode):
    """What models need and the meta device lacks. Attention as fused kernels do it: nothing of rows × keys is kept. And
    answers: "is all of it so?", as masks are asked whether no token is padding: yes, none is here; "is any so?", as
    steps are asked whether one is the first: no."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._answers: list[tuple[Tensor, bool]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is Tensor.__bool__:
            for tensor, answer in self._answers:
                if tensor is args[0]:
                    return answer
        output = func(*args, **kwargs)
        if func in _QUESTIONS and isinstance(output, Tensor) and output.is_meta and not output.dim():
            self._answers.append((output, _QUESTIONS[func]))
        return output

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        pairs = query.shape[:-1].numel() * key.shape[-2] // (2 if is_causal else 1)
        self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("shapes have no backward pass.")


class _MixedPrecision(TorchFunctionMode):
    """What ``torch.autocast`` does, which knows no meta device: products in few bits, sums that need it in float32."""

    PRODUCTS = (
        F.linear, F.conv1d, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm,
        torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, torch.conv2d,
    )  # fmt: skip
    SUMS = (F.layer_norm, F.group_norm, F.cross_entropy, F.softmax, F.log_softmax, torch.softmax, torch.pow, F.mse_loss)

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._dtype is not None and (func in self.PRODUCTS or func in self.SUMS):
            dtype = self._dtype if func in self.PRODUCTS else torch.float32
            args = tuple(self._as(value, dtype) for value in args)
            kwargs = {name: self._as(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _as(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        if id(value) not in self._cast:  # a weight is cast once in a forward pass
            self._cast[id(value)] = value.to(dtype)
        return self._cast[id(value)]
