"""Names under which trainers log values of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What transformers' Trainer (5.23) puts into an entry of its log beside evaluation.
_LOGGED = frozenset(
    {
        "epoch",
        "grad_norm",
        "learning_rate",
        "loss",
        "num_input_tokens_seen",
        "step",
        "total_flos",
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_tokens_per_second",
    }
)


def check_names(objectives: Mapping[str, Any], further: frozenset[str] = frozenset()) -> None:
    """Whether each objective's value can be logged under its name: one would take the other's place.

    Args:
        objectives: objectives by their names.
        further: names that this trainer logs beside those of every one.

    Raises:
        TypeError: objectives without names.
        ValueError: a name is taken.
    """
    if not isinstance(objectives, Mapping):
        raise TypeError(
            f"objectives: a {type(objectives).__name__}, expected a mapping of names to objectives, for example "
            '{"task": TaskLoss(), "attention": SqueezedHeads()}.'
        )
    for name in objectives:
        if name in _LOGGED | further:
            raise ValueError(f"the trainer logs a value of its own as {name!r}: give the objective another name.")
