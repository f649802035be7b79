"""transformers' options of the trainings of a run: what is refused, and what would fail once training begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from squeezeheads.checkpoints import lost_order
from squeezeheads.errors import MachineError, RecipeError, in_short, similar
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


@contextmanager
def same_environment() -> Iterator[None]:
    """Afterwards the process is as before: transformers notes some options of a training in the environment, and in
    switches of torch, where the next training would find them."""
    before = dict(os.environ)
    exact, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.use_deterministic_algorithms(exact, warn_only=warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def trainings(recipe: Recipe) -> list[tuple[str, TrainingSpec, int, str]]:
    """Every training of a run: its key, its options, a seed, and the key of the model that is trained."""
    teachers = [
        (f"{recipe.teacher_key(name)}.training", spec.training, TEACHER_SEED, recipe.teacher_key(name))
        for name, spec in recipe.named_teachers.items()
        if spec.training is not None
    ]
    return [*teachers, ("training", recipe.training, recipe.seeds[0], "student")]


def check_training(recipe: Recipe) -> None:
    """The options of every training of the run, before any: transformers' own checks of them, and what would show when
    training begins.

    Raises:
        RecipeError: one is refused.
    """
    for key, spec, seed, _ in trainings(recipe):
        check_options(spec, key, seed)


def check_options(spec: TrainingSpec, key: str, seed: int, model: Any = None) -> None:
    """``training_arguments``; and without data or weights what the training itself would stumble over: optimiser,
    schedule, reports, loading of data, compiling.

    Args:
        model: on any device, where it is known: some optimisers look for layers by name.

    Raises:
        RecipeError: see ``training_arguments``; an option that is refused, or a package that it needs and that is
            missing.
    """
    with same_environment():
        args = training_arguments(spec, key, Path("unused"), seed)
        _check_reports(args, key)
        if args.use_liger_kernel and not is_liger_kernel_available():
            raise RecipeError(
                f"{key}.arguments.use_liger_kernel needs the package liger-kernel, which is missing here."
            )
        for beginning, check in (
            (("optim", "adam_"), lambda: _try_optimiser(args, model)),
            (("lr_scheduler_kwargs",), lambda: _try_schedule(args)),
            (("dataloader_",), lambda: _try_loader(args)),
            (("torch_compile",), lambda: _try_compiling(args)),
        ):
            try:
                check()
            except Exception as error:  # what other libraries raise is their own matter
                given = [f"{key}.arguments.{n}={v!r}" for n, v in spec.arguments.items() if n.startswith(beginning)]
                told = in_short(error) or type(error).__name__
                raise RecipeError(f"{', '.join(given) or key}: training would end at its start: {told}") from error


def _check_reports(args: TrainingArguments, key: str) -> None:
    known, here = set(INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations())
    for name in args.report_to:
        if name not in known:
            raise RecipeError(
                f"{key}.arguments.report_to={name!r}: expected none or one of {', '.join(sorted(known))}."
                f"{similar(name, known)}"
            )
        if name not in here and name != "flyte":  # which is not looked for
            raise RecipeError(
                f"{key}.arguments.report_to={name!r}: its package is missing here, or is not set up. Install it, or "
                "leave it out."
            )


def _try_optimiser(args: TrainingArguments, model: Any) -> None:
    if model is None and args.optim_target_modules is not None:
        return  # which layers there are is not known
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model if model is not None else torch.nn.Linear(1, 1))
    # Some are made of a model or of layers by name, others by a function: these wait for the real model.
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        if not {"params", "model", "optimizer_dict"} & options.keys():
            kind([torch.nn.Parameter(torch.zeros(1))], **options)


def _try_schedule(args: TrainingArguments) -> None:
    warmup = args.get_warmup_steps(args.max_steps)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=warmup,
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    for rate in getattr(schedule, "lr_lambdas", []):
        for step in (0, warmup, (warmup + args.max_steps) // 2, args.max_steps):
            rate(step)


def _try_loader(args: TrainingArguments) -> None:
    """Makes no process: that is done when the first batch is asked for."""
    DataLoader(
        [0],  # type: ignore[arg-type]
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        drop_last=args.dataloader_drop_last,
    )


def _try_compiling(args: TrainingArguments) -> None:
    if not args.torch_compile:
        return
    from accelerate.utils import TorchDynamoPlugin

    TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    # Nothing is compiled before it runs; the names are looked up.
    torch.compile(torch.nn.Linear(1, 1), backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _refused_by_the_machine(options: Mapping[str, Any]) -> bool:
    """Whether transformers takes these options once they ask nothing of a GPU."""
    plain = {"bf16": False, "fp16": False, "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False}
    try:
        TrainingArguments(**{**options, **plain})
    except Exception:
        return False
    return True


def training_arguments(spec: TrainingSpec, key: str, output_dir: Path, seed: int) -> TrainingArguments:
    """transformers' options of one training.

    Raises:
        RecipeError: an option that the run sets itself or has no use for, an unknown one, or what transformers refuses;
            a ``MachineError`` where another machine may take it.
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
    own = dict(spec.arguments)
    if own.get("report_to", "none") is None:  # which transformers takes for the name of a place
        del own["report_to"]
    if not isinstance(own.get("accelerator_config"), dict | None):  # transformers would open it as a file
        told = own["accelerator_config"]
        raise RecipeError(f"{key}.arguments.accelerator_config={told!r}: expected a mapping of options.")
    options = {**free, **fixed, **own}
    try:
        args = TrainingArguments(**options)
        device, gpus, processes = args.device, args.n_gpu, args.world_size
    except Exception as error:  # what transformers raises is its own matter
        kind = MachineError if _refused_by_the_machine(options) else RecipeError
        raise kind(f"{key}: transformers refuses these options: {error}") from error
    lost = lost_order(args)
    if lost is not None:
        raise RecipeError(
            f"{key}.arguments: {lost} cannot be given here: the order of the data comes of random numbers that are in "
            "no checkpoint, so a stopped run would see other data. Leave it out."
        )
    if processes > 1:
        raise MachineError(
            f"{processes} processes were launched and a run is one: start it without torchrun or accelerate launch. To "
            "train with several, write a script around SqueezeTrainer."
        )
    if gpus > 1:
        raise MachineError(f"{gpus} GPUs are visible and a run uses one: choose it, CUDA_VISIBLE_DEVICES=0.")
    if args.fp16 and device.type == "cpu":
        raise MachineError(
            f"{key}.precision=fp16 needs a GPU: on the CPU accelerate would train in float32 without a word. Use bf16, "
            "or fp32."
        )
    if device.type == "mps":
        raise MachineError(
            f"{key}: squeezing sums in float64, which Apple's GPUs lack. Run on the CPU: "
            f"--{key}.arguments '{{use_cpu: true}}'."
        )
    return args
