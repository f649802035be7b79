"""transformers' options of the trainings of a run: what is refused, and what would fail once training begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from squeezeheads.checkpoints import lost_order
from squeezeheads.errors import RecipeError, similar
from squeezeheads.recipe import Recipe, TrainingSpec
from squeezeheads.recipe_models import TEACHER_SEED

_EVALUATION = "the run measures its models itself, behind training"
_BEST = "the run keeps the best student itself, by the validation split"
_SHARDED = "a run has one process: to train with several, write a script around SqueezeTrainer"
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
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
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
