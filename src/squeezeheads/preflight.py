"""Before any training: the models of a recipe, and every check that needs no trained weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from squeezeheads.distillation import Distillation
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import DISTILLED, Recipe, TrainingSpec, dump_recipe
from squeezeheads.tasks import Splits, Task
from squeezeheads.tasks.modeling import similar

TEACHER_SEED = 0

# Options of TrainingArguments that would undo what makes students comparable, or that a run has no use for.
REFUSED = {
    "num_train_epochs",
    "resume_from_checkpoint",
    "eval_strategy",
    "load_best_model_at_end",
    "label_smoothing_factor",
    "push_to_hub",
}


@dataclass
class Models:
    """How the models of a recipe are made."""

    task: Task
    recipe: Recipe

    def __post_init__(self) -> None:
        self.teacher_configs: dict[str, Any] = {}
        for name, spec in self.recipe.named_teachers.items():
            key = self.recipe.teacher_key(name)
            if spec.path is None:
                self.teacher_configs[name] = self.task.new_config(spec.config, f"{key}.config")
            else:
                self.teacher_configs[name] = self.task.adapt_config(
                    self.task.pretrained_config(spec.path, f"{key}.path")
                )
        student = self.recipe.student
        if student.path is None:
            base = next(iter(self.teacher_configs.values()))
            self.student_config = self.task.new_config(student.config, "student.config", base)
        else:
            self.student_config = self.task.adapt_config(self.task.pretrained_config(student.path, "student.path"))

    def new_teacher(self, name: str) -> PreTrainedModel:
        """The pretrained teacher, or one with random weights."""
        spec = self.recipe.named_teachers[name]
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        set_seed(TEACHER_SEED)
        return self.task.build(copy.deepcopy(self.teacher_configs[name]), spec.attn_implementation)

    def new_student(self, seed: int) -> PreTrainedModel:
        """A student as it is before training: the same for every set of objectives."""
        spec = self.recipe.student
        set_seed(seed)  # a pretrained student too: a head that its checkpoint lacks is drawn at random
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        return self.task.build(copy.deepcopy(self.student_config), spec.attn_implementation)


def check_output(output: Path, recipe: Recipe, parts: Sequence[str] | None = None) -> None:
    """One output folder belongs to one recipe: results of different recipes must not mix.

    Args:
        parts: the parts of the recipe that must agree; all by default.
    """
    mine = json.loads(json.dumps(dump_recipe(recipe)))
    stored = output / "recipe.json"
    if stored.is_file():
        try:
            theirs = json.loads(stored.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"{stored} is damaged: {error}. Delete the folder, or choose another.") from error
        different = sorted(_different_keys(mine, theirs))
        if parts is not None:
            different = [key for key in different if key.split(".")[0] in parts]
        if different:
            raise RecipeError(
                f"output={output} holds a run of another recipe: {', '.join(different)} differ. Choose another folder "
                "with --output, or delete this one."
            )
    elif output.exists() and not output.is_dir():
        raise RecipeError(f"output={output} is a file: expected a folder, new or of an earlier start of this run.")
    elif output.exists() and any(output.iterdir()):
        raise RecipeError(f"output={output} exists and is no run of squeezeheads. Choose another folder with --output.")


def _different_keys(a: Any, b: Any, key: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {*a, *b}:
            yield from _different_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key


def check_models(models: Models, recipe: Recipe, splits: Splits) -> None:
    """One batch through all models, trained or not: what does not fit shows before hours are spent."""
    task = models.task
    try:
        teachers: dict[str, nn.Module] = {name: models.new_teacher(name) for name in recipe.named_teachers}
        student = models.new_student(recipe.seeds[0])
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f'a model cannot be loaded or built: {error} Attention is recorded under attn_implementation="sdpa" alone.'
        ) from error
    for name, teacher in teachers.items():
        task.check_model(teacher.config, recipe.teacher_key(name))
    task.check_model(student.config, "student")
    data = task.training_data(splits.train, student, recipe.seeds[0])
    batch = data.collate([data.samples[index] for index in range(min(4, len(data.samples)))])
    first, *others = data.passes(batch)
    for name, objectives in recipe.arms.items():
        where = "objectives" if name == DISTILLED else f"baselines.{name}"
        for objective_name, objective in objectives.items():
            task.check_objective(objective, f"{where}.{objective_name}")
        try:
            trial = Distillation(teachers, copy.deepcopy(objectives), rows=task.rows, targets=task.targets)
            trial.prepare(student, [first])
            with torch.no_grad():
                for part in (first, *others):
                    trial(student, part)
        except (ValueError, TypeError, RuntimeError) as error:
            # RuntimeError: recording, or shapes that a model refuses.
            raise RecipeError(f"{where}: {error}") from error


def check_training(recipe: Recipe) -> None:
    """The options of every training of the run: transformers' own checks of them, before any."""
    # The machine's part of them (bf16 where there is none …) is checked here too.
    for name, spec in recipe.named_teachers.items():
        if spec.training is not None:
            key = f"{recipe.teacher_key(name)}.training"
            training_arguments(spec.training, key, Path(recipe.output), TEACHER_SEED)
    training_arguments(recipe.training, "training", Path(recipe.output), recipe.seeds[0])


def training_arguments(spec: TrainingSpec, key: str, output_dir: Path, seed: int) -> TrainingArguments:
    """transformers' options of one training.

    Raises:
        RecipeError: an option that the run sets itself or has no use for, an unknown one, or what transformers refuses.
    """
    fixed: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": spec.max_steps,
        "per_device_train_batch_size": spec.batch_size,
        "per_device_eval_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.lr_scheduler,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "bf16": spec.precision == "bf16",
        "fp16": spec.precision == "fp16",
        "save_strategy": "steps",
        "save_steps": spec.save_every,
        "save_total_limit": 1,
        "logging_steps": spec.log_every,
        "seed": seed,
        "data_seed": seed,
    }
    free = {
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,  # what a sample holds is the task's matter, and its collation's
    }
    taken = sorted(set(spec.arguments) & ({*fixed} | REFUSED))
    if taken:
        raise RecipeError(
            f"{key}.arguments: {', '.join(taken)} cannot be given here: the run sets it itself or has no use for it. "
            "Use the recipe's own keys: output, seeds and those of training."
        )
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    unknown = sorted(set(spec.arguments) - known)
    if unknown:
        hints = [f"{name}{similar(name, known)}" for name in unknown]
        raise RecipeError(f"{key}.arguments: no such option of TrainingArguments: {' '.join(hints)}")
    try:
        args = TrainingArguments(**{**free, **fixed, **spec.arguments})
        device, gpus, processes = args.device, args.n_gpu, args.world_size
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{key}: transformers refuses these options: {error}") from error
    if processes > 1:
        raise RecipeError(
            f"{processes} processes were launched and a run is one: start it without torchrun or accelerate launch. To "
            "train with several, write a script around SqueezeTrainer."
        )
    if gpus > 1:
        raise RecipeError(f"{gpus} GPUs are visible and a run uses one: choose it, CUDA_VISIBLE_DEVICES=0.")
    if device.type == "mps":
        raise RecipeError(
            f"{key}: squeezing sums in float64, which Apple's GPUs lack. Run on the CPU: "
            f"--{key}.arguments '{{use_cpu: true}}'."
        )
    return args
