"""What goes on beside the steps of a diffusion training: averaged weights, grids of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

EMA_FILE = "ema.safetensors"


class AveragedWeights(TrainerCallback):
    """Exponential moving average of the weights by diffusers' ``EMAModel``; at the end of training it takes the
    weights' place, so that what is saved and measured is the average.

    The decay rises as (1 + n) / (10 + n) over the steps n up to its full value, as diffusers has it. A checkpoint
    keeps the average in ``ema.safetensors``, written before the rest of it.

    Args:
        model: whose parameters.
        decay: full decay.

    Raises:
        RuntimeError: on resume, a checkpoint without an average, or with that of another model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self._average: EMAModel | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._average = EMAModel(self.model.parameters(), decay=self.decay)
        if state.global_step:
            self._load(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / EMA_FILE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._average is not None
        self._average.step(self.model.parameters())
        self._save_if_due(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._save_if_due(args, state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._average is not None
        self._average.copy_to(self.model.parameters())

    def averaged(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives with the averaged weights in place; during training alone."""
        if self._average is None:
            return compute()
        self._average.store(self.model.parameters())
        self._average.copy_to(self.model.parameters())
        try:
            return compute()
        finally:
            self._average.restore(self.model.parameters())

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if not (control.should_save and args.should_save):
            return
        assert self._average is not None
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.model.named_parameters()]
        tensors = {name: t.contiguous() for name, t in zip(names, self._average.shadow_params, strict=True)}
        save_file(tensors, folder / EMA_FILE, metadata={"steps": str(self._average.optimization_step)})

    def _load(self, file: Path) -> None:
        assert self._average is not None
        if not file.is_file():
            raise RuntimeError(f"{file} is missing: the checkpoint is that of a run without averaged weights.")
        with safe_open(file, framework="pt") as stored:
            names = [name for name, _ in self.model.named_parameters()]
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
            mine = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
            if shapes != mine:
                raise RuntimeError(f"{file} holds the weights of another model.")
            shadow = [stored.get_tensor(name) for name in names]
            steps = int(stored.metadata()["steps"])
        device = next(self.model.parameters()).device
        self._average.shadow_params = [tensor.to(device) for tensor in shadow]
        self._average.optimization_step = steps


class SampleGrids(TrainerCallback):
    """Writes a grid of samples every so many steps, and one at the end.

    Args:
        draw: writes a grid to a file.
        folder: where the files ``step-N.png`` go.
        every: steps between grids; 0 writes the last alone.
        weights: with whose averaged weights it is drawn; at the end they are in place already.
    """

    def __init__(
        self, draw: Callable[[Path], None], folder: Path, every: int, weights: AveragedWeights | None = None
    ) -> None:
        self.draw, self.folder, self.every, self.weights = draw, folder, every, weights

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._write(state.global_step, self.weights)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(state.global_step, None)

    def _write(self, step: int, weights: AveragedWeights | None) -> None:
        file = self.folder / f"step-{step:06d}.png"
        with torch.no_grad():
            if weights is None:
                self.draw(file)
            else:
                weights.averaged(lambda: self.draw(file))
