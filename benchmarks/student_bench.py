"""What the benches of all studies share: teachers that are trained once, students that are measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.student_training import Plan, train, trained_once
from benchmarks.study import Run

WARMUP_SHARE = 0.1  # of a student's steps


class StudentBench:
    """A study's ``Bench``. Subclasses say which models, objectives and score.

    Args:
        task: the library's own, with its data.
        work: the folder where teachers are kept.
    """

    batch: int
    """Samples of a student's step."""
    curve_samples: int
    """Validation samples that a curve is measured on."""
    weight_decay = 0.01

    def __init__(self, task: Any, work: Path) -> None:
        from squeezeheads.tasks import Pretrained

        self.task = task
        self.work = work
        self.splits = task.load_data(Pretrained({"teacher": None}))
        self.teachers: dict[int, Any] = {}

    def new_teacher(self) -> Any:
        """With random weights."""
        raise NotImplementedError

    def teacher_plan(self, seed: int) -> Plan:
        """How a teacher is trained."""
        raise NotImplementedError

    def new_student(self, run: Run) -> Any:
        """With random weights."""
        raise NotImplementedError

    def objectives(self, run: Run) -> Mapping[str, Any]:
        """What a student learns by."""
        raise NotImplementedError

    def score(self, model: Any, samples: Any) -> float:
        """The less the better."""
        raise NotImplementedError

    def teacher(self, seed: int) -> tuple[Any, dict[str, float]]:
        """The teacher of a seed and its scores, trained once and kept in the work folder."""
        if seed not in self.teachers:
            folder = trained_once(self.work / f"teacher-{seed}", lambda: self._trained_teacher(1000 + seed))
            model = self.task.load(str(folder)).eval()
            self.teachers[seed] = (model, self._scores(model))
        return self.teachers[seed]

    def _trained_teacher(self, seed: int) -> Any:
        from transformers import set_seed

        from squeezeheads.objectives import TaskLoss

        set_seed(seed)
        model = self.new_teacher()
        self._train(model, None, {"task": TaskLoss()}, self.teacher_plan(seed))
        return model

    def student(self, run: Run) -> dict[str, Any]:
        """Train and measure a student."""
        return self.trained_student(run)[1]

    def trained_student(self, run: Run) -> tuple[Any, dict[str, Any]]:
        """The student too."""
        from transformers import set_seed

        teacher, teacher_scores = self.teacher(run.seed)
        set_seed(run.seed)
        student = self.new_student(run)
        warmup = round(WARMUP_SHARE * run.steps)
        plan = Plan(run.steps, self.batch, run.rate, run.seed, warmup, self.weight_decay)
        watch = self._train(student, teacher, self.objectives(run), plan)
        return student, {
            **self._scores(student),
            "teacher": teacher_scores,
            "curve": watch.curve,
            "seconds": watch.seconds,
            "terms": watch.terms,
            "parameters": student.num_parameters(),
        }

    def _scores(self, model: Any) -> dict[str, float]:
        return {part: self.score(model, getattr(self.splits, part)) for part in ("validation", "test")}

    def _train(self, model: Any, teacher: Any, objectives: Mapping[str, Any], plan: Plan) -> Any:
        samples = _First(self.splits.validation, self.curve_samples)
        data = self.task.training_data(self.splits.train, model, plan.seed)
        return train(
            model, teacher, objectives, self.task, data, plan, self.work, lambda model: self.score(model, samples)
        )


class _First(Sequence[Any]):
    """The first samples of a split, read when they are asked for."""

    def __init__(self, samples: Sequence[Any], count: int) -> None:
        self.samples = samples
        self.count = min(count, len(samples))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.samples[index]
