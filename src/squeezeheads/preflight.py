"""Before any training: the models of a recipe, and every check that needs no trained weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from squeezeheads.adapters import AdaptersOff, add_lora, load_model
from squeezeheads.checkpoints import lost_order
from squeezeheads.distillation import Distillation
from squeezeheads.errors import RecipeError, in_short, similar
from squeezeheads.files import LOCK, part_of
from squeezeheads.recipe import DISTILLED, Recipe, TrainingSpec, dump_recipe
from squeezeheads.tasks import Splits, Task
from squeezeheads.tasks.causal import check_causal

TEACHER_SEED = 0

_EVALUATION = "the run measures its models itself, behind training"
_BEST = "the run keeps the best student itself, by the validation split"
_HUB = "the run leaves its models in output; push them from there"

# Options of TrainingArguments that would undo what makes students comparable, or what a stopped run goes on from, or
# that a run has no use for; with the reason.
REFUSED = {
    "num_train_epochs": "training.max_steps says how long training is",
    "resume_from_checkpoint": "a run finds its last checkpoint itself",
    "save_only_model": "without the optimiser's state a stopped run could not go on as if it had not been stopped",
    "ignore_data_skip": "a stopped run would see its first data again in place of what is left",
    "restore_callback_states_from_checkpoint": "callbacks begin anew with each start of a run",
    "enable_jit_checkpoint": "a run goes on from the checkpoints of every save_every steps",
    "save_on_each_node": "a run has one process",
    "auto_find_batch_size": "students would be trained with batches of other sizes: set training.batch_size",
    "eval_strategy": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "do_train": "the command says what is done",
    "do_eval": _EVALUATION,
    "do_predict": _EVALUATION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "label_smoothing_factor": "it would be ignored: the task objective is the model's own loss",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
OWN_KEYS = "the run sets it itself, from output, seeds and the keys of training"


def teacher_config(task: Task, recipe: Recipe, name: str) -> Any:
    """A teacher's configuration.

    Raises:
        RecipeError: there is none, or one that no model can be made by; names the key.
    """
    spec, key = recipe.named_teachers[name], recipe.teacher_key(name)
    if spec.path is None:
        return task.new_config(spec.config, f"{key}.config")
    return task.adapt_config(task.pretrained_config(spec.path, f"{key}.path"))


def student_config(task: Task, recipe: Recipe, base: Any) -> Any:
    """The student's, where it is new as changes to ``base``: the first teacher's.

    Raises:
        RecipeError: as in ``teacher_config``; adapters that the task cannot save.
    """
    student = recipe.student
    if student.lora is not None and not task.adapters:
        raise RecipeError(
            "student.lora: this task saves its models in another library's format and knows no adapters. Leave it out, "
            "and the whole student is trained."
        )
    if student.path is None:
        return task.new_config(student.config, "student.config", base)
    return task.adapt_config(task.pretrained_config(student.path, "student.path"))


def vocabulary(config: Any) -> int | None:
    """How many classes or tokens a model of this configuration predicts; ``None`` where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or getattr(config, "num_labels", None)


@dataclass
class Models:
    """How the models of a recipe are made."""

    task: Task
    recipe: Recipe

    def __post_init__(self) -> None:
        names = self.recipe.named_teachers
        self.teacher_configs: dict[str, Any] = {name: teacher_config(self.task, self.recipe, name) for name in names}
        self.student_config = student_config(self.task, self.recipe, next(iter(self.teacher_configs.values())))

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """How many classes or tokens each teacher predicts, by name; ``None`` where its configuration does not say."""
        return {name: vocabulary(config) for name, config in self.teacher_configs.items()}

    def new_teacher(self, name: str) -> PreTrainedModel:
        """The pretrained teacher, or one with random weights."""
        spec = self.recipe.named_teachers[name]
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        set_seed(TEACHER_SEED)
        return self.task.build(copy.deepcopy(self.teacher_configs[name]), spec.attn_implementation, spec.dtype)

    def new_student(self, seed: int) -> PreTrainedModel:
        """A student as it is before training: the same for every set of objectives."""
        spec = self.recipe.student
        set_seed(seed)  # a pretrained student too: a head that its checkpoint lacks is drawn at random
        if spec.path is None:
            return self.task.build(copy.deepcopy(self.student_config), spec.attn_implementation, spec.dtype)
        model = self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        if spec.lora is None:
            return model
        try:
            return add_lora(model, spec.lora)
        except (ImportError, ValueError) as error:
            raise RecipeError(f"student.lora: {error}") from error


def check_output(output: Path, recipe: Recipe, parts: Sequence[str] | None = None, free: Sequence[str] = ()) -> None:
    """One output folder belongs to one recipe: results of different recipes must not mix.

    Args:
        parts: the parts of the recipe that must agree; all by default.
        free: keys that may differ all the same, with all below them.
    """
    mine = json.loads(json.dumps(dump_recipe(recipe)))
    stored = output / "recipe.json"
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
    """Whether the folder can be made and written to. Nothing of the trial is left."""
    made: list[Path] = []
    try:
        for folder in (*reversed(output.parents), output):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=output):
            pass
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"output={output} cannot be made or written to: {error}. Choose another folder with --output."
        ) from error
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another run has begun to use it
                folder.rmdir()


def _different_keys(a: Any, b: Any, key: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {*a, *b}:
            yield from _different_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key


def check_configs(models: Models) -> None:
    """Whether the models, by their configurations, are for the task's data. Loads no weights.

    Raises:
        RecipeError: one is not.
    """
    for name, config in models.teacher_configs.items():
        models.task.check_model(config, models.recipe.teacher_key(name))
    models.task.check_model(models.student_config, "student")


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
    try:
        student = models.new_student(recipe.seeds[0])
        teachers: dict[str, Any] = {
            name: AdaptersOff(student) if spec.base_of_student else models.new_teacher(name)
            for name, spec in recipe.named_teachers.items()
        }
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"a model cannot be loaded or built: {in_short(error)} Attention is recorded under "
            'attn_implementation="sdpa" alone.'
        ) from error
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
    taken = sorted(set(spec.arguments) & {*fixed, *REFUSED})
    if taken:
        reasons = [f"{name} cannot be given here: {REFUSED.get(name, OWN_KEYS)}." for name in taken]
        raise RecipeError(f"{key}.arguments: {' '.join(reasons)}")
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
    lost = lost_order(args)
    if lost is not None:
        raise RecipeError(
            f"{key}.arguments: {lost} cannot be given here: the order of the data comes of random numbers that are in "
            "no checkpoint, so a stopped run would see other data. Leave it out."
        )
    if processes > 1:
        raise RecipeError(
            f"{processes} processes were launched and a run is one: start it without torchrun or accelerate launch. To "
            "train with several, write a script around SqueezeTrainer."
        )
    if gpus > 1:
        raise RecipeError(f"{gpus} GPUs are visible and a run uses one: choose it, CUDA_VISIBLE_DEVICES=0.")
    if args.fp16 and device.type == "cpu":
        raise RecipeError(
            f"{key}.precision=fp16 needs a GPU: on the CPU accelerate would train in float32 without a word. Use bf16, "
            "or fp32."
        )
    if device.type == "mps":
        raise RecipeError(
            f"{key}: squeezing sums in float64, which Apple's GPUs lack. Run on the CPU: "
            f"--{key}.arguments '{{use_cpu: true}}'."
        )
    return args
