"""What a training step costs: memory by what it is for, and the products that squeezing adds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from squeezeheads.attention import AttentionRecord
from squeezeheads.divergence.tiled import KEPT_BYTES
from squeezeheads.errors import RecipeError
from squeezeheads.squeezed_divergence import shares_maps
from squeezeheads.squeezing import HeadGroups
from squeezeheads.squeezing.weights import MAP_WEIGHTS
from squeezeheads.tiling import CAUSAL_ROWS

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS["TIB"] = 2**40

FLOAT = 4
"""Bytes of a float32."""


def parse_memory(text: str) -> int:
    """Bytes of "16GiB", "500 MB", "1e9".

    Raises:
        RecipeError: no number of bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get((found[2] or "B").upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise RecipeError(f"--memory={text!r}: expected a size such as 16GiB, 500MB, or a number of bytes.")
    return int(float(found[1]) * unit)


def device_memory() -> int:
    """Bytes of the GPU that a run would use, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_bytes(count: float) -> str:
    """A size in words: MiB below one GiB."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, as far as they are counted: not what kernels, libraries and the allocator take for
    themselves, nor the data."""

    teachers: int
    """Weights of all teachers, and what they returned."""
    weights: int
    """The student's, and projectors'."""
    gradients: int
    """Of all that is trained."""
    optimiser: int
    """Two averages in AdamW for each number that is trained."""
    activations: int
    """What the student's forward pass keeps for its backward pass."""
    distillation: int
    """Ours: the teachers' recorded queries, keys and values, gradients that losses make in their forward pass, tiles
    of maps."""
    fixed: int
    """Of all of this, what does not grow with the batch."""

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.teachers, self.weights, self.gradients, self.optimiser, self.activations, self.distillation)
        return sum(parts)

    def largest_batch(self, batch_size: int, memory: int) -> int:
        """The most samples a batch that fit; 0 where not even one does."""
        each = (self.total - self.fixed) / batch_size
        return max(int((memory - self.fixed) // each), 0) if each else batch_size

    def to_json(self) -> dict[str, int]:
        """As plain data."""
        return {**asdict(self), "total": self.total}


def _numbers(*tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def recorded_bytes(record: AttentionRecord) -> int:
    """What a recorded layer keeps alive: its queries, keys and values."""
    found = (record.query, record.key, record.value)
    return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor is not None)


def gradient_bytes(student: AttentionRecord) -> int:
    """Gradients of a student layer's queries and keys, made in the forward pass in float32."""
    return FLOAT * _numbers(student.query, student.key)


def attention_flops(student: AttentionRecord, teacher: AttentionRecord, groups: HeadGroups, options: Any) -> int:
    """Matrix products of ``SqueezedHeads`` for one pair of layers: value, gradients and mixing weights.

    A group's maps count once where they are kept (``kept_bytes``), else once for the weights and once for the loss.
    Counted are the maps of both models, both gradients, and what weights that are found on data ask for. What is done
    entry by entry (softmax, the mixture, the divergence) is no product, as in the models' own count.

    Args:
        options: the objective: its ``weights`` and ``alpha_rows``.
    """
    batch, _, rows, width = student.query.shape
    pairs = _pairs(student)
    heads = {head for group in groups for head in group}
    # Scores, gradients by queries and by keys; the teacher's scores.
    products = pairs * (3 * len(groups) * width + len(heads) * teacher.query.shape[3])
    merging = [group for group in groups if len(group) > 1]
    if options.weights in MAP_WEIGHTS:
        share = min(1.0, options.alpha_rows / rows) if options.alpha_rows else 1.0
        products += int(share * sum(_difference_products(teacher, group, pairs) for group in merging))
        kept = [group for group in dict.fromkeys(merging) if kept_bytes(teacher, [group], options)]
        products -= pairs * teacher.query.shape[3] * sum(len(group) for group in kept)
    elif options.weights == "values" and merging:
        products += sum(_circuit_products(teacher, len(group), teacher.num_keys, len(group)) for group in groups)
    return 2 * batch * products


def kept_bytes(teacher: AttentionRecord, groups: Sequence[Sequence[int]], options: Any) -> int:
    """Bytes of one group's maps that stay between its weights and the loss, the most that any group takes; 0 where
    none stay, see ``squeezed_divergence``. About: under a causal mask tiles end with their last row."""
    if torch.cuda.is_available() or not shares_maps(
        groups, options.weights, options.alpha_rows, options.temperature, options.implementation, "cpu"
    ):
        return 0
    rows, keys = teacher.num_queries, teacher.num_keys
    entries = rows * min(keys, (keys + CAUSAL_ROWS) // 2) if teacher.is_causal else rows * keys
    sizes = [FLOAT * teacher.query.shape[0] * len(group) * entries for group in groups if len(group) > 1]
    return max((size for size in sizes if size <= KEPT_BYTES), default=0)


def relation_flops(student: AttentionRecord, teacher: AttentionRecord, groups: HeadGroups) -> int:
    """Products of ``SqueezedRelations`` for one pair of layers: scores of both, gradients by both sides, and the
    teacher's features in the coordinates of its output."""
    batch, pairs = student.query.shape[0], _pairs(student)
    value = student.query if student.value is None else student.value
    own = len(groups) * 3 * value.shape[3]
    theirs = len(groups) * max(_circuit_width(teacher, len(group)) for group in groups)  # all as wide as the widest
    features = sum(
        teacher.num_keys * len(group) * _value_width(teacher) * _circuit_width(teacher, len(group)) for group in groups
    )
    return 2 * batch * (pairs * (own + theirs) + features)


def _difference_products(teacher: AttentionRecord, group: Sequence[int], pairs: int) -> int:
    """Of one sample and group of ``k`` heads, see ``squeezing.residuals``: k maps, k − 1 differences by the values of
    the group, what that reads through the output projection, and the Gram matrix of the (k − 1)·k vectors."""
    k, value_width = len(group), _value_width(teacher)
    distinct = len({teacher.key_value_head(head) for head in group})
    maps = pairs * (k * teacher.query.shape[3] + (k - 1) * distinct * value_width)
    return maps + _circuit_products(teacher, k, teacher.num_queries, (k - 1) * k)


def _circuit_products(teacher: AttentionRecord, k: int, rows: int, vectors: int) -> int:
    """Of ``vectors`` vectors a row of a group of ``k`` heads: through the output projection, and their Gram matrix."""
    return rows * _circuit_width(teacher, k) * (vectors * _value_width(teacher) + vectors**2)


def _value_width(record: AttentionRecord) -> int:
    return (record.query if record.value is None else record.value).shape[3]


def _circuit_width(teacher: AttentionRecord, k: int) -> int:
    """Of the narrow coordinates of ``k`` heads' output, see ``squeezing.residuals.isometry``."""
    narrow = k * _value_width(teacher)
    return narrow if teacher.output_weight is None else min(narrow, teacher.output_weight.shape[-1])


def _pairs(record: AttentionRecord) -> int:
    """Entries of one map that are looked at: half under a causal mask."""
    return record.num_queries * record.num_keys // (2 if record.is_causal else 1)


def step_flops(student: int, teachers: Sequence[int], ours: int, again: bool) -> dict[str, Any]:
    """Products of one step, and the share of what squeezing adds.

    Args:
        student: of its forward pass; the backward pass takes twice as many.
        teachers: of each one's forward pass.
        ours: of all squeezing objectives.
        again: whether the student's forward pass runs twice (gradient checkpointing).
    """
    models = (4 if again else 3) * student + sum(teachers)
    total = models + ours
    return {
        "student": (4 if again else 3) * student,
        "teachers": sum(teachers),
        "squeezing": ours,
        "squeezing_share": ours / total if total else 0.0,
    }
