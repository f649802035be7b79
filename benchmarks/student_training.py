"""One training of a study, teacher's or student's, and what is seen on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALUATE_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """How a model is trained: AdamW, linear warm-up, cosine decay to 0."""

    steps: int
    batch: int
    rate: float
    seed: int
    warmup: int
    """Steps."""
    weight_decay: float = 0.01


def train(
    model: Any,
    teacher: Any,
    objectives: Mapping[str, Any],
    task: Any,
    data: Any,
    plan: Plan,
    work: Path,
    probe: Callable[[Any], float],
) -> Any:
    """Train a model in place.

    Args:
        teacher: asked only where an objective needs one.
        task: whose rows and targets count.
        data: the task's ``TrainingData``.
        work: folder for the trainer's own, removed at the end.
        probe: what of the model is kept every ``EVALUATE_EVERY`` steps; its time is not counted.

    Returns:
        The watcher, with ``curve``, ``terms`` and ``seconds``.
    """
    from transformers import PrinterCallback, TrainingArguments

    from squeezeheads.trainer import SqueezeTrainer

    args = TrainingArguments(
        output_dir=str(work / f"part-{plan.seed}-{time.time_ns()}"),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=plan.rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup,
        weight_decay=plan.weight_decay,
        max_grad_norm=1.0,
        seed=plan.seed,
        data_seed=plan.seed,
        save_strategy="no",
        logging_steps=EVALUATE_EVERY,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,  # the collator takes more than the model does
    )
    watch = watcher(probe)
    trainer = SqueezeTrainer(
        model=model, teacher=teacher if any(o.needs for o in objectives.values()) else None, args=args,
        objectives=dict(objectives), rows=task.rows, targets=task.targets, passes=data.passes,
        train_dataset=data.samples, data_collator=data.collate, callbacks=[*data.callbacks, watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for leftover in sorted(Path(args.output_dir).glob("*"), reverse=True):
        leftover.unlink()
    Path(args.output_dir).rmdir()
    return watch


def trained_once(folder: Path, make: Callable[[], Any]) -> Path:
    """The folder of a model that is made and saved where it is not there yet."""
    if not (folder / "config.json").is_file():
        part = folder.with_suffix(".part")
        make().save_pretrained(part)
        part.rename(folder)
    return folder


def watcher(probe: Callable[[Any], float]) -> Any:
    """A callback that keeps what ``probe`` says every few steps, beside the processor time that training took so far
    (measuring left out: the machines are shared, and a process's own time is what is steady)."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.curve: list[tuple[int, float, float]] = []
            self.terms: list[dict[str, float]] = []
            self.seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seconds += time.process_time() - self._began
            if state.global_step % EVALUATE_EVERY == 0:
                score = probe(model)
                model.train()
                self.curve.append((state.global_step, round(self.seconds, 2), round(score, 5)))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.terms.append({k: round(v, 5) for k, v in logs.items() if isinstance(v, float)})

    return Watch()
