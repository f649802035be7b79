"""How one student of the image classification study is made: data, teachers, training, what is measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.student_bench import StudentBench
from benchmarks.student_methods import Terms, shared_methods
from benchmarks.student_training import Plan
from benchmarks.study import Run

IMAGES = "/usr/share/datasets/fashion-mnist"
TEACHER_STEPS = 4000
TEACHER_WARMUP = 200
TEACHER_BATCH = 32
TEACHER_RATE = 2e-3
COMMON = {"model_type": "deit", "patch_size": 7, "hidden_dropout_prob": 0.0}
TEACHER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6}
STUDENTS = {
    3: {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
    2: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
}
TWO_HEADED = ["DeiTForImageClassificationWithTeacher"]  # class and distillation token, each with a classifier


def methods() -> dict[str, Terms]:
    """Objectives of each method for a weight and a decay of its own terms."""
    from squeezeheads.objectives import DeiTHard, LogitKD, TaskLoss

    def kd(**terms: Any) -> dict[str, Any]:
        return {"task": TaskLoss(0.5), "logits": LogitKD(0.5, temperature=2.0), **terms}

    shared = shared_methods(kd)
    return {
        **shared,
        "logit KD": lambda w, d: kd(),
        "DeiT hard": lambda w, d: {"task": TaskLoss(0.5), "logits": DeiTHard(0.5)},
        "SHD without logit KD": shared["SHD alone"],
    }


class ClassificationBench(StudentBench):
    """For students of some number of heads.

    Args:
        heads: of the student.
        work: the folder where teachers are kept.
    """

    batch = 32
    curve_samples = 1000
    weight_decay = 0.05

    def __init__(self, heads: int, work: Path) -> None:
        from squeezeheads.tasks import ImageClassification

        if not Path(IMAGES).is_dir():
            raise SystemExit(f"no images under {IMAGES}: run `make assets-data` first.")
        self.heads = heads
        super().__init__(ImageClassification(data=IMAGES, validation_size=5000), work)

    def new_teacher(self) -> Any:
        return self._build(TEACHER)

    def teacher_plan(self, seed: int) -> Plan:
        return Plan(TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE, seed, TEACHER_WARMUP, self.weight_decay)

    def new_student(self, run: Run) -> Any:
        return self._build(STUDENTS[self.heads], TWO_HEADED if run.method == "DeiT hard" else None)

    def objectives(self, run: Run) -> Mapping[str, Any]:
        return methods()[run.method](run.weight or 0.0, run.decay)

    def score(self, model: Any, samples: Any) -> float:
        """Per cent of images put into a wrong class."""
        return 100 - 100 * self.task.score(model, samples, 250)["accuracy"]

    def _build(self, changes: Mapping[str, Any], architectures: list[str] | None = None) -> Any:
        config = self.task.new_config({**COMMON, **changes}, "config")
        config.architectures = architectures
        return self.task.build(config, "sdpa")
