"""On-policy distillation: TRL's trainer samples from the student and compares logits; the attention terms are added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProcessorMixin
from trl import DistillationTrainer

from squeezeheads.checkpoints import WholeCheckpoints
from squeezeheads.logged import check_names
from squeezeheads.objectives import Evidence, Objective
from squeezeheads.plan_file import no_plan, share_plans, store_plans, take_up_plans
from squeezeheads.recording import record_attention

# Attention that never calls scaled_dot_product_attention. Names that are not known are left to the recording.
_NOT_RECORDED = ("eager", "flash", "flex")

# What TRL (1.16) logs beside transformers' Trainer.
_LOGGED = frozenset({"entropy", "num_tokens", "step_time"})


class SqueezeDistillationTrainer(WholeCheckpoints, DistillationTrainer):
    """TRL's ``DistillationTrainer`` with attention objectives added to its loss.


        trainer = SqueezeDistillationTrainer(
            model=student, teacher_model=teacher, args=trl.DistillationConfig(...), train_dataset=prompts,
            processing_class=tokenizer, objectives={"attention": SqueezedHeads()},
        )
        trainer.train()

    TRL samples completions from the student, runs both models on them and compares their logits (``beta=1`` in its
    config: reverse KL). The attention of those same two passes is recorded, and Σ weight · scale · value of the
    objectives is added. No model runs a second time, generation is not recorded, and TRL's own part of the loss is what
    it is without the objectives.

    Rows: the query rows that predict a token which TRL's loss counts, so row ``i`` counts where token ``i + 1`` is a
    completion token and no answer of a tool; the last prompt token is the first such row. Rows and TRL's tokens are
    equally many and are divided by the same number, all those of the step: gradient accumulation, uneven batches and
    several processes change nothing.

    Each objective is logged under its own name, in its own unit, as the mean over all rows since the last log; ``loss``
    is the total. Objectives that are not prepared yet are prepared on the first training batch, the student's first
    samples, for which all layers are recorded. What was decided is kept in ``squeeze_plan.json``, in the output folder
    and in each checkpoint, and taken up again on resume. Evaluation is TRL's own.

    Args:
        model: the student, as for TRL.
        teacher_model: the teacher, as for TRL. It must run here: a server's attention cannot be seen.
        args: ``trl.DistillationConfig``.
        objectives: name → objective that needs attention and nothing else.
        **kwargs: as for ``trl.DistillationTrainer``.

    Raises:
        ValueError: no teacher, or one behind a server; an objective that needs more than attention, or whose name is
            one of the trainer's own; eager, flash or flex attention; a vision-language processor.
        RecordingError: in the first step, if attention cannot be recorded for another reason (re-entrant gradient
            checkpointing, a kernel other than ``scaled_dot_product_attention``).

    Source: SHD with MiniLLM in arXiv 2502.07436; here with TRL's reverse KL on the student's samples, not with
    MiniLLM's policy gradient. METHOD §4.
    """

    def __init__(
        self,
        model: nn.Module | str,
        teacher_model: nn.Module | str,
        args: Any = None,
        *,
        objectives: Mapping[str, Objective],
        **kwargs: Any,
    ) -> None:
        _check_objectives(objectives)
        if teacher_model is None or getattr(args, "teacher_model_server_url", None) is not None:
            raise ValueError(
                "the attention of a teacher behind a server cannot be recorded: pass teacher_model, and "
                "trl.DistillationConfig as args."
            )
        super().__init__(model=model, teacher_model=teacher_model, args=args, **kwargs)
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "vision-language models are not supported: attention inside their image tower has no rows that answer "
                "to completion tokens."
            )
        for whose, one in (("student", self.model), ("teacher", self.teacher_model)):
            kernel = str(getattr(one.config, "_attn_implementation", None))
            if any(kind in kernel for kind in _NOT_RECORDED):
                raise ValueError(
                    f"the {whose} has attn_implementation={kernel!r}, which cannot be recorded: load it with "
                    'attn_implementation="sdpa".'
                )
        self.objectives = dict(objectives)
        self._sums: dict[str, Tensor] = {}
        self._rows_seen: Tensor | float = 0.0
        # What this training decides, or the one that it goes on from.
        self._planned: dict[str, Objective] = {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a resumed run takes up its stored plan."""
        resume_from_checkpoint = self.resume_point(resume_from_checkpoint)
        self._planned = self._unprepared()
        if resume_from_checkpoint and self._planned:
            if not take_up_plans(self._planned, self.plan_folders):
                raise no_plan(resume_from_checkpoint)
            if self.args.should_save:
                store_plans(self._planned, Path(str(self.args.output_dir)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _write_beside(self, checkpoint: Path) -> None:
        if self.args.should_save:
            store_plans(self._planned, checkpoint)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """TRL's, whose order in each epoch is the one that it would have had without a resume."""
        sampler = super()._get_train_sampler(dataset)
        return _EpochOrder(sampler, lambda: int(self.state.epoch or 0)) if sampler.shuffle else sampler

    def _lost_order(self) -> None:
        """None: TRL's sampler draws by a generator of its own."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss plus the attention terms while training; TRL's alone in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        planned = all(objective.prepared for objective in self.objectives.values())
        student_positions = self._positions("student") if planned else None
        teacher_positions = self._positions("teacher") if planned else None
        # TRL runs the teacher inside the student's forward pass (`_forward_redirection`), so a recording of the whole
        # student would hold the teacher's layers too. The backbones, which TRL calls, run one after the other.
        with (
            record_attention(self._backbone(model), layers=student_positions) as learned,
            record_attention(self._backbone(self.teacher_model), layers=teacher_positions) as taught,
        ):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

        rows = _predicting_rows(inputs)
        evidence = Evidence(
            {
                "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            },
            student=None,  # TRL asks for hidden states and forms no whole logits
            learned=dict(zip(student_positions or range(len(learned)), learned, strict=True)),
            taught=dict(zip(teacher_positions or range(len(taught)), taught, strict=True)),
            rows=rows,
            targets=rows,
        )
        if not planned:
            self._prepare_objectives(evidence)
        # TRL divides its sum over tokens by this number too: all tokens of the step, over the processes between which
        # gradients are averaged.
        items = inputs["num_items_in_batch"].to(loss.device).clamp(min=1) / self.accelerator.num_processes
        count = rows.sum().to(loss.device)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        for name, objective in self.objectives.items():
            value = objective(evidence).to(loss.device)
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * count
            loss = loss + objective.weight_at(progress) * objective.scale * (count / items) * value
        self._rows_seen = self._rows_seen + count
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each objective's mean since the last log."""
        if self._sums and "loss" in logs:
            totals = torch.stack([torch.as_tensor(t).double() for t in (self._rows_seen, *self._sums.values())])
            rows, *sums = self.accelerator.reduce(totals, reduction="sum").tolist()
            logs.update({name: total / max(rows, 1.0) for name, total in zip(self._sums, sums, strict=True)})
            self._sums.clear()
            self._rows_seen = 0.0
        super().log(logs, start_time)

    def _backbone(self, model: nn.Module) -> nn.Module:
        """The module whose forward pass TRL runs for its loss: the model without its output head."""
        bare = self.accelerator.unwrap_model(model)
        return (bare.get_base_model() if is_peft_model(bare) else bare).base_model

    def _positions(self, whose: str) -> list[int]:
        return sorted(set().union(*(getattr(o, f"{whose}_positions") for o in self.objectives.values())))

    def _prepare_objectives(self, evidence: Evidence) -> None:
        """Pair layers and heads on the first batch, where the user has not done so."""
        unprepared = self._unprepared()
        with torch.no_grad():
            for objective in unprepared.values():
                objective.prepare([evidence])
        share_plans(unprepared, self.args.output_dir, self.args.should_save)

    def _unprepared(self) -> dict[str, Objective]:
        return {name: objective for name, objective in self.objectives.items() if not objective.prepared}


class _EpochOrder(Sampler[int]):
    """TRL's ``RepeatSampler`` (1.16) with an order that the number of the epoch decides: its own generator goes on from
    epoch to epoch, and a resumed training would begin with it anew.

    Args:
        sampler: as it is at the beginning of a training.
        epoch: the number of the epoch that begins.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self._sampler, self._epoch = sampler, epoch
        self._start = sampler.generator.get_state()

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator.set_state(self._start)
        for _ in range(self._epoch()):
            torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        return iter(self._sampler)


def _check_objectives(objectives: Mapping[str, Objective]) -> None:
    if not objectives:
        raise ValueError("objectives is empty: expected at least one, for example {'attention': SqueezedHeads()}.")
    for name, objective in objectives.items():
        if not isinstance(objective, Objective):
            raise TypeError(f"objectives[{name!r}] is a {type(objective).__name__}, expected an Objective.")
        if objective.needs != {"attention"}:
            raise ValueError(
                f"objectives[{name!r}] is a {type(objective).__name__}, but only objectives on attention alone can be "
                "added here: TRL's own loss compares the logits, and a sampled completion has no labels."
            )
    check_names(objectives, _LOGGED)


def _predicting_rows(inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, P + C) bool: rows of prompt and completion that predict a token which TRL's loss counts.

    TRL compares hidden states ``P - 1 … P + C - 2`` under a mask over completion tokens ``0 … C - 1``: row ``i``
    predicts token ``i + 1``.
    """
    counted = inputs["completion_mask"].bool()
    if inputs.get("tool_mask") is not None:
        counted = counted & inputs["tool_mask"].bool()
    before = counted.new_zeros(counted.shape[0], inputs["prompt_ids"].shape[1] - 1)
    return torch.cat([before, counted, torch.zeros_like(counted[:, :1])], dim=1)
