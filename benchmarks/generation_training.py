"""How one student of the image generation study is made: data, teachers, training, samples and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.student_bench import StudentBench
from benchmarks.student_methods import Terms, shared_methods
from benchmarks.student_training import Plan
from benchmarks.study import Run

IMAGES = "/usr/share/datasets/fashion-mnist"
TEACHER_STEPS = 1500
TEACHER_WARMUP = 100
TEACHER_BATCH = 32
TEACHER_RATE = 2e-3
EMA_DECAY = 0.99
TEACHER = {
    "dit": {"num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 6, "patch_size": 4},
    "mdt": {
        "num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 6, "num_decoder_layers": 2, "patch_size": 4,
    },
}  # fmt: skip
STUDENT = {"num_attention_heads": 3, "num_layers": 4}
# In the masked pass encoder and decoder see other tokens: encoder learns from encoder, decoder from decoder.
LAYERS: dict[str, Any] = {"dit": "uniform", "mdt": [[0, 1], [1, 3], [2, 4], [3, 5]]}


def methods(kind: str = "dit") -> dict[str, Terms]:
    """Objectives of each method for a weight and a decay of its own terms."""
    from squeezeheads.objectives import OrthogonalProjection, PredictionMatching, TaskLoss

    def matched(**terms: Any) -> dict[str, Any]:
        return {"task": TaskLoss(1.0), "logits": PredictionMatching(1.0), **terms}

    shared = shared_methods(matched, LAYERS[kind])
    return {
        **shared,
        "prediction matching": lambda w, d: matched(),
        "features": shared["FitNets"],
        "VkD features": lambda w, d: matched(hidden=OrthogonalProjection(w, d, layers=LAYERS[kind])),
        "SHD without matching": shared["SHD alone"],
    }


class GenerationBench(StudentBench):
    """For one kind of denoiser.

    Args:
        kind: "dit" or "mdt".
        work: the folder where teachers are kept, and students for the samples that are drawn later.
    """

    batch = 32
    curve_samples = 250
    weight_decay = 0.0

    def __init__(self, kind: str, work: Path) -> None:
        from squeezeheads.diffusion.specs import DiffusionSpec, SamplingSpec
        from squeezeheads.tasks import ImageGeneration

        if not Path(IMAGES).is_dir():
            raise SystemExit(f"no images under {IMAGES}: run `make assets-data` first.")
        self.kind = kind
        task = ImageGeneration(
            data=IMAGES,
            validation_size=2000,
            test_size=5000,
            diffusion=DiffusionSpec(schedule="squaredcos_cap_v2", min_snr=5.0, ema_decay=EMA_DECAY),
            sampling=SamplingSpec(sampler="ddim", steps=10, guidance=2.0, images=5000, batch_size=125),
        )
        super().__init__(task, work)

    def new_teacher(self) -> Any:
        return self.task.build(self._teacher_config(), "sdpa")

    def teacher_plan(self, seed: int) -> Plan:
        return Plan(TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE, seed, TEACHER_WARMUP, self.weight_decay)

    def new_student(self, run: Run) -> Any:
        return self.task.build(self.task.new_config(STUDENT, "student.config", self._teacher_config()), "sdpa")

    def objectives(self, run: Run) -> Mapping[str, Any]:
        return methods(self.kind)[run.method](run.weight or 0.0, run.decay)

    def score(self, model: Any, samples: Any) -> float:
        """Mean squared error of the predicted noise, per element, in per cent of the noise's own."""
        return 100 * self.task.score(model, samples, 125)["noise_error"]

    def student(self, run: Run) -> dict[str, Any]:
        """Train, measure and keep a student."""
        student, line = self.trained_student(run)
        student.save_pretrained(self.folder(run))
        return line

    def folder(self, run: Run) -> Path:
        """Where a student is kept."""
        name = f"{run.method} {run.weight} {run.decay} {run.rate:g} {run.seed} {run.steps}"
        return self.work / "students" / name.replace(" ", "_")

    def _teacher_config(self) -> Any:
        return self.task.new_config({"model_type": self.kind, **TEACHER[self.kind]}, "teacher.config")
