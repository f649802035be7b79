"""See every attention layer of a model at work, without changing the model.

A ``TorchFunctionMode`` sees each call of ``torch.nn.functional.scaled_dot_product_attention`` and keeps references to
its arguments (no copies, no maps; the fused kernel stays on), forward hooks tell which module made the call.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from squeezeheads.attention import AttentionRecord

# Wrappers that add a level to module paths without being part of the model.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class RecordingError(RuntimeError):
    """The attention that was planned to be recorded is not the attention that ran."""


class AttentionRecording(Sequence[AttentionRecord]):
    """The records of one forward pass, in order of execution. Filled while the context of ``record_attention``
    is open; complete, and checked, once it is closed."""

    def __init__(self) -> None:
        self._records: list[AttentionRecord] = []

    @overload
    def __getitem__(self, index: int) -> AttentionRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[AttentionRecord]: ...
    def __getitem__(self, index: int | slice) -> AttentionRecord | list[AttentionRecord]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    @property
    def names(self) -> list[str]:
        """The module path of each record."""
        return [record.name for record in self._records]

    def __repr__(self) -> str:
        return "AttentionRecording(\n" + "".join(f"  {record!r},\n" for record in self._records) + ")"


class record_attention:
    """Context manager: record the attention of one forward pass of ``model``.


        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(**batch)

    Works for any model that calls ``scaled_dot_product_attention`` (``attn_implementation="sdpa"`` in transformers) or
    uses ``nn.MultiheadAttention`` with ``need_weights=False``, also inside DDP, FSDP, PEFT and ``torch.compile``
    wrappers; recordings of several models may be nested. A module that is called several times gives one record a
    call. Layers that gradient checkpointing runs again during the backward pass are not recorded again.

    Args:
        model: any ``nn.Module``.
        layers: which calls to keep, by module path or by position in order of execution (from 0). ``None`` keeps all.
            Nothing of the other layers is held.
        output_projections: the module path of the output projection of each attention path, where it is not found by
            itself: ``{"encoder.attention": "encoder.project"}``. By default it is the first linear-like module after
            the call that receives exactly what attention returned, found once per model.

    Raises:
        RecordingError: on closing, if no attention call was seen or not exactly the planned ones; during the pass, if
            the model runs forward twice in one context, or runs under re-entrant gradient checkpointing (which cuts
            the recorded queries off from the gradient).
        ValueError: a name in ``layers`` or ``output_projections`` that is no module of the model, a negative position.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str | int] | None = None,
        output_projections: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"record_attention expects a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._paths = {module: clean_path(path) for path, module in model.named_modules()}
        # Weak, because records look up their projection in it: a record must not keep the model alive.
        self._modules = weakref.WeakValueDictionary((path, module) for module, path in self._paths.items())
        self._layers = None if layers is None else frozenset(layers)
        self._projections = _known_projections(model)
        self._overrides = dict(output_projections or {})
        self._check_names(layers)

    def __enter__(self) -> AttentionRecording:
        self._recording = AttentionRecording()
        self._stack: list[str] = []
        self._calls = 0
        self._seen: set[str | int] = set()
        self._forwards = 0
        self._awaiting: tuple[str, Tensor] | None = None
        self._grad_at_entry = False
        self._handles: list[Any] = []
        for module in self._paths:
            enter, leave = self._hooks(module)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._mode = _AttentionMode(self._on_attention)
        self._mode.__enter__()
        return self._recording

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._mode.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._awaiting = None
        if error is None:
            self._check_complete()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _hooks(self, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that keep the stack of module paths. They hold paths, not modules: torch.compile traces them so."""
        path, is_root = self._paths[module], module is self._model
        stack = self._stack

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _in_backward():
                return
            if is_root:
                self._start_forward()
            if self._awaiting is not None:
                self._consider_projection(module, args, kwargs)
            stack.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # Called after errors too, even where a pre-hook before ours failed and this module never entered.
            if stack and stack[-1] == path and not _in_backward():
                stack.pop()

        return enter, leave

    def _start_forward(self) -> None:
        self._forwards += 1
        if self._forwards > 1:
            raise RecordingError(
                "record_attention saw a second forward pass of the model in one context. Open one context per "
                "forward pass: records of two batches must not be mixed."
            )
        self._grad_at_entry = torch.is_grad_enabled()

    def _on_attention(self, call: _Call, output: Tensor) -> None:
        if not self._stack or _in_backward():
            return  # another model's attention, or a layer run again by gradient checkpointing
        name, position = self._stack[-1], self._calls
        self._calls += 1
        if self._layers is not None:
            chosen = self._layers & {name, position}
            if not chosen:
                return
            self._seen |= chosen
        self._check_differentiable(name)
        self._recording._records.append(call.record(name, self._output_weight_of(name, call)))
        known = name in self._overrides or name in self._projections
        if not known and not torch.compiler.is_compiling():
            self._awaiting = (name, output)

    # -- output projections ----------------------------------------------------------------------------------------

    def _consider_projection(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called for each module that starts after an attention call whose output projection is not known yet."""
        name, output = self._awaiting  # type: ignore[misc]
        if _in_features(module) != output.shape[1] * output.shape[3]:
            return
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        found = bool(tensors) and _is_merged_heads(tensors[0], output)
        self._projections[name] = self._paths[module] if found else None
        self._awaiting = None

    def _output_weight_of(self, name: str, call: _Call) -> Callable[[], Tensor | None]:
        heads, width = call.query.shape[1], call.value.shape[-1]
        overrides, projections, modules = self._overrides, self._projections, self._modules
        # A model may run other layers than its modules hold (AdaptersOff). A function of its class: see _modules.
        runs: Callable[[nn.Module], nn.Module] | None = getattr(type(self._model), "layer_that_runs", None)

        def read() -> Tensor | None:
            path = overrides.get(name) or projections.get(name)
            projection = None if path is None else modules.get(path)
            if projection is None:
                return None
            return read_output_weight(projection if runs is None else runs(projection), heads, width)

        return read

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_names(self, layers: Sequence[str | int] | None) -> None:
        modules, projections = self._modules, self._overrides
        named = [layer for layer in layers or () if isinstance(layer, str)]
        negative = [layer for layer in layers or () if isinstance(layer, int) and layer < 0]
        if negative:
            raise ValueError(f"layers={negative}: positions count from 0 in order of execution.")
        for path in (*named, *projections.keys(), *projections.values()):
            if path not in modules:
                raise ValueError(
                    f"{path!r} is no module of {type(self._model).__name__}. Attention modules are found with "
                    "`with record_attention(model) as recording: model(...)` and listed by `recording.names`."
                )
        for name, path in projections.items():
            if _in_features(modules[path]) is None:
                raise ValueError(
                    f"output_projections[{name!r}]: {path!r} is a {type(modules[path]).__name__}, expected a linear "
                    "layer (with in_features, or transformers' Conv1D)."
                )

    def _check_differentiable(self, name: str) -> None:
        if torch.is_grad_enabled() or not self._grad_at_entry:
            return
        # The attention core may be a module of its own without parameters: then the module around it tells.
        around = [self._modules[path] for path in reversed(self._stack)]
        module = next((m for m in around if next(m.parameters(), None) is not None), None)
        trained = module is not None and module.training and any(p.requires_grad for p in module.parameters())
        # A frozen layer (of a student with adapters elsewhere) hands gradients on all the same.
        if trained or any(m.training and _checkpoints_reentrantly(m) for m in around):
            raise RecordingError(
                f"{name!r} runs without gradient inside a training forward pass, as re-entrant gradient checkpointing "
                "does: its recorded queries could teach nothing. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def _check_complete(self) -> None:
        model = type(self._model).__name__
        if self._calls == 0:
            implementation = getattr(getattr(self._model, "config", None), "_attn_implementation", None)
            seen = "" if implementation is None else f" Its attn_implementation is {implementation!r}."
            raise RecordingError(
                f"no scaled_dot_product_attention call of {model} was seen.{seen} Load it with "
                'attn_implementation="sdpa" (eager, flash and flex attention cannot be recorded; nn.MultiheadAttention '
                "needs need_weights=False), and run its forward pass inside the context."
            )
        if self._layers is not None:
            missing = self._layers - self._seen
            if missing:
                raise RecordingError(
                    f"attention layers {sorted(missing, key=str)} of {model} were planned but did not run: "
                    f"{self._calls} attention calls were seen. Is that layer skipped, or run by another kernel than "
                    '"sdpa"?'
                )


class _Call:
    """The arguments of one ``scaled_dot_product_attention`` call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.attn_mask, self.is_causal, self.scale = attn_mask, is_causal, scale

    def record(self, name: str, output_weight: Callable[[], Tensor | None]) -> AttentionRecord:
        query = self.query
        if query.dim() == self.key.dim() == 4 and query.shape[0] == 1 != self.key.shape[0]:
            query = query.expand(self.key.shape[0], -1, -1, -1)  # learned queries, broadcast over the batch
        return AttentionRecord(
            name,
            query,
            self.key,
            self.value,
            attention_mask=self.attn_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            output_weight=output_weight,
        )


class _AttentionMode(TorchFunctionMode):
    """Tells ``on_attention`` of every ``scaled_dot_product_attention`` call."""

    def __init__(self, on_attention: Callable[[_Call, Tensor], None]) -> None:
        super().__init__()
        self._on_attention = on_attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            # It calls the kernel deep inside, where this mode is off: run its body with the mode on.
            with self:
                return _unhooked_multi_head_attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._on_attention(_Call(*args, **kwargs), output)
        return output


# The same function without its check for active modes, which would hand the call back to the mode for ever.
_unhooked_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
    F.multi_head_attention_forward.__closure__,
)
_unhooked_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def clean_path(path: str) -> str:
    """A module path without the levels that DDP, FSDP, ``torch.compile`` and checkpoint wrappers add.

    The leading ``module`` of ``DistributedDataParallel`` goes too, so that a path found on the bare model is the same
    inside any wrapper.
    """
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts and parts[0] == "module" else parts)


def read_output_weight(projection: nn.Module, heads: int, width: int) -> Tensor:
    """Each head's slice (heads, width, E) of a linear-like module, read through the module itself.

    Passing the identity through it works alike for ``nn.Linear``, ``Conv1D``, LoRA-wrapped and quantised layers. The
    answer is kept until a parameter or buffer changes, or the module answers a test vector differently: an adapter
    switched off, a write through ``.data`` and packed weights leave no other trace.

    Weights in shards (FSDP2) are gathered for it, by all processes at once. There an answer is kept until a shard
    changes: a test vector would have to be gathered for each time.
    """
    tensors = (*projection.parameters(), *projection.buffers())
    sharded = any(hasattr(t, "full_tensor") for t in tensors)
    state = (heads, width, *((id(t), t._version, t.dtype, t.device) for t in tensors))
    dtype = next((p.dtype for p in projection.parameters() if p.is_floating_point()), torch.get_default_dtype())
    device = next((t.device for t in tensors), torch.device("cpu"))
    size = heads * width
    kept = _weights_read.get(projection)
    if sharded and kept is not None and kept[0] == state:
        return kept[2]
    # Ordinary tensors even where the teacher runs in inference mode: they are kept, and their version is asked for.
    plain = nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), plain:
        test = torch.arange(2 * size, dtype=torch.float32, device=device).view(2, size).sqrt().cos().to(dtype)
        test[1] = 0  # the bias
        whole = _gathered(projection) if sharded else None
        answer = _ask(projection, test, whole)
        # A plan without weights has nothing to compare: shapes stay what they are.
        same = kept is not None and kept[0] == state and (answer.is_meta or torch.equal(kept[1], answer))
        if kept is None or not same:
            # A large identity, so that adding the bias does not round the weight off in half precision.
            identity = PROBE * torch.eye(size, dtype=dtype, device=device)
            weight = ((_ask(projection, identity, whole) - answer[1]) / PROBE).view(heads, width, -1)
            kept = _weights_read[projection] = (state, answer, weight)
    return kept[2]


# A power of two: scaling by it rounds nothing.
PROBE = 256.0


def _gathered(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those in shards (DTensors) whole: each a gathering of all processes."""
    named: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in named}


def _ask(projection: nn.Module, rows: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
    """What ``projection`` makes of these rows, without the dropout of a LoRA branch; by ``weights`` where given."""
    modes = {module: module.training for module in projection.modules()}
    try:
        projection.eval()
        if weights is not None:
            return torch.func.functional_call(projection, weights, (rows[None],))[0]
        return projection(rows[None])[0]
    finally:
        for module, training in modes.items():
            module.training = training


# Both caches hold nothing alive: they go with the module and the model.
_weights_read: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor, Tensor]] = weakref.WeakKeyDictionary()
# For each model, the path of the output projection of each attention path; None where there is none that can be used.
# Paths, not modules: a layer that is wrapped later (LoRA) or replaced is read as it is then.
_projections_found: weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]] = weakref.WeakKeyDictionary()


