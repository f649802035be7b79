"""What objectives decided before training, kept beside a run so that a resumed one goes by the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from squeezeheads.files import read_json, store_json
from squeezeheads.objectives import Objective

PLAN_FILE = "squeeze_plan.json"


def share_plans(objectives: Mapping[str, Objective], folder: str | None, store: bool) -> None:
    """After ``prepare``: all go by what the first process decided, which is stored. Others may have seen other data
    (those of a stream), or have other rounding.

    Args:
        objectives: those that decide something, by name; the same in every process.
        folder: output folder of the run.
        store: whether this process writes.
    """
    broadcast_object_list(box := [{name: objective.plan_to_json() for name, objective in objectives.items()}])
    for name, objective in objectives.items():
        objective.plan_from_json(box[0][name])
    if store:
        store_plans(objectives, Path(str(folder)))


def store_plans(objectives: Mapping[str, Objective], folder: Path) -> None:
    """Write what objectives decided, into the output folder of a run or into a checkpoint, which may be moved."""
    plans = {name: objective.plan_to_json() for name, objective in objectives.items()}
    store_json(folder / PLAN_FILE, {"options": _options(objectives), "plans": plans})


def take_up_plans(objectives: Mapping[str, Objective], folders: Sequence[Path]) -> bool:
    """On resume: take up the plans stored in the first of these folders that has any. All processes call it.

    Returns:
        Whether there were any.

    Raises:
        ValueError: they were made for other objectives or options.
    """
    options = _options(objectives)
    # The first process reads for all: another machine may not have the file, and would wait for the others for ever.
    there = (folder / PLAN_FILE for folder in folders if (folder / PLAN_FILE).is_file())
    stored = next(there, None) if PartialState().is_main_process else None
    box = [None if stored is None else read_json(stored, "Start the training afresh in another output_dir.")]
    broadcast_object_list(box)
    if box[0] is None:
        return False
    kept = box[0]
    if kept["options"] != options:
        raise ValueError(
            f"{stored or PLAN_FILE} was made for {kept['options']}, but the objectives are {options}: resume with the "
            "objectives that the run was started with, or start it afresh in another output_dir."
        )
    for name, objective in objectives.items():
        objective.plan_from_json(kept["plans"][name])
    return True


def no_plan(checkpoint: str | Path) -> RuntimeError:
    """To be raised where a training cannot go on by the plan that it was begun with."""
    return RuntimeError(
        f"{checkpoint} holds no {PLAN_FILE}: which layers and heads went together is not known. Put the file of that "
        "training there, or start afresh."
    )


def _options(objectives: Mapping[str, Objective]) -> dict[str, dict[str, object]]:
    return {name: {**objective.plan_options, "teacher": objective.teacher} for name, objective in objectives.items()}
