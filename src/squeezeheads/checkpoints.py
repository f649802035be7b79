"""Checkpoints of trainings that may be stopped at any moment: which are whole, and that there always is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from squeezeheads.adapters import load_adapters
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


def lost_order(args: TrainingArguments) -> str | None:
    """The option under which the order of the data in later epochs comes of random numbers that no checkpoint holds
    (transformers 5.23, accelerate 1.15), if one is set."""
    strategy, config = args.train_sampling_strategy, args.accelerator_config
    if strategy == "group_by_length":
        return "train_sampling_strategy='group_by_length'"
    if strategy == "random" and config.dispatch_batches:
        return "accelerator_config: dispatch_batches=True"
    if strategy == "random" and not config.use_seedable_sampler:
        return "accelerator_config: use_seedable_sampler=False"
    return None


class WholeCheckpoints(Trainer):
    """A ``transformers.Trainer`` that can be stopped at any moment, even while it saves, and goes on from its last
    whole checkpoint as if it had not been stopped.

    What it does beside Trainer: an older checkpoint goes only when the next one is whole and on the disk; half-written
    ones are deleted when a run is resumed, and when a disk is full; a checkpoint that lacks what a training needs to go
    on, or from which it would see other data, is refused, and weights that do not fit; no step is made after the last;
    losses are logged at a save too, because the running mean is in no checkpoint (under ``save_strategy="best"``
    Trainer decides on saving after it has logged: there a mean begins anew on resume).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: Path | None = None
        self._goes_on = False  # until the first batch after a resume
        self.add_callback(_LogAtSave())

    def resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that ``resume_from_checkpoint=wanted`` asks for; half-written ones after it are deleted. All
        processes call it, and go on from the one that the first finds.

        Raises:
            ValueError: ``True``, and there is none; nothing asked for, and the folder holds those of another training.
            RuntimeError: it lacks the state of the optimiser, of the schedule, or of random numbers; or later epochs'
                order of data cannot be found again.
        """
        folder = Path(str(self.args.output_dir))
        # The first process looks for all: others may see a shared folder later, or not at all.
        box = [last_whole_checkpoint(folder) if self.accelerator.is_main_process else None]
        broadcast_object_list(box)
        last = box[0]
        if not wanted:
            if last is not None and self.args.save_strategy != SaveStrategy.NO:
                raise ValueError(
                    f"{folder} holds checkpoints of an earlier training ({last.name}): once this one was stopped, it "
                    "would go on from those. Resume with train(resume_from_checkpoint=True), choose another "
                    "output_dir, or delete the checkpoints."
                )
            return None
        found = last if wanted is True else Path(wanted)
        if found is None:
            raise ValueError(f"resume_from_checkpoint=True, but {folder} holds no whole checkpoint.")
        self._check_complete(found)
        self._check_order(found)
        if self.args.should_save and found.parent.resolve() == folder.resolve():  # another folder may be in use
            drop_half_written(found)
        self._resumed_from, self._goes_on = found, True
        return str(found)

    @property
    def plan_folders(self) -> list[Path]:
        """Where the plan of a training that goes on may lie: in the checkpoint, or in the folder that it was saved
        in."""
        found = self._resumed_from
        return [Path(str(self.args.output_dir))] if found is None else [found, found.parent]

    def _check_complete(self, checkpoint: Path) -> None:
        """Trainer (5.23) takes what is there and goes on with new moments, or other random numbers, without a word."""
        wanted: dict[str, Any] = {"scheduler.pt": (checkpoint / "scheduler.pt").is_file()}
        if self.is_deepspeed_enabled:
            if {"optimizer", "scheduler"} & self.accelerator.state.deepspeed_plugin.deepspeed_config.keys():
                wanted.clear()  # the engine keeps the schedule
            wanted["the engine's state"] = self._has_engine_state(checkpoint)
        elif self.is_fsdp_enabled:
            wanted["optimizer.bin"] = any((checkpoint / n).exists() for n in ("optimizer.bin", "optimizer_0"))
        else:
            wanted["optimizer.pt"] = (checkpoint / "optimizer.pt").is_file()
        if getattr(self.accelerator, "scaler", None) is not None:
            wanted["scaler.pt"] = (checkpoint / "scaler.pt").is_file()
        processes = self.args.world_size
        names = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
        wanted |= {name: (checkpoint / name).is_file() for name in names}
        missing = [name for name, there in wanted.items() if not there]
        if missing:
            raise RuntimeError(
                f"{checkpoint} lacks {', '.join(missing)}: a training that went on from it would not be the one that "
                "was stopped. It was saved with save_only_model, by another number of processes, or files were "
                "deleted. To start a new training from its weights, load it with from_pretrained."
            )
        written = sorted(path.name for path in checkpoint.glob("rng_state*.pth"))
        if len(written) != processes:
            raise RuntimeError(
                f"{checkpoint} was saved by {len(written)} processes ({', '.join(written[:2])} …), and this training "
                f"has {processes}: it would see other data. Resume with as many as before."
            )

    def _has_engine_state(self, checkpoint: Path) -> bool:
        """Whether DeepSpeed's part of a checkpoint is there, of each process under ZeRO."""
        latest = checkpoint / "latest"
        if not latest.is_file():
            return False
        folder = checkpoint / latest.read_text(encoding="utf-8").strip()
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        optimizers = self.args.world_size if stage else 0
        models = self.args.world_size if stage == 3 else 1
        found = [len(list(folder.glob(f"*{kind}_states.pt"))) for kind in ("optim", "model")]
        return found[0] >= optimizers and found[1] >= models

    def _lost_order(self) -> str | None:
        """The option that keeps the data of later epochs from being found again, if one is set."""
        iterable = isinstance(self.train_dataset, IterableDataset)
        return None if iterable else lost_order(self.args)

    def _check_order(self, checkpoint: Path) -> None:
        lost = self._lost_order()
        if lost is None:
            return
        epoch = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("epoch") or 0.0
        if epoch > 1 and epoch != int(epoch):
            raise RuntimeError(
                f"{checkpoint} lies within epoch {int(epoch) + 1}, and under {lost} the order of the data there comes "
                "of random numbers that are in no checkpoint: the training would go on with other data. Resume from a "
                "checkpoint of the first epoch or of the end of one, or start afresh without that option."
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As ``Trainer.get_batch_samples``. No batch once all steps are done: Trainer (5.23) would take one more step
        where it resumes from the checkpoint of the last.

        Raises:
            RuntimeError: data without a length that end before the place where the training was stopped.
        """
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            return [], None
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.is_in_train and self._goes_on and not samples:
            raise RuntimeError(
                f"the training data end before step {self.state.global_step}, after which the training was stopped: "
                "without a length nobody knows how often they were gone through, and it would go on with other data. "
                "Give the data set a __len__, or let it yield as many samples as all steps take."
            )
        self._goes_on = False
        return samples, items

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads weights as ``from_pretrained`` does. Trainer (5.23) hands a checkpoint's weights to ``load_state_dict``
        without transformers' renaming: for ViT, DeiT, DINOv2 and their kin no name fits, and it would go on from random
        weights with no more than a warning."""
        if not self._load_renamed(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(str(self.state.best_model_checkpoint), self.model):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str, model: nn.Module) -> bool:
        """Load a plain checkpoint of a transformers model, or its adapters; ``False`` where it is another kind
        (FSDP …)."""
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if is_peft_model(bare) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_adapters(bare, checkpoint)
            return True
        if not isinstance(bare, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        # Weights of several number types lose nothing in the one that holds them all.
        kinds = [value.dtype for value in bare.state_dict().values() if value.is_floating_point()]
        widest = reduce(torch.promote_types, kinds, bare.dtype)
        saved, found = type(bare).from_pretrained(
            checkpoint, config=bare.config, dtype=widest, use_safetensors=True, output_loading_info=True
        )
        amiss = {kind: list(keys)[:3] for kind, keys in found.items() if keys}
        if amiss:
            raise RuntimeError(
                f"{checkpoint} does not fit {type(bare).__name__}: {amiss} …. Going on would train from other weights "
                "than were saved."
            )
        bare.load_state_dict(saved.state_dict())
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        if set(load_result.missing_keys) - ignored or load_result.unexpected_keys:
            raise RuntimeError(
                f"the checkpoint does not fit {type(self.model).__name__}: missing {load_result.missing_keys[:3]} …, "
                f"unexpected {load_result.unexpected_keys[:3]} …. Going on would train from other weights than were "
                "saved."
            )
        super()._issue_warnings_after_load(load_result)

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
