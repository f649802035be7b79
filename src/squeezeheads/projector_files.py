"""Projectors in a checkpoint, beside the student: their weights, and the optimiser's state where it is kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PROJECTOR_FILE = "projectors.safetensors"
STATE_FILE = "projectors_optimizer.safetensors"


def store_projectors(projectors: Mapping[str, nn.Module], folder: Path) -> None:
    """Write weights and statistics.

    Args:
        projectors: unwrapped, by the name of their objective.
        folder: a checkpoint; made where it is not there.
    """
    tensors = {f"{n}/{k}": v.contiguous() for n, m in projectors.items() for k, v in m.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PROJECTOR_FILE)


def load_projectors(projectors: Mapping[str, nn.Module], folder: Path) -> None:
    """Read what ``store_projectors`` wrote.

    Raises:
        RuntimeError: the checkpoint holds none, or others.
    """
    tensors = _read(projectors, folder / PROJECTOR_FILE)
    for name, module in projectors.items():
        prefix = f"{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def store_states(projectors: Mapping[str, nn.Module], states: Mapping[Any, Mapping[str, Any]], folder: Path) -> None:
    """Write an optimiser's state of the projectors' parameters.

    Raises:
        RuntimeError: it holds what is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(projectors):
        for key, value in states.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise RuntimeError(
                    f"the optimizer keeps {key}={value!r} of {name}: under FSDP only tensors are kept for projectors. "
                    "Use optim='adamw_torch'."
                )
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    save_file(tensors, folder / STATE_FILE)


def load_states(projectors: Mapping[str, nn.Module], folder: Path) -> dict[Any, dict[str, Tensor]]:
    """Read what ``store_states`` wrote, by parameter.

    Raises:
        RuntimeError: the checkpoint holds none.
    """
    tensors = _read(projectors, folder / STATE_FILE)
    states: dict[Any, dict[str, Tensor]] = {}
    for name, parameter in _named(projectors):
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if own:
            # A step count is a number wherever the weights are.
            states[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in own.items()}
    return states


def trained_parameters(projectors: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """What is optimised, in a fixed order."""
    return [parameter for _, parameter in _named(projectors)]


def take_out(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Take the group of exactly these parameters out of an optimizer, with their state; returns both."""
    held = {id(p) for p in parameters}
    (index,) = [i for i, g in enumerate(optimizer.param_groups) if {id(p) for p in g["params"]} == held]
    group = optimizer.param_groups.pop(index)
    return group, {p: optimizer.state.pop(p) for p in parameters if p in optimizer.state}


def _named(projectors: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in projectors.items():
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{name}/{path}", parameter


def _read(projectors: Mapping[str, nn.Module], file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise RuntimeError(
            f"{file.parent} holds no {file.name}, but {', '.join(projectors)} train a projector: it is the checkpoint "
            "of a run with other objectives, or of another way of distributing."
        )
    return load_file(file)