def _known_projections(model: nn.Module) -> dict[str, str | None]:
    known = _projections_found.get(model)
    if known is None:
        # nn.MultiheadAttention applies its out_proj by F.linear: that module's forward never runs.
        attentions = (clean_path(path) for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
        known = {path: f"{path}.out_proj".lstrip(".") for path in attentions}
        _projections_found[model] = known
    return known


def _in_features(module: nn.Module) -> int | None:
    """Input width of a linear-like module (``nn.Linear`` and its kin, or transformers' ``Conv1D``), else ``None``."""
    linear: Any = module
    if hasattr(linear, "in_features") and hasattr(linear, "out_features"):
        return int(linear.in_features)
    if hasattr(linear, "nx") and hasattr(linear, "nf"):
        return int(linear.nx)
    return None


def _is_merged_heads(tensor: Tensor, output: Tensor) -> bool:
    """Whether ``tensor`` (…, H·Dv) is what attention returned (B, H, Q, Dv), heads merged and nothing else done.

    A gate or a norm between the two would make the projection's weight the wrong one. First and last token are
    compared: this runs once per layer and model.
    """
    batch, heads, queries, width = output.shape
    if tensor.numel() != output.numel() or tensor.shape[-1] != heads * width:
        return False
    if tensor.is_meta:
        return True  # a plan without weights: there are shapes alone
    merged = tensor.detach().reshape(batch, queries, heads, width)
    ends = [0, queries - 1]
    return torch.equal(merged[:, ends], output.detach().transpose(1, 2)[:, ends])


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether transformers runs this layer under re-entrant gradient checkpointing."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(options.get("use_reentrant", False))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


__all__: list[str] = ["AttentionRecording", "RecordingError", "clean_path", "read_output_weight", "record_attention"]
