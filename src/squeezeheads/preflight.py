"""Before any training: the output folder, and the first step of every training on trial."""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from squeezeheads.adapters import AdaptersOff, load_model
from squeezeheads.distillation import Distillation
from squeezeheads.errors import MachineError, RecipeError
from squeezeheads.extras import how_to_install
from squeezeheads.files import LOCK, part_of, try_writing
from squeezeheads.objectives import TaskLoss
from squeezeheads.recipe import DISTILLED, RECIPE_FILE, Recipe, TrainingSpec, dump_recipe
from squeezeheads.recipe_models import Models, check_configs
from squeezeheads.tasks import Splits, Task
from squeezeheads.tasks.causal import check_causal
from squeezeheads.trainer import SqueezeTrainer
from squeezeheads.training_options import same_environment, training_arguments, trainings


def check_output(output: Path, recipe: Recipe, parts: Sequence[str] | None = None, free: Sequence[str] = ()) -> None:
    """One output folder belongs to one recipe: results of different recipes must not mix. Seeds may be added to it.

    Args:
        parts: the parts of the recipe that must agree; all by default.
        free: keys that may differ all the same, with all below them.
    """
    mine = json.loads(json.dumps(dump_recipe(recipe)))
    stored = output / RECIPE_FILE
    if os.path.isfile(stored):  # unlike Path's, false for names that no file can have
        try:
            theirs = json.loads(stored.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"{stored} is damaged: {error}. Delete the folder, or choose another.") from error
        # A run that was moved, or is named by another path, is the same run.
        different = sorted(key for key in _different_keys(mine, theirs) if key != "output")
        if parts is not None:
            different = [key for key in different if key.split(".")[0] in parts]
        different = [key for key in different if not f"{key}.".startswith(tuple(f"{name}." for name in free))]
        if _adds_seeds(mine, theirs):
            different = [key for key in different if key != "seeds"]
        if different:
            raise RecipeError(
                f"output={output} holds a run of another recipe: {', '.join(different)} differ. Choose another folder "
                "with --output, or delete this one."
            )
    elif os.path.exists(output) and not output.is_dir():
        raise RecipeError(f"output={output} is a file: expected a folder, new or of an earlier start of this run.")
    # A run that was stopped at its very start has left its lock and its recipe unfinished, and nothing else.
    elif os.path.exists(output) and any(path not in (part_of(stored), output / LOCK) for path in output.iterdir()):
        raise RecipeError(f"output={output} exists and is no run of squeezeheads. Choose another folder with --output.")
    if parts is None:
        _check_no_links(output)
        _check_writable(output)


PACKAGES = ("matplotlib",)
"""What every run needs at its end, if not before: it draws figures and a page."""


def check_packages(task: Task) -> None:
    """Whether the optional packages are there that a run needs at some time.

    Raises:
        RecipeError: one is missing; says what brings it.
    """
    missing = [name for name in dict.fromkeys((*task.packages, *PACKAGES)) if find_spec(name) is None]
    if missing:
        ways = dict.fromkeys(how_to_install(name) for name in missing)
        raise MachineError(f"a run needs {' and '.join(missing)}, missing here. {' '.join(ways)}")


def _check_no_links(output: Path) -> None:
    """A folder that comes from elsewhere may hold links: what the run writes and deletes must lie in it."""
    for folder, folders, files in os.walk(output):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                raise RecipeError(
                    f"{path} is a symbolic link to {os.readlink(path)}: the run would write or delete files outside "
                    "its output. Remove it; to keep a run on another disk, let output itself be the link."
                )


def _check_writable(output: Path) -> None:
    try:
        try_writing(output)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"output={output} cannot be made or written to: {error}. Choose another folder with --output."
        ) from error


def _adds_seeds(mine: Any, theirs: Any) -> bool:
    """Further students of a run: those that are there stay. The first seed stays first: plans are found with it."""
    before = theirs.get("seeds") if isinstance(theirs, dict) else None
    return isinstance(before, list) and mine["seeds"][: len(before)] == before


