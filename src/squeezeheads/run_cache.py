"""Offline teachers of a run: their predictions for the training data written once, and read in their place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments

from squeezeheads.errors import RecipeError
from squeezeheads.files import try_writing
from squeezeheads.objectives import Objective
from squeezeheads.recipe import DISTILLED, CacheSpec, Recipe
from squeezeheads.tasks import Splits, Task
from squeezeheads.teacher_cache import CachedTeacher, write_teacher_cache
from squeezeheads.teacher_cache.shards import check_folder

FOLDER = "teacher-cache"


def check_caches(recipe: Recipe, vocabularies: Mapping[str, int | None]) -> None:
    """Whether the teachers that are to be cached can be: before any training.

    Args:
        vocabularies: how many classes or tokens each teacher tells apart, by name, where its configuration says so.

    Raises:
        RecipeError: see ``check_cache``.
    """
    for name in recipe.named_teachers:
        check_cache(recipe, name, vocabularies.get(name))


def check_cache(recipe: Recipe, name: str, vocabulary: int | None) -> None:
    """The same of one teacher, which may be one without a cache.

    Raises:
        RecipeError: inputs that are drawn anew each time they are seen; an objective that needs more than logits, or
            the mean of several teachers' logits of which not all are kept; more logits than there are; a folder that
            holds something else, or cannot be written to.
    """
    spec = recipe.named_teachers[name]
    if spec.cache is None:
        return
    key = f"{recipe.teacher_key(name)}.cache"
    drawn = recipe.chosen_task.random_inputs
    if drawn is not None:
        raise RecipeError(
            f"{key}: {drawn}, so no input of training comes twice and none would be found in the cache. Turn "
            f"that off where it can be, or leave {key} out."
        )
    for where, objective in _learning_from(recipe, name).items():
        if not objective.takes_stored_logits:
            raise RecipeError(
                f"{where} learns from more than predictions, and {key} keeps nothing else: leave {key} out, or {where}."
            )
        if objective.teacher is None and len(recipe.named_teachers) > 1 and spec.cache.k != "all":
            raise RecipeError(
                f"{where} averages the logits of several teachers, which needs all of each: set {key}.k to all, "
                f"or give {where} a teacher."
            )
    if isinstance(spec.cache.k, int) and vocabulary is not None and spec.cache.k > vocabulary:
        raise RecipeError(f"{key}.k={spec.cache.k}: the teacher tells {vocabulary} apart, expected at most as many.")
    if spec.cache.folder:  # else it is within output
        place = Path(spec.cache.folder).absolute()
        for other, theirs in recipe.named_teachers.items():
            if (
                other != name
                and theirs.cache is not None
                and cache_folder(recipe, other, theirs.cache).absolute() == place
            ):
                raise RecipeError(
                    f"{key}.folder={spec.cache.folder!r} is that of {recipe.teacher_key(other)} too: a cache holds one "
                    "teacher's predictions. Give each a folder of its own."
                )
        try:
            check_folder(Path(spec.cache.folder))
            try_writing(Path(spec.cache.folder))
        except (OSError, ValueError) as error:
            told = str(error) if type(error) is ValueError else f"it cannot be written to: {error}. Choose another."
            raise RecipeError(f"{key}.folder={spec.cache.folder!r}: {told}") from error


def _learning_from(recipe: Recipe, name: str) -> dict[str, Objective]:
    """Objectives of all students that learn from a teacher, by their key in the recipe."""
    found = {}
    for arm, objectives in recipe.arms.items():
        where = "objectives" if arm == DISTILLED else f"baselines.{arm}"
        for key, objective in objectives.items():
            if objective.needs and objective.teacher in (None, name):
                found[f"{where}.{key}"] = objective
    return found


def cached_teacher(
    task: Task,
    recipe: Recipe,
    name: str,
    teacher: PreTrainedModel,
    splits: Splits,
    args: TrainingArguments,
    console: Console,
) -> CachedTeacher:
    """The teacher's cache: written, or taken up where an earlier start or another run left it.

    Its temperatures are those of the objectives that learn from this teacher. The teacher runs in the precision of the
    students' training.

    Args:
        args: of the students' training.

    Raises:
        RecipeError: the folder that the recipe names holds a cache of another teacher or with other settings.
    """
    spec = recipe.named_teachers[name].cache
    if spec is None:
        raise ValueError(f"teacher {name!r} is not to be cached.")
    folder = cache_folder(recipe, name, spec)
    k = spec.k if isinstance(spec.k, int) else None
    temperatures = {getattr(o, "temperature", 1.0) for o in _learning_from(recipe, name).values()} or {1.0}
    console.print(
        f"{name}: predictions for {len(splits.train)} training samples → {folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    batches = task.batches(splits.train, recipe.training.batch_size, teacher.device)
    try:
        with _autocast(args):
            cache = write_teacher_cache(
                teacher,
                batches,
                folder,
                k=k,
                temperatures=sorted(temperatures),
                dtype=getattr(torch, spec.dtype),
                wait=True,
            )
    except ValueError as error:
        raise RecipeError(f"{recipe.teacher_key(name)}.cache: {error}") from error
    kept = ", ".join(f"{mass['mean']:.4f} at temperature {t:g}" for t, mass in cache.mass_kept.items())
    console.print(
        f"{name}: {cache.predictions} predictions of {cache.samples} samples, {cache.bytes / 2**20:.1f} MiB; mean "
        f"probability kept: {kept}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return cache


def cache_folder(recipe: Recipe, name: str, spec: CacheSpec) -> Path:
    """Where a teacher's cache lies."""
    if spec.folder:
        return Path(spec.folder)
    own = Path(recipe.output) / FOLDER
    return own if recipe.teacher is not None else own / name


def _autocast(args: TrainingArguments) -> AbstractContextManager[object]:
    """Mixed precision, as a live teacher would run."""
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
