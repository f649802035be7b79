"""How one student of the language study is made: corpora, teachers, training, what is measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.assets import SPEECHES, speeches_are_here
from benchmarks.student_bench import StudentBench
from benchmarks.student_methods import Terms, shared_methods
from benchmarks.student_training import Plan
from benchmarks.study import Run

BLOCK = 128
TEACHER_WARMUP = 60
TEACHER_BATCH = 16
TEACHER_RATE = 2e-3
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8}
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
EQUAL = {**STUDENT, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
COMMON = {"num_hidden_layers": 4, "head_dim": 16, "max_position_embeddings": BLOCK}


def methods() -> dict[str, Terms]:
    """Objectives of each method for a weight and a decay of its own terms."""
    from squeezeheads.objectives import (
        AttentionMSE,
        LogitKD,
        MiniLMRelations,
        OrthogonalProjection,
        SqueezedHeads,
        TaskLoss,
    )

    def kd(**terms: Any) -> dict[str, Any]:
        return {"task": TaskLoss(0.5), "logits": LogitKD(0.5), **terms}

    shared = shared_methods(kd)
    return {
        **shared,
        "logit KD": lambda w, d: kd(),
        "VkD whitened": lambda w, d: kd(hidden=OrthogonalProjection(w, d, normalisation="whiten")),
        "MiniLMv2": lambda w, d: kd(relations=MiniLMRelations(w, d, relation_heads=8)),
        "SHD without logit KD": shared["SHD alone"],
        "equal heads: logit KD": lambda w, d: kd(),
        "equal heads: attention MSE": lambda w, d: kd(attention=AttentionMSE(w, d)),
        "equal heads: SHD": lambda w, d: kd(attention=SqueezedHeads(w, d)),
    }


class LanguageBench(StudentBench):
    """For one corpus.

    Args:
        corpus: its name.
        work: the folder where teachers are kept.
        teacher_steps: how many steps a teacher trains.
    """

    batch = 8
    curve_samples = 64

    def __init__(self, corpus: str, work: Path, teacher_steps: int) -> None:
        self.teacher_steps = teacher_steps
        super().__init__(corpus_task(corpus), work)

    def new_teacher(self) -> Any:
        return self._build(TEACHER)

    def teacher_plan(self, seed: int) -> Plan:
        return Plan(self.teacher_steps, TEACHER_BATCH, TEACHER_RATE, seed, TEACHER_WARMUP)

    def new_student(self, run: Run) -> Any:
        return self._build(EQUAL if run.method.startswith("equal heads") else STUDENT)

    def objectives(self, run: Run) -> Mapping[str, Any]:
        return methods()[run.method](run.weight or 0.0, run.decay)

    def score(self, model: Any, samples: Any) -> float:
        """Loss, in nats per token."""
        return self.task.score(model, samples, 32)["loss"]

    def _build(self, changes: Mapping[str, Any]) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{**COMMON, **self.task.data_config(), **changes})
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


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
