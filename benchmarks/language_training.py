"""How one student of the language study is made: corpora, teachers, training, what is measured on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.assets import SPEECHES, speeches_are_here
from benchmarks.study import Run

BLOCK = 128
BATCH = 8
WARMUP_SHARE = 0.1  # of the steps
EVALUATE_EVERY = 50
CURVE_BLOCKS = 64
TEACHER_WARMUP = 60
TEACHER_BATCH = 16
TEACHER_RATE = 2e-3
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8}
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
EQUAL = {**STUDENT, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
COMMON = {"num_hidden_layers": 4, "head_dim": 16, "max_position_embeddings": BLOCK}


Terms = Callable[[float, str], dict[str, Any]]


def methods() -> dict[str, Terms]:
    """Objectives of each method for a weight and a decay of its own terms."""
    from squeezeheads.objectives import (
        AttentionMSE,
        HiddenStates,
        LogitKD,
        MiniLMRelations,
        OrthogonalProjection,
        SqueezedHeads,
        SqueezedRelations,
        TaskLoss,
    )

    def kd(**terms: Any) -> dict[str, Any]:
        return {"task": TaskLoss(0.5), "logits": LogitKD(0.5), **terms}

    def heads(schedule: str, weights: str) -> Terms:
        return lambda w, d: kd(attention=SqueezedHeads(w, d, schedule=schedule, weights=weights))

    return {
        "no teacher": lambda w, d: {"task": TaskLoss(1.0)},
        "logit KD": lambda w, d: kd(),
        "SHD adjacent least_squares": heads("progressive", "least_squares"),
        "SHD similar least_squares": heads("similar", "least_squares"),
        "SHD similar least_squares + relations": lambda w, d: kd(
            attention=SqueezedHeads(w, d), relations=SqueezedRelations(w, d)
        ),
        "FitNets": lambda w, d: kd(hidden=HiddenStates(w, d)),
        "VkD": lambda w, d: kd(hidden=OrthogonalProjection(w, d)),
        "VkD whitened": lambda w, d: kd(hidden=OrthogonalProjection(w, d, normalisation="whiten")),
        "MiniLMv2": lambda w, d: kd(relations=MiniLMRelations(w, d, relation_heads=8)),
        "SHD without logit KD": lambda w, d: {"task": TaskLoss(1.0), "attention": SqueezedHeads(w, d)},
        "SHD adjacent values": heads("progressive", "values"),
        "SHD adjacent mean": heads("progressive", "mean"),
        "SHD adjacent select": heads("progressive", "select"),
        "SHD similar joint": heads("similar", "joint"),
        "SHD similar mean": heads("similar", "mean"),
        "equal heads: logit KD": lambda w, d: kd(),
        "equal heads: attention MSE": lambda w, d: kd(attention=AttentionMSE(w, d)),
        "equal heads: SHD": lambda w, d: kd(attention=SqueezedHeads(w, d)),
    }


class Bench:
    """Data, teachers and training of one corpus.

    Args:
        corpus: its name.
        work: the folder where teachers are kept.
        teacher_steps: how many steps a teacher trains.
    """

    def __init__(self, corpus: str, work: Path, teacher_steps: int) -> None:
        self.work = work
        self.teacher_steps = teacher_steps
        self.task = corpus_task(corpus)
        from squeezeheads.tasks import Pretrained

        self.splits = self.task.load_data(Pretrained({"teacher": None}))
        self.teachers: dict[int, Any] = {}

    def config(self, changes: Mapping[str, Any]) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**{**COMMON, **self.task.data_config(), **changes})

    def teacher(self, seed: int) -> Any:
        """The teacher of a seed, trained once and kept in the work folder."""
        from transformers import LlamaForCausalLM, set_seed

        from squeezeheads.objectives import TaskLoss

        folder = self.work / f"teacher-{seed}"
        if not (folder / "config.json").is_file():
            set_seed(1000 + seed)
            model = LlamaForCausalLM._from_config(self.config(TEACHER), attn_implementation="sdpa")
            task = {"task": TaskLoss()}
            self._train(model, None, task, self.teacher_steps, TEACHER_WARMUP, TEACHER_BATCH, TEACHER_RATE, 1000 + seed)
            part = folder.with_suffix(".part")
            model.save_pretrained(part)
            part.rename(folder)
        if seed not in self.teachers:
            model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
            self.teachers[seed] = (model, self._losses(model))
        return self.teachers[seed]

    def student(self, run: Run) -> dict[str, Any]:
        """Train and measure a student."""
        from transformers import LlamaForCausalLM, set_seed

        teacher, teacher_losses = self.teacher(run.seed)
        set_seed(run.seed)
        shape = EQUAL if run.method.startswith("equal heads") else STUDENT
        student = LlamaForCausalLM._from_config(self.config(shape), attn_implementation="sdpa")
        objectives = methods()[run.method](run.weight or 0.0, run.decay)
        warmup = round(WARMUP_SHARE * run.steps)
        watch = self._train(student, teacher, objectives, run.steps, warmup, BATCH, run.rate, run.seed)
        return {
            **self._losses(student),
            "teacher": teacher_losses,
            "curve": watch.curve,
            "seconds": watch.seconds,
            "terms": watch.terms,
            "parameters": student.num_parameters(),
        }

    def _losses(self, model: Any) -> dict[str, float]:
        return {
            "validation": self.task.score(model, self.splits.validation, 32)["loss"],
            "test": self.task.score(model, self.splits.test, 32)["loss"],
        }

    def _train(
        self,
        model: Any,
        teacher: Any,
        objectives: dict[str, Any],
        steps: int,
        warmup: int,
        batch: int,
        rate: float,
        seed: int,
    ) -> Any:
        from transformers import PrinterCallback, TrainingArguments

        from squeezeheads.trainer import SqueezeTrainer

        args = TrainingArguments(
            output_dir=str(self.work / f"part-{seed}-{time.time_ns()}"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=warmup,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_steps=EVALUATE_EVERY,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        watch = watcher(self.task, self.splits.validation[:CURVE_BLOCKS])
        trainer = SqueezeTrainer(
            model=model, teacher=teacher if any(o.needs for o in objectives.values()) else None, args=args,
            objectives=objectives, train_dataset=self.splits.train, targets=self.task.targets, callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for leftover in sorted(Path(args.output_dir).glob("*"), reverse=True):
            leftover.unlink()
        Path(args.output_dir).rmdir()
        return watch


def corpus_task(corpus: str) -> Any:
    """The corpus as the library's own task."""
    from squeezeheads.tasks import LanguageModeling

    if corpus == "stdlib":
        return LanguageModeling(
            train=["stdlib"], validation_share=0.05, test_share=0.1, vocabulary_size=257, block_size=BLOCK,
            max_characters=4_000_000,
        )  # fmt: skip
    if not speeches_are_here():
        raise SystemExit(f"no speeches under {SPEECHES}: run `make assets-data` first.")
    years = {file: int(file.name[:4]) for file in sorted(SPEECHES.glob("*.txt"))}
    return LanguageModeling(
        train=[str(file) for file, year in years.items() if year < 1990],
        validation=[str(file) for file, year in years.items() if 1990 <= year < 2000],
        test=[str(file) for file, year in years.items() if year >= 2000],
        vocabulary_size=1024,
        block_size=BLOCK,
    )


def watcher(task: Any, samples: Sequence[Any]) -> Any:
    """A callback that keeps the validation loss every few steps, beside the processor time that training took so far
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
                loss = task.score(model, samples, 32)["loss"]
                model.train()
                self.curve.append((state.global_step, round(self.seconds, 2), round(loss, 5)))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.terms.append({k: round(v, 5) for k, v in logs.items() if isinstance(v, float)})

    return Watch()