def _different_keys(a: Any, b: Any, key: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {*a, *b}:
            yield from _different_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key


def check_models(models: Models, recipe: Recipe, splits: Splits) -> None:
    """``check_configs``; then the first step of every training in small, and saving: what does not fit shows before
    hours are spent. Models, gradients and random numbers are as before when it returns.

    Raises:
        RecipeError: models that the task has no use for, that cannot be compared or trained so, or that do not come
            back from a file as they were saved.
    """
    check_configs(models)
    with _same_random_numbers():
        _try_models(models, recipe, splits)


def _try_models(models: Models, recipe: Recipe, splits: Splits) -> None:
    task = models.task
    args = training_arguments(recipe.training, "training", Path(recipe.output), recipe.seeds[0])
    student = models.new_student(recipe.seeds[0])
    teachers: dict[str, Any] = {
        name: AdaptersOff(student) if spec.base_of_student else models.new_teacher(name)
        for name, spec in recipe.named_teachers.items()
    }
    _check_adapted(student, recipe)
    for name, teacher in teachers.items():
        _check_trained(name, student if isinstance(teacher, AdaptersOff) else teacher, recipe)
    _check_saving(task, student, recipe.student.attn_implementation, "student", recipe.student.path)
    for name, teacher in teachers.items():
        spec = recipe.named_teachers[name]
        if spec.training is not None:
            _check_saving(task, teacher, spec.attn_implementation, recipe.teacher_key(name), spec.path)
    data = task.training_data(splits.train, student, recipe.seeds[0])
    count = min(4, recipe.training.batch_size, len(data.samples))
    batch = {k: v.to(args.device) for k, v in data.collate([data.samples[i] for i in range(count)]).items()}
    passes = data.passes(batch)
    for whose, model in (
        *((recipe.teacher_key(name), teacher) for name, teacher in teachers.items()),
        ("student", student),
    ):
        model.to(args.device)
        try:
            check_causal(model, passes[0], whose)
        except FOREIGN as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{whose}: {type(model).__name__} cannot be run: {_told(error)}") from error
    for name, objectives in recipe.arms.items():
        where = "objectives" if name == DISTILLED else f"baselines.{name}"
        for objective_name, objective in objectives.items():
            task.check_objective(objective, f"{where}.{objective_name}")
        try:
            trial = Distillation(teachers, copy.deepcopy(objectives), rows=task.rows, targets=task.targets)
            trial.prepare(student, [passes[0]])
            with as_in_training(student, args), _autocast_forwards([*teachers.values(), student], args):
                torch.stack([trial(student, part).loss for part in passes]).sum().backward()
        except FOREIGN as error:
            raise RecipeError(f"{where}: {_told(error)}") from error
        finally:
            student.zero_grad(set_to_none=True)
    _try_trainers(task, recipe, splits, {"student": student, **{recipe.teacher_key(n): t for n, t in teachers.items()}})


def _try_trainers(task: Task, recipe: Recipe, splits: Splits, made: Mapping[str, Any]) -> None:
    """Whether each training can be begun: by the trainer that it will have, up to its first step.

    Args:
        made: models by their key in the recipe.

    Raises:
        RecipeError: one cannot.
    """
    teachers = {name: made[recipe.teacher_key(name)] for name in recipe.named_teachers}
    for key, spec, seed, whose in trainings(recipe):
        data = task.training_data(splits.train, made[whose], seed)
        for name, objectives in (recipe.arms if whose == "student" else {"teacher": {"task": TaskLoss()}}).items():
            try:
                with same_environment(), tempfile.TemporaryDirectory(prefix="squeezeheads-") as folder:
                    trainer = SqueezeTrainer(
                        model=made[whose],
                        teacher=teachers if any(o.needs for o in objectives.values()) else None,
                        args=training_arguments(spec, key, Path(folder), seed),
                        objectives=copy.deepcopy(dict(objectives)),
                        rows=task.rows,
                        targets=task.targets,
                        passes=data.passes,
                        train_dataset=data.samples,
                        data_collator=data.collate,
                    )
                    batches = len(trainer.get_train_dataloader())
                    trainer.create_optimizer_and_scheduler(spec.max_steps)
            except RecipeError:
                raise
            except Exception as error:  # what trainers and their parts raise is their own matter
                where = key if whose != "student" or name == DISTILLED else f"{key} of the baseline {name!r}"
                raise RecipeError(f"{where}: training cannot begin: {_told(error)}") from error
            if not batches:
                raise RecipeError(without_steps(spec, key, len(data.samples)))


def without_steps(spec: TrainingSpec, key: str, samples: int) -> str:
    """What is wrong with a training that leaves out batches which are not full, and has no others."""
    return (
        f"{key}.batch_size={spec.batch_size}: the {samples} training samples do not fill one batch, and "
        f"{key}.arguments.dataloader_drop_last leaves out what does not: no step could be taken. Lower the first, or "
        "leave out the second."
    )


def _check_trained(name: str, teacher: PreTrainedModel, recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a teacher whose predictions are random: a new classifier that nothing trains.
    """
    fresh = getattr(teacher, "fresh_weights", [])
    if not fresh or recipe.named_teachers[name].training is not None:
        return
    for arm, objectives in recipe.arms.items():
        for key, objective in objectives.items():
            if "teacher_logits" in objective.needs and objective.teacher in (None, name):
                where = "objectives" if arm == DISTILLED else f"baselines.{arm}"
                raise RecipeError(
                    f"{recipe.teacher_key(name)}.path: {', '.join(fresh[:3])} are not in it and would be random, and "
                    f"{where}.{key} learns from what it predicts. Give the teacher `training`, name one that was "
                    f"trained for these classes, or leave {key} out."
                )


def _check_adapted(student: PreTrainedModel, recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a new classifier that stays as it was drawn, because adapters alone are trained.
    """
    if recipe.student.lora is None:
        return
    saved = recipe.student.lora.modules_to_save
    fresh = getattr(student, "fresh_weights", [])
    frozen = [name for name in fresh if not any(entry in name.split(".") for entry in saved)]
    if frozen:
        raise RecipeError(
            f"student.lora: {', '.join(frozen[:3])} are not in {recipe.student.path} and would stay random: name their "
            f"module in student.lora.modules_to_save, for example [{frozen[0].split('.')[0]}]."
        )


# What recording, objectives and models raise where they do not fit: other libraries' models among them.
FOREIGN = (ValueError, TypeError, RuntimeError, LookupError, AttributeError)


def _told(error: Exception) -> str:
    """The error's words; with its name, where they alone say little."""
    return str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


@contextmanager
def as_in_training(model: Any, args: Any) -> Iterator[None]:
    """Training mode, layers checkpointed where the options say so.

    Args:
        args: ``TrainingArguments``, or what has its ``gradient_checkpointing`` and ``gradient_checkpointing_kwargs``.
    """
    if args.gradient_checkpointing:
        options = dict(args.gradient_checkpointing_kwargs or {})
        apart = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options or None, **apart)
    model.train()
    try:
        yield
    finally:
        model.eval()
        if args.gradient_checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


@contextmanager
def _autocast_forwards(models: Sequence[PreTrainedModel], args: TrainingArguments) -> Iterator[None]:
    """Mixed precision as ``accelerate`` arranges it: within the models' forward passes, and outputs in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    if not (args.bf16 or args.fp16):
        yield
        return
    numbers = torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
    for model in models:
        model.forward = convert_outputs_to_fp32(numbers(model.forward))
    try:
        yield
    finally:
        for model in models:
            del model.forward


SAVED_ON_TRIAL = 500_000_000
"""Parameters up to which a model is saved and loaded on trial: 2 GB in float32, some seconds."""


def _check_saving(task: Task, model: PreTrainedModel, attn_implementation: str, whose: str, source: str | None) -> None:
    """
    Args:
        source: the pretrained model that is trained further, if the model is one.

    Raises:
        RecipeError: a model that cannot be saved, or that comes back with other weights.
    """
    if model.num_parameters() > SAVED_ON_TRIAL:
        return
    with tempfile.TemporaryDirectory(prefix="squeezeheads-") as folder:
        try:
            model.save_pretrained(folder)
            task.save_companions(Path(folder), source)
            back = load_model(task.load, folder, attn_implementation).state_dict()
        except OSError as error:
            raise RecipeError(
                f"{whose}: cannot be saved on trial in {folder}: {error}. TMPDIR chooses another place."
            ) from error
        except Exception as error:  # what saving and loading raise is their own matter
            raise RecipeError(f"{whose}: {type(model).__name__} cannot be saved: {_told(error)}") from error
    mine = model.state_dict()
    other = sorted(
        name
        for name in {*mine, *back}
        # What an adapter has put a copy in the place of is not saved with it, and random where it was new.
        if ".original_module." not in name
        if name not in mine or name not in back or not _same(mine[name].to(back[name].dtype), back[name])
    )
    if other:
        raise RecipeError(
            f"{whose}: {type(model).__name__} does not come back as it was saved: {', '.join(other[:3])} differ."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Afterwards all generators go on as if nothing had been drawn."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
