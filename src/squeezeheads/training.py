"""One training of a run: taken up where it was stopped, ended where it has diverged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from squeezeheads.checkpoints import last_whole_checkpoint
from squeezeheads.errors import RecipeError
from squeezeheads.reports.progress import ProgressBar
from squeezeheads.trainer import SqueezeTrainer


def train(trainer: SqueezeTrainer, bar: ProgressBar, whose: str, key: str) -> None:
    """Train, from the last checkpoint of a stopped run where there is one.

    Args:
        bar: shows the steps.
        whose: the model, for messages.
        key: where the training stands in the recipe, for messages.

    Raises:
        RecipeError: a loss that is not finite when it is logged, or such weights at the end.
    """
    last = last_whole_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.add_callback(_StopDiverged(whose, key, list(trainer.distillation.objectives)))
    with bar:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if not all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters()):
        raise _diverged(whose, key, trainer.state.global_step, "its weights are")


class _StopDiverged(TrainerCallback):
    """Ends a training whose loss is not finite. It looks at what is logged: that is on the host already."""

    def __init__(self, whose: str, key: str, objectives: list[str]) -> None:
        self.whose = whose
        self.key = key
        self.looked_at = ["loss", "train_loss", *objectives]  # the second is logged once, at the end

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        amiss = [name for name in self.looked_at if not math.isfinite((logs or {}).get(name, 0.0))]
        if amiss:
            named = [name for name in amiss if name in self.looked_at[2:]]
            what = f"the loss ({', '.join(named)}) is" if named else "the loss is"
            raise _diverged(self.whose, self.key, state.global_step, what)


def _diverged(whose: str, key: str, step: int, what: str) -> RecipeError:
    return RecipeError(
        f"{whose}: {what} not finite at step {step}: the training has diverged. Lower {key}.learning_rate, clip "
        f"with {key}.max_grad_norm, raise {key}.warmup_steps, or lower the weight of an objective that grows; "
        f"{key}.precision=fp32 rules out overflow. Start in another folder with --output, or delete this one."
    )
