"""Checkpoints of trainings that may be stopped at any moment: which are whole, and that there always is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from squeezeheads.errors import SavingError
from squeezeheads.files import disk_trouble, make_durable

STATE_FILE = "trainer_state.json"
"""Trainer writes it last: it is what marks a checkpoint as whole."""


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under ``folder`` that was written to its end, if any. Trainer writes a checkpoint file by
    file, ``trainer_state.json`` last: where that is missing or cut off, the process was stopped in between."""
    return next((path for _, path in sorted(_numbered(folder), reverse=True) if _is_whole(path)), None)


def drop_half_written(checkpoint: Path) -> None:
    """Delete what a save left that was stopped after ``checkpoint``, beside it: it takes the place that the next needs,
    and no training goes on from it."""
    beside = {path: number for number, path in _numbered(checkpoint.parent)}
    for path, number in beside.items():
        if number > beside.get(checkpoint, number) and not path.is_symlink() and not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def drop_older(folder: Path, keep: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until ``keep`` are left; all stay where it is ``None`` or 0.

    Args:
        newest: was just written, and stays whatever its number: a training may have gone on from an older checkpoint
            than the last one there.
        best: stays too.
    """
    if not keep or keep < 0:
        return
    staying = {newest, *([Path(best)] if best else [])}
    paths = [path for _, path in sorted(_numbered(folder))]
    others = [path for path in paths if path not in staying and not path.is_symlink()]
    for path in others[: max(len(paths) - max(keep, len(staying)), 0)]:
        (path / STATE_FILE).unlink(missing_ok=True)  # first: what is half deleted must not look whole
        shutil.rmtree(path, ignore_errors=True)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    start = f"{PREFIX_CHECKPOINT_DIR}-"
    for path in folder.glob(f"{start}*"):
        number = path.name.removeprefix(start)
        if number.isdecimal() and path.is_dir():
            yield int(number), path


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


class WholeCheckpoints(Trainer):
    """A ``transformers.Trainer`` that can be stopped at any moment, even while it saves, and goes on from its last
    whole checkpoint as if it had not been stopped.

    What it does beside Trainer: an older checkpoint goes only when the next one is whole and on the disk; half-written
    ones are deleted when a run is resumed, and when a disk is full; a checkpoint that lacks what a training needs to go
    on is refused; losses are logged at a save too, because the running mean is in no checkpoint (under
    ``save_strategy="best"`` Trainer decides on saving after it has logged: there a mean begins anew on resume).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_LogAtSave())

    def resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that ``resume_from_checkpoint=wanted`` asks for; half-written ones after it are deleted.

        Raises:
            ValueError: ``True``, and there is none.
            RuntimeError: it lacks the state of the optimiser, of the schedule, or of this process's random numbers.
        """
        if not wanted:
            return None
        folder = Path(str(self.args.output_dir))
        found = last_whole_checkpoint(folder) if wanted is True else Path(wanted)
        if found is None:
            raise ValueError(f"resume_from_checkpoint=True, but {folder} holds no whole checkpoint.")
        self._check_complete(found)
        if self.args.should_save:
            drop_half_written(found)
        return str(found)

    def _check_complete(self, checkpoint: Path) -> None:
        """Trainer (5.23) takes what is there and goes on with new moments, or other random numbers, without a word."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # whose files have other names
        several = self.args.world_size > 1
        random_numbers = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        missing = [n for n in ("optimizer.pt", "scheduler.pt", random_numbers) if not (checkpoint / n).is_file()]
        if missing:
            raise RuntimeError(
                f"{checkpoint} lacks {', '.join(missing)}: a training that went on from it would not be the one that "
                "was stopped. It was saved with save_only_model, by another number of processes, or files were "
                "deleted. To start a new training from its weights, load it with from_pretrained."
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # One of an earlier training that is written over: not whole until it is done.
            (checkpoint / STATE_FILE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self._write_beside(checkpoint)
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                make_durable(checkpoint)
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble is None:
                raise
            if self.args.should_save and not checkpoint.is_symlink():
                shutil.rmtree(checkpoint, ignore_errors=True)  # half of it serves nobody, and the disk is full
            before = last_whole_checkpoint(folder)
            rest = f"the last whole one is {before.name}" if before else "there is none yet"
            raise SavingError(
                f"{checkpoint} could not be written: {trouble} What was written of it has been deleted; {rest}. Make "
                "room and resume: the training goes on from there."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            drop_older(folder, limit, checkpoint, self.state.best_model_checkpoint)

    def _write_beside(self, checkpoint: Path) -> None:
        """What a trainer keeps in a checkpoint beside what Trainer does: before the rest, so that the checkpoint is
        not whole without it."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last before the file that marks the checkpoint as whole: all processes, and the disk, must be done.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            make_durable(Path(output_dir))


class _LogAtSave(TrainerCallback):
    """Ends a logged mean where a checkpoint is saved, except at the last step, after which nothing goes on."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save and args.logging_strategy != "no" and state.global_step < state.max_steps:
            control.should_log = True

    on_epoch_end = on_step_end
