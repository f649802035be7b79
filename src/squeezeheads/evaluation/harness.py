"""Tasks of the Language Model Evaluation Harness (lm-eval), run on a model in memory."""

from __future__ import annotations

import copy
import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeezeheads.batches import evaluating
from squeezeheads.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_harness(tasks: Sequence[str], folder: str | None) -> None:
    """Whether ``run_harness`` can run these tasks: loads them with their data, before hours are spent.

    Raises:
        RecipeError: lm-eval is not installed, no such folder or task, a task or its data that cannot be loaded.
    """
    check_installed(folder)
    with _quiet(folder):
        manager = _manager(folder)
        for name in tasks:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f" Did you mean {', '.join(near)}?" if near else ""
                where = f"the folder {folder} ({', '.join(manager.all_tasks) or 'none'})" if folder else "lm-eval"
                raise RecipeError(f"lm_eval_tasks: {name!r} is no task of {where}.{hint}")
        try:
            manager.load(list(tasks))
        except Exception as error:  # a task can be code of its own: it fails as it likes
            raise RecipeError(
                f"lm_eval_tasks: {', '.join(tasks)} cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())} Files of a task's data are looked for from the folder that the "
                "command is run in."
            ) from error


def check_installed(folder: str | None) -> None:
    """Whether lm-eval and a folder of tasks are there. Their names take lm-eval many seconds to list.

    Raises:
        RecipeError: they are not.
    """
    if find_spec("lm_eval") is None:
        raise MachineError("lm_eval_tasks needs the package lm-eval: pip install 'squeezeheads[eval]'.")
    if folder is not None and not Path(folder).is_dir():
        raise RecipeError(f"lm_eval_folder={folder}: no such folder. Expected one with YAML files of lm-eval tasks.")


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str | None,
    batch_size: int,
) -> dict[str, float]:
    """Metrics of lm-eval's tasks, by lm-eval's own code and definitions, without standard errors.

    Args:
        model: a causal language model; run in eval mode, on its own device.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags.
        folder: where the tasks' YAML files lie; then lm-eval's own are not known. None: lm-eval's own alone.
        batch_size: requests a forward pass.

    Returns:
        ``lm_eval/TASK/METRIC``; where a task filters answers, ``lm_eval/TASK/METRIC,FILTER``. A group has its own
        entries where it defines a mean.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(folder), _own_random_states(), evaluating(model):
        results = simple_evaluate(
            # A copy: the wrapper sets a padding token where there is none.
            model=HFLM(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=list(tasks),
            task_manager=_manager(folder),
            bootstrap_iters=0,  # for standard errors, which a run takes over seeds
            log_samples=False,
            # Global random states are left alone: what is trained next must not depend on what was measured.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    metrics: dict[str, float] = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not metric.endswith("_stderr") and key not in ("sample_len", "alias"):
                metrics[f"lm_eval/{task}/{metric if chosen in ('', 'none') else key}"] = float(value)
    return metrics


@cache
def _manager(folder: str | None) -> Any:
    """The index of tasks by name; that of lm-eval's own takes many seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=folder is None)


@contextmanager
def _own_random_states() -> Iterator[None]:
    """lm-eval draws from Python's generator, and tasks from NumPy's: afterwards, or after an error, both are as they
    were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet(folder: str | None) -> Iterator[None]:
    """Without lm-eval's notices (of models in memory, of defaults it sets), and for tasks of a folder without the
    download counter of datasets, which asks the network even where files are local."""
    from datasets import config

    logger = logging.getLogger("lm_eval")
    level, counts = logger.level, config.HF_UPDATE_DOWNLOAD_COUNTS
    logger.setLevel(logging.ERROR)
    config.HF_UPDATE_DOWNLOAD_COUNTS = counts and folder is None
    try:
        yield
    finally:
        logger.setLevel(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
