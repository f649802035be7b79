"""What a training in several processes needs beside Trainer: teachers and projectors in their place, samples that count
once, and a word where a way of distributing cannot work."""

from __future__ import annotations

import copy
import os
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import DistributedType, find_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

COPIES = "only_copies"
"""Key of a batch all samples of which were seen elsewhere: it is run, for the other processes wait for it, and counts
nothing. No model sees it."""


def check_distribution(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Whether this way of distributing can work.

    Raises:
        ValueError: it cannot; says why and what to do instead.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    asked = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if plugin is None and asked:
        raise ValueError(
            "FSDP is asked for and would be ignored: accelerate shards models on accelerators alone, and this runs on "
            f"{args.device}. Leave fsdp out: the processes then keep whole models (DDP)."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_config: version {plugin.fsdp_version} flattens the weights of a layer into one, so that its output "
            "projection cannot be read. Use version 2."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallel, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    cut = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if cut:
        raise ValueError(
            f"parallelism_config: {', '.join(cut)} cuts heads or tokens apart among processes, and attention is "
            "compared of whole heads over whole sequences. Leave it out: use DDP or FSDP2, which keep them whole."
        )
    even = accelerator.even_batches or args.dataloader_drop_last
    if accelerator.num_processes > 1 and not even:
        raise ValueError(
            "accelerator_config: even_batches=False gives processes different numbers of steps, and they would wait "
            "for each other for ever. Leave it at True: samples that fill up a last batch count nothing."
        )


def place_teacher(accelerator: Accelerator, teacher: nn.Module) -> nn.Module:
    """A teacher where it is run: on the device, under FSDP2 in shards like the student. There it is frozen for good.

    Raises:
        ValueError: one that DeepSpeed has taken apart.
    """
    if next(teacher.parameters(), None) is None:
        return teacher  # one that reads stored predictions
    if any(hasattr(p, "ds_id") for p in teacher.parameters()):
        raise ValueError(
            f"the teacher ({type(teacher).__name__}) was loaded in pieces: under ZeRO-3 from_pretrained splits every "
            "model that is loaded after TrainingArguments were made, and the student's alone are put together again. "
            "Load the teacher before them."
        )
    if not accelerator.state.is_fsdp2:
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    from accelerate.utils import fsdp2_prepare_model

    own = accelerator.state.fsdp_plugin
    theirs = copy.copy(own)
    # The classes that are sharded one by one may be named for the student; a teacher has its own.
    present = {type(module).__name__ for module in teacher.modules()}
    named = [name for name in own.transformer_cls_names_to_wrap or () if name in present]
    theirs.transformer_cls_names_to_wrap = named or None
    teacher.requires_grad_(False)  # accelerate would raise trainable weights to float32
    accelerator.state.fsdp_plugin = theirs
    try:
        sharded: Any = fsdp2_prepare_model(accelerator, teacher)
    finally:
        accelerator.state.fsdp_plugin = own
    # Some parts are left whole after a forward pass, for the backward pass to come: to a teacher none comes.
    sharded.set_reshard_after_forward(True)
    return sharded


def place_projector(accelerator: Accelerator, projector: nn.Module, objective: str) -> nn.Module:
    """A projector where it is trained, the first process's in all. Under FSDP2 too each process has it whole: it is
    small, and no part of the student.

    Raises:
        ValueError: under DeepSpeed, whose engine would leave the processes with different ones.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"{objective!r} trains a projector beside the student, whose gradients DeepSpeed's engine does not reduce: "
            "use DDP or FSDP2 (fsdp_config version 2), or leave it out."
        )
    if accelerator.state.is_fsdp2:
        return DistributedDataParallel(projector.to(accelerator.device))
    return accelerator.prepare_model(projector)


def own_samples(accelerator: Accelerator, batch: dict[str, Any]) -> dict[str, Any]:
    """The last batch of an epoch without the samples that accelerate fills it up with, from the epoch's beginning.

    Where nothing is left the first sample stays, marked by ``COPIES``. Data without a length, and batches whose first
    dimension is not that of samples, stay as they are: their copies count.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.in_dataloader or not state.end_of_dataloader:
        return batch
    rest, size = _last_round(accelerator), find_batch_size(batch)
    if rest is None or size is None:
        return batch
    left, share = rest
    if size != share:
        return batch
    mine = min(max(left - accelerator.process_index * share, 0), share)
    if mine == share:
        return batch
    kept = {
        key: value[: max(mine, 1)] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for key, value in batch.items()
    }
    return kept if mine else {**kept, COPIES: True}


def _last_round(accelerator: Accelerator) -> tuple[int, int] | None:
    """How many samples the last batches of all processes have together, and the size of each when full; ``None`` where
    it is not known or all are full."""
    loader = accelerator.gradient_state.active_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    while isinstance(sampler, SkipBatchSampler):
        sampler = sampler.batch_sampler
    if not isinstance(sampler, BatchSamplerShard) or sampler.drop_last or sampler.batch_size is None:
        return None
    source = getattr(sampler.batch_sampler, "sampler", None)
    if source is None or not hasattr(source, "__len__"):
        return None
    share = sampler.batch_size // sampler.num_processes if sampler.split_batches else sampler.batch_size
    left = len(source) % (share * sampler.num_processes)
    return (left, share) if left else None


def check_reached(loss: Tensor, outputs: Any, student: nn.Module) -> None:
    """Whether each parameter that the student's outputs depend on gets a gradient: DDP and FSDP wait for all of them.

    Raises:
        ValueError: names those that get none.
    """
    made_of = _parameters_behind([t for t in tree_leaves(outputs) if isinstance(t, Tensor)])
    missing = made_of - _parameters_behind([loss])
    if missing:
        names = [name for name, parameter in student.named_parameters() if parameter in missing]
        # The parameters of an FSDP2 model are others while it runs.
        which = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}" if names else f"{len(missing)} parameters"
        raise ValueError(
            f"no objective gives {which} of the student a gradient, and with several processes each waits for all. Add "
            "an objective on what the student predicts (TaskLoss(0.0) will do), or freeze them: requires_grad_(False)."
        )


def _parameters_behind(tensors: list[Tensor]) -> set[Tensor]:
    """The leaves that these tensors were computed from."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found
