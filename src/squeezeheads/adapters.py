"""Students that train an adapter (PEFT), and a teacher that is the same model with its adapters off.

peft is imported when it is first needed: the core does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from squeezeheads.extras import how_to_install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
"""What a folder holds in place of ``config.json`` where an adapter was saved in it."""


class AdaptersOff(nn.Module):
    """A teacher that is the student's own base model: the student, run with its adapters off.


        student = get_peft_model(base, LoraConfig(target_modules=["q_proj", "k_proj"]))
        trainer = SqueezeTrainer(model=student, teacher=AdaptersOff(student), ...)

    No weight is held twice. After each pass the adapters are on again and ask for gradients as before. ``Distillation``
    and ``SqueezeTrainer`` run it, like every teacher, in eval mode and without gradients.

    Args:
        student: a ``peft.PeftModel`` whose adapters sit in its layers (LoRA and its kin).

    Raises:
        ImportError: peft is not installed.
        TypeError: ``student`` is no ``PeftModel``.
        ValueError: prompts in place of adapters in layers; weights outside the adapters that are trained, so that the
            base model would change with the student.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        bare = getattr(student, "_orig_mod", student)  # of torch.compile
        if not isinstance(bare, _peft().PeftModel):
            raise TypeError(
                f"AdaptersOff expects a peft.PeftModel, got {type(bare).__name__}: make the student with "
                "peft.get_peft_model. A plain teacher is given as it is."
            )
        for name, config in bare.peft_config.items():
            if config.is_prompt_learning or config.is_adaption_prompt:
                raise ValueError(
                    f"the adapter {name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}, which "
                    "adds tokens: the base model sees others. Use one whose weights sit in layers (LoRA …), or load "
                    "the teacher by itself."
                )
        self.student = bare
        changing = self.trained_with(bare)
        if changing:
            raise ValueError(
                f"{len(changing)} weights outside the adapters are trained ({', '.join(changing[:3])} …): with the "
                "adapters off the teacher would not be the model that the student began as. Freeze them (LoRA's bias: "
                '"none"; whole layers: modules_to_save), or load the teacher by itself.'
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with adapters_off(self.student):
            return self.student(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.student.config

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.student.device

    def trained_with(self, student: nn.Module) -> list[str]:
        """Names of ``student``'s trained parameters that take part in this teacher's passes: there should be none."""
        own = {id(p) for p in self.student.parameters()} - _adapter_parameters(self.student)
        return [name for name, p in student.named_parameters() if p.requires_grad and id(p) in own]

    @staticmethod
    def layer_that_runs(layer: nn.Module) -> nn.Module:
        """What computes in the place of ``layer`` while adapters are off. ``record_attention`` reads output projections
        through it: the record may be asked for them when adapters are on again."""
        if isinstance(layer, _peft().tuners.tuners_utils.BaseTunerLayer):
            return layer.get_base_layer()
        if isinstance(layer, _peft().utils.AuxiliaryTrainingWrapper):
            return layer.original_module
        return layer


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within it a ``PeftModel`` is its base model; afterwards its adapters are on, and trained or frozen, as before."""
    # peft freezes adapters that are off, and lets all that are switched on be trained: those that were frozen too.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def shared_trained_weights(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's trained parameters that are the teacher's too, so that it would learn with its student:
    after ``get_peft_model(base)`` ``base`` itself holds the adapters."""
    if isinstance(teacher, AdaptersOff):
        return teacher.trained_with(student)
    own = {id(p) for p in teacher.parameters()}
    return [name for name, p in student.named_parameters() if p.requires_grad and id(p) in own]


def _adapter_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that do nothing while adapters are off."""
    off: set[int] = set()
    for module in model.modules():
        base = AdaptersOff.layer_that_runs(module)
        if base is not module:
            off |= {id(p) for p in module.parameters()} - {id(p) for p in base.parameters()}
    return off


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as missing:
        raise ImportError(f"adapters need the package peft. {how_to_install('peft')}", name="peft") from missing
    return peft


# -- adapters in recipes ----------------------------------------------------------------------------------------------


@dataclass
class LoraSpec:
    """Low-rank adapters (LoRA): all that is trained, and all that is saved; the pretrained weights stay as they are."""

    r: int = 8
    """Rank of each adapter."""
    alpha: float = 16
    """What an adapter adds is multiplied by alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    target_modules: list[str] = field(default_factory=list)
    """Linear layers that get an adapter, by the end of their path: q_proj, k_proj … Left out: peft's choice for this
    type of model. Attention is taught through queries and keys: name their projections."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained and saved whole, by the end of their path: a new classifier, for example."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r}: expected at least 1.")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: expected a finite number above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a share from 0 to below 1.")
        for name in ("target_modules", "modules_to_save"):
            if not all(entry.strip() for entry in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: an entry is empty.")


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> Any:
    """``model`` as a ``PeftModel`` with new adapters, their weights drawn from torch's global generator.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft finds no such layers, or cannot adapt them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _peft().LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules or None,
        modules_to_save=spec.modules_to_save or None,
        # By it AutoPeftModelForCausalLM opens what is saved.
        task_type="CAUSAL_LM" if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None,
    )
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "modules_to_save"):
        for entry in getattr(spec, key):
            # peft takes a list as soon as one entry is found, and says nothing of the others.
            if not any(name == entry or name.endswith(f".{entry}") for name in names):
                raise ValueError(f"{key}: no module of {type(model).__name__} is called {entry!r}.")
    return _peft().get_peft_model(model, config)


