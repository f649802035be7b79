"""Distillation inside Hugging Face's Trainer: everything but the loss is theirs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import is_datasets_available

from squeezeheads.adapters import AdaptersOff, shared_trained_weights
from squeezeheads.batches import (
    Inputs,
    one_pass,
    padding_rows,
)
from squeezeheads.checkpoints import WholeCheckpoints
from squeezeheads.distillation import Distillation, named_teachers
from squeezeheads.logged import check_names
from squeezeheads.objectives import Objective
from squeezeheads.plan_file import no_plan, share_plans, store_plans, take_up_plans
from squeezeheads.processes import (
    COPIES,
    check_distribution,
    check_reached,
    own_samples,
    place_projector,
    place_teacher,
)
from squeezeheads.projector_files import (
    load_projectors,
    load_states,
    store_projectors,
    store_states,
    take_out,
    trained_parameters,
)

if is_datasets_available():
    import datasets

MOST_CALIBRATION_SAMPLES = 1024
"""More say nothing new of which heads are alike, and the batches of large trainings would take minutes."""


class SqueezeTrainer(WholeCheckpoints):
    """``transformers.Trainer`` whose training loss is a ``squeezeheads.Distillation``.


        trainer = SqueezeTrainer(
            model=student, teacher=teacher, args=TrainingArguments(...), train_dataset=data,
            objectives={"task": TaskLoss(0.5), "logits": LogitKD(0.5), "attention": SqueezedHeads()},
        )
        trainer.train()

    Each objective is logged under its own name, in its own unit, as the mean over all items since the last log. Means
    are taken over the items of the whole batch: gradient accumulation, uneven batches and several processes change
    nothing. Before the first step both models are run on calibration batches from the training data and checked against
    each other; what was decided is kept in ``squeeze_plan.json``, in the output folder and in each checkpoint, and
    taken up again on resume. Evaluation is that of the student alone. No teacher is in a checkpoint. Projectors that
    objectives train are optimised with the student (at its learning rate, without weight decay or clipping) and kept in
    a checkpoint beside it, in ``projectors.safetensors``; the saved student is without them.

    In several processes each sees its share of a batch, and the loss is that of one process on the whole of it; samples
    that accelerate fills a last batch up with count nothing. Under FSDP2 teachers are frozen and sharded as the student
    is, and the models are checked once training has sharded them; ``save_model`` writes the plain student.

    Args:
        model: the student; with PEFT, its adapters are what is trained, saved and resumed.
        teacher: the teacher, several by name, or ``None`` where no objective needs one. Moved to the trainer's device.
            ``AdaptersOff(model)`` is the base of a PEFT student. Teachers are not compiled by ``args.torch_compile``.
        args: training arguments.
        objectives: name → objective.
        rows: inputs → (B, Q) query rows that count for attention, see ``Distillation``.
        targets: inputs → predictions that count; by default labels other than -100, shifted where the student's loss
            shifts them (causal language models). The task's loss is the student's own, over all labels.
        passes: inputs → the inputs of each forward pass of a batch, equally many for all batches. By default one. The
            loss is the sum of the passes' losses; an objective is logged as its mean over the items of all passes.
            Models are checked and plans are made on the first.
        **kwargs: as for ``transformers.Trainer``.

    Raises:
        ValueError: objectives without the teacher that they need, or named as a value that the trainer logs itself
            (``loss`` …); a teacher that shares trained weights with the student; ``label_smoothing_factor``,
            ``compute_loss_func`` or ``fp16`` on the CPU, which would be ignored.
    """

    # Losses are divided by the item counts of the whole accumulated batch; the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | None = None,
        args: TrainingArguments | None = None,
        *,
        objectives: Mapping[str, Objective],
        rows: Callable[[Inputs], Tensor | None] = padding_rows,
        targets: Callable[[Inputs], Tensor | None] | None = None,
        passes: Callable[[Inputs], Sequence[Inputs]] = one_pass,
        **kwargs: Any,
    ) -> None:
        check_names(objectives)
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} would be ignored: the task objective is the "
                "student's own loss. Set it to 0."
            )
        if args is not None and args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) cannot be recorded. Start one process a GPU, with "
                f"`torchrun --nproc-per-node {args.n_gpu} …` or `accelerate launch`, or show one alone: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if args is not None and args.fp16 and args.device.type == "cpu":
            raise ValueError(
                "fp16=True would be ignored on the CPU: accelerate scales losses on a GPU alone, and would train in "
                "float32. Use bf16=True, or leave it out."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would be ignored: write an Objective instead.")
        super().__init__(model=model, args=args, **kwargs)
        check_distribution(self.args, self.accelerator)
        # Whether the student can be run only when Trainer has prepared it for training.
        self._runs_late = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.distillation = Distillation(
            {name: self._place_teacher(model, name) for name, model in named_teachers(teacher).items()},
            objectives,
            rows=rows,
            targets=targets,
            loss_takes_count=self.model_accepts_loss_kwargs,
        )
        self.distillation.learn_targets(self.model)
        self.passes = passes
        # Of each pass.
        self._batch_counts: list[dict[str, Tensor]] | None = None
        self._projectors_placed = False
        self._reach_checked = self.accelerator.num_processes == 1
        self.add_callback(_ForgetGradients(self._projectors))
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(_TellEpoch(self.train_dataset.set_epoch))
        self._sums: dict[str, Tensor] = {}
        self._items: dict[str, Tensor] = {}

    def _place_teacher(self, teacher: nn.Module, name: str) -> nn.Module:
        shared = shared_trained_weights(self.model, teacher)
        if shared:
            raise ValueError(
                f"teacher {name!r} shares {len(shared)} trained weights with the student ({', '.join(shared[:2])} …): "
                "it would change with every step. After peft.get_peft_model(base) base holds the adapters too: give "
                "AdaptersOff(student) as teacher. Otherwise load the teacher by itself."
            )
        if isinstance(teacher, AdaptersOff):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "AdaptersOff is not known to work where weights are sharded (FSDP, DeepSpeed): load the teacher by "
                    "itself."
                )
            return teacher  # placed, and run in mixed precision, as the student that it is
        prepared = place_teacher(self.accelerator, teacher)
        # The student alone is compiled: output projections are found while a model runs as it is written.
        return getattr(prepared, "_orig_mod", prepared) if prepared is not teacher else prepared

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, after ``prepare``. ``resume_from_checkpoint=True`` takes the last whole checkpoint.

        Raises:
            ValueError: ``True``, and there is no whole checkpoint.
            RuntimeError: a checkpoint from which the training would go on otherwise than it was stopped.
            SavingError: a checkpoint that could not be written, on a full disk for example.
        """
        resume_from_checkpoint = self.resume_point(resume_from_checkpoint)
        if not self._runs_late:
            self.prepare(resume=self._resumed_from is not None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def prepare(self, resume: bool = False) -> None:
        """Check that student and teacher fit, and decide which layers and heads go together (once).

        Args:
            resume: take up the stored plan of an earlier start where there is one.
        """
        if self.distillation.prepared and self._projectors_placed:
            return
        if not self.distillation.prepared:
            planned = self._planned()
            if resume and take_up_plans(planned, self.plan_folders):
                if self.args.should_save:
                    store_plans(planned, Path(str(self.args.output_dir)))  # which need not be where they were found
            else:
                if self._resumed_from is not None and planned:
                    raise no_plan(self._resumed_from)
                if self.is_fsdp_enabled and not self.is_in_train:
                    self.model.to(self.args.device)  # Trainer leaves it where it is, for it to be sharded
                self.distillation.prepare(self.model, self._calibration_batches(), self._parts)
                share_plans(planned, self.args.output_dir, self.args.should_save)
        for name, objective in self.distillation.objectives.items():
            if objective.projector is not None:
                objective.projector = place_projector(self.accelerator, objective.projector, name)
        self._projectors_placed = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As ``Trainer.create_optimizer``, and a group for the projectors of objectives."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not self._runs_late:
            self._add_projectors(optimizer, given)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As ``Trainer.create_scheduler``. Under FSDP and DeepSpeed the models are checked here and the projectors
        made: Trainer has sharded the student and its optimizer by now, and accelerate (1.15) shards no optimizer that
        holds more. With an optimizer DeepSpeed's engine calls it, before the student can be run."""
        if self._runs_late and optimizer is None:
            self.prepare(resume=self._resumed_from is not None)
            self._add_projectors(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _add_projectors(self, optimizer: torch.optim.Optimizer, given: bool = False) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in trained_parameters(self._projectors()) if id(p) not in held]
        if missing and given:
            raise ValueError(
                f"the optimizer that was given lacks the projectors of {', '.join(self._projectors())}: call prepare() "
                "first and add objective.projector's parameters, or let the trainer make the optimizer."
            )
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})

    def _projectors(self) -> dict[str, nn.Module]:
        """Unwrapped, by the name of their objective."""
        return {
            name: self.accelerator.unwrap_model(objective.projector, keep_torch_compile=False)
            for name, objective in self.distillation.objectives.items()
            if objective.projector is not None
        }

    def _planned(self) -> dict[str, Objective]:
        """The objectives that decide something before training, by name."""
        return {name: o for name, o in self.distillation.objectives.items() if o.plan_options}

    def _write_beside(self, checkpoint: Path) -> None:
        if not self.args.should_save:
            return
        store_plans(self._planned(), checkpoint)
        if projectors := self._projectors():
            store_projectors(projectors, checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer; under FSDP the projectors' part goes into a file of its own, for torch looks up whatever an
        optimizer holds in the sharded model."""
        projectors = self._projectors()
        if not projectors or not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = _bare(self.optimizer)
        group, states = take_out(optimizer, trained_parameters(projectors))
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            optimizer.param_groups.append(group)
            optimizer.state.update(states)
        if self.args.should_save:
            store_states(projectors, states, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        projectors = self._projectors()
        if checkpoint is None or not projectors or not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = _bare(self.optimizer)
        group, _ = take_out(optimizer, trained_parameters(projectors))
        super()._load_optimizer_and_scheduler(checkpoint)
        group["lr"] = self.lr_scheduler.get_last_lr()[-1]
        optimizer.param_groups.append(group)
        optimizer.state.update(load_states(projectors, Path(checkpoint)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The plain student, under FSDP too: call it in every process. In checkpoints Trainer leaves it out where
        ``fsdp_config`` asks for state in shards."""
        sharded = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if sharded and not _internal_call:
            return self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss while training; the student's own loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        inputs = dict(inputs)
        real = 0.0 if inputs.pop(COPIES, False) else 1.0
        losses, outputs = [], None
        for index, part in enumerate(self.passes(inputs)):
            counts = None if self._batch_counts is None else self._batch_counts[index]
            out = self.distillation(model, part, progress=progress, counts=counts)
            losses.append(out.loss * real)
            outputs = out.student_outputs
            for name, value in out.terms.items():
                count = out.counts[name]
                count = count * real
                self._sums[name] = self._sums.get(name, 0.0) + torch.where(count > 0, value * count, 0.0)
                self._items[name] = self._items.get(name, 0.0) + count
        # Gradients are averaged over processes, but the shares of all processes add up to the loss.
        loss = torch.stack(losses).sum() * self.accelerator.num_processes
        if not self._reach_checked:
            check_reached(loss, outputs, self.model)
            self._reach_checked = True
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each objective's mean since the last log."""
        if self._sums and "loss" in logs:
            names = list(self._sums)
            pairs = torch.stack([torch.stack([self._sums[n], self._items[n]]).double() for n in names])
            pairs = self.accelerator.reduce(pairs, reduction="sum")
            for name, (total, items) in zip(names, pairs.tolist(), strict=True):
                logs[name] = total / items if items > 0 else 0.0
            self._sums.clear()
            self._items.clear()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if projectors := self._projectors():
            load_projectors(projectors, Path(resume_from_checkpoint))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As ``Trainer.get_batch_samples``; counts each objective's items in the whole batch, over accumulation steps
        and processes. Only the training loop calls this, and it does so before the student is back in training mode
        after an evaluation."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            samples[-1] = own_samples(self.accelerator, samples[-1])
        counts = [self._counts_of_passes(batch) for batch in samples]
        zero = torch.zeros((), device=device)
        self._batch_counts = []
        for parts in zip(*counts, strict=True):
            mine = {name: sum((c[name].to(device) for c in parts), zero) for name in self.distillation.objectives}
            self._batch_counts.append({n: self.accelerator.reduce(v, reduction="sum") for n, v in mine.items()})
        return samples, items

    def _counts_of_passes(self, batch: Inputs) -> list[dict[str, Tensor]]:
        own = {key: value for key, value in batch.items() if key != COPIES}
        real = 0.0 if COPIES in batch else 1.0
        return [{n: c * real for n, c in self.distillation.count(part).items()} for part in self.passes(own)]

    @property
    def _parts(self) -> int:
        """Of a step's batch."""
        return self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def _calibration_batches(self) -> list[dict[str, Any]]:
        """The samples of a few steps' batches, in parts that a model is run on: the same samples in every process,
        however a step's batch is divided into accumulated parts and processes, and for every start with this seed.
        Drawing on no global generator."""
        data, wanted = self.train_dataset, self.distillation.calibration_batches
        if data is None:
            raise ValueError(
                "train_dataset is None: the attention objective needs training data to check the models on."
            )
        part = self._train_batch_size
        if self.accelerator.split_batches:  # a batch is that of all processes
            part = max(part // self.accelerator.num_processes, 1)
        count = min(wanted * self._parts * part, MOST_CALIBRATION_SAMPLES)
        columns = {"description": "Calibration"}
        if is_datasets_available() and isinstance(data, datasets.Dataset):
            data, collate = self._remove_unused_columns(data, **columns), self.data_collator
        else:
            collate = self._get_collator_with_removed_columns(self.data_collator, **columns)
        if hasattr(data, "__len__"):
            generator = torch.Generator().manual_seed(self.args.seed)
            chosen = torch.randperm(len(data), generator=generator)[:count].tolist()
            data = data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)
        batches = []
        python, numpy_state = random.getstate(), np.random.get_state()  # augmentation may draw on these
        with torch.random.fork_rng():
            # Not one that accelerate divides among the processes.
            for batch in islice(DataLoader(data, part, collate_fn=collate), -(-count // part)):
                batches.append(dict(self.passes(self._prepare_inputs(batch))[0]))
        random.setstate(python)
        np.random.set_state(numpy_state)
        return batches


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


class _ForgetGradients(TrainerCallback):
    """Clears the projectors' gradients after each optimiser step: Trainer clears those of the model alone."""

    def __init__(self, projectors: Callable[[], Mapping[str, nn.Module]]) -> None:
        self.projectors = projectors

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for module in self.projectors().values():
            module.zero_grad()

    on_optimizer_step = on_train_begin


class _TellEpoch(TrainerCallback):
    """Tells a data set the epoch: accelerate (1.15) doesn't where batches are skipped on resume, nor where several
    processes share them."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.set_epoch(int(state.epoch or 0))
