"""What a batch is, which of its rows and predictions count, and the mode in which models are measured: conventions of
everything that runs models on batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]
"""A batch: what a model is called with, by name."""

PROBABILITIES = "label_probabilities"
"""Key of a batch: (B, classes) probabilities in place of labels, where these are mixed or smoothed. No model sees
it."""

ONLY = "teacher"
"""Name of the teacher where there is one alone."""


def padding_rows(inputs: Inputs) -> Tensor | None:
    """Query rows that are no padding: a two-dimensional ``attention_mask``; all of ``input_ids`` where there is none;
    else ``None``, which is all too."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    ids = inputs.get("input_ids")
    if mask is None and isinstance(ids, Tensor) and ids.dim() == 2:
        # Named one by one: parts of a batch may differ in length, and weigh by their rows.
        return torch.ones_like(ids, dtype=torch.bool)
    return None


def labelled_targets(inputs: Inputs) -> Tensor | None:
    """Predictions with a label: ``labels != -100``, or ``None`` (all) where there are no labels."""
    labels = inputs.get("labels")
    return labels != -100 if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def next_token_targets(inputs: Inputs) -> Tensor | None:
    """Predictions of a causal language model with a label: position ``i`` predicts label ``i + 1``. Without labels, all
    tokens but padding count."""
    labelled = labelled_targets(inputs)
    if labelled is None:
        rows = padding_rows(inputs)
        if rows is None:
            return None
        labelled = rows & torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1)
    return torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's loss compares each prediction with the next label: transformers' causal language models, in
    wrappers too (PEFT, DDP)."""
    kinds = (vars(module).get("loss_type") for module in model.modules())
    kind = next((kind for kind in kinds if isinstance(kind, str)), None)
    if kind is None:
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    config = getattr(model, "config", None)
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False)


def one_pass(inputs: Inputs) -> Sequence[Inputs]:
    """A batch that the models see once, as it is."""
    return [inputs]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