def is_adapter(folder: str | Path) -> bool:
    """Whether an adapter was saved in ``folder``, in place of a whole model."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def load_model(load: Callable[..., Any], path: str, *options: Any) -> Any:
    """A model from a folder or the hub; of a folder that holds an adapter, the model that it names with the adapter in.

    Args:
        load: path and ``options`` → a whole model, as ``Task.load``.

    Raises:
        ImportError: an adapter, and peft is not installed.
        ValueError: an adapter that names no model, or does not fit the one that it names.
    """
    if not is_adapter(path):
        return load(path, *options)
    base = _peft().PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(f"{path}: its {ADAPTER_FILE} does not say for which model it is (base_model_name_or_path).")
    model = _peft().PeftModel.from_pretrained(load(base, *options), path, use_safetensors=True)
    load_adapters(model, path)
    return model.eval()


# Saved under these names, other values mean another function of the same weights.
_SAME = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")


def load_adapters(model: Any, folder: str | Path) -> None:
    """All adapters of a ``PeftModel`` from a folder that its ``save_pretrained`` wrote; peft itself only warns where
    weights are missing.

    Raises:
        RuntimeError: adapters that are not there, hold other weights, or are scaled otherwise.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name, config in model.peft_config.items():
        place = Path(folder) if name == "default" else Path(folder) / name
        file = place / "adapter_model.safetensors"
        if not file.is_file() or not is_adapter(place):
            raise RuntimeError(f"{place} holds no adapter {name!r} ({file.name} and {ADAPTER_FILE}).")
        saved = PeftConfig.from_pretrained(place)
        other = [key for key in _SAME if getattr(saved, key, None) != getattr(config, key, None)]
        if other:
            raise RuntimeError(f"the adapter in {place} is another than the model's: {', '.join(other)} differ.")
        tensors = load_file(file)
        own = get_peft_model_state_dict(model, adapter_name=name)
        amiss = sorted({*tensors} ^ {*own}) + [k for k in tensors if k in own and tensors[k].shape != own[k].shape]
        if amiss:
            raise RuntimeError(
                f"the adapter in {place} does not fit {type(model.get_base_model()).__name__}: {', '.join(amiss[:3])} "
                "… are in one alone, or of other shape."
            )
        set_peft_model_state_dict(model, tensors, adapter_name=name)


__all__: list[str] = [
    "ADAPTER_FILE",
    "AdaptersOff",
    "LoraSpec",
    "adapters_off",
    "add_lora",
    "is_adapter",
    "load_adapters",
    "load_model",
    "shared_trained_weights",
]
