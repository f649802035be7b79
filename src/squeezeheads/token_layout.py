"""Which tokens of student and teacher are the same: patches by place, special tokens by kind.

Vision transformers put special tokens before the patches: a class token, DeiT's distillation token, registers. Where
two models differ by these alone, the tokens that both have are compared (METHOD §4, Tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.attention import AttentionRecord, check_comparable, check_same_samples

KINDS = ("class", "distillation", "register")

Layout = tuple[str, ...]
"""The kinds of the special tokens that stand before the patches, in their order."""

_CLASS = ("class",)
# By transformers' model types. tests/test_token_layout.py counts the tokens of each.
_KNOWN: Mapping[str, Callable[[Any], Layout]] = {
    "beit": lambda _: _CLASS,
    "data2vec-vision": lambda _: _CLASS,
    "deit": lambda _: ("class", "distillation"),
    "dinov2": lambda _: _CLASS,
    "dinov2_with_registers": lambda config: _CLASS + ("register",) * config.num_register_tokens,
    "vit": lambda _: _CLASS,
    "vit_msn": lambda _: _CLASS,
}


def known_layout(model: nn.Module) -> Layout | None:
    """The special tokens of a model by its configuration (transformers) or its ``num_prefix_tokens`` (timm), through
    any wrapper; ``None`` where they are not known."""
    for module in model.modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(model_type, str) and model_type in _KNOWN:
            return _KNOWN[model_type](module.config)
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            return _of_timm(module)
    return None


def _of_timm(module: Any) -> Layout:
    """timm says how many there are; its distilled DeiT has the distillation token second, registers come last."""
    known: list[str] = []
    if getattr(module, "has_class_token", getattr(module, "cls_token", None) is not None):
        known.append("class")
    if getattr(module, "dist_token", None) is not None:
        known.append("distillation")
    known += ["register"] * (module.num_prefix_tokens - len(known))
    return tuple(known)


def check_layout(kinds: Sequence[str], where: str) -> Layout:
    """A layout as a user gives it.

    Raises:
        ValueError: something else than a list of known kinds; names ``where``.
    """
    if isinstance(kinds, str) or not all(kind in KINDS for kind in kinds):
        raise ValueError(f"{where}={kinds!r}: expected a list of {', '.join(KINDS)}, in the order of the tokens.")
    return tuple(kinds)


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that two self-attention layers have in common: patches, and each kind of special token that both have
    equally many of."""

    student: Layout
    """The student's special tokens, all before its patches."""
    teacher: Layout
    """The teacher's."""
    patches: int
    """Number of patches, in both."""

    @property
    def special(self) -> Layout:
        """The special tokens that are compared, in the student's order."""
        return tuple(kind for kind in self.student if self.student.count(kind) == self.teacher.count(kind))

    def __len__(self) -> int:
        """Number of tokens that are compared."""
        return len(self.special) + self.patches

    @property
    def of_student(self) -> list[int]:
        """Places of the compared tokens in the student's sequence."""
        return self._places(self.student)

    @property
    def of_teacher(self) -> list[int]:
        """Places of the same tokens in the teacher's sequence."""
        return self._places(self.teacher)

    def _places(self, layout: Layout) -> list[int]:
        occurrences = {kind: [i for i, other in enumerate(layout) if other == kind] for kind in KINDS}
        special = [occurrences[kind].pop(0) for kind in self.special]
        return special + list(range(len(layout), len(layout) + self.patches))

    def __str__(self) -> str:
        counts = {kind: self.special.count(kind) for kind in KINDS if kind in self.special}
        named = [kind if count == 1 else f"{count} × {kind}" for kind, count in counts.items()]
        return (
            f"{' + '.join([*named, f'{self.patches} patches'])} ({len(self)} of the student's "
            f"{len(self.student) + self.patches}, of the teacher's {len(self.teacher) + self.patches})"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"student": list(self.student), "teacher": list(self.teacher), "patches": self.patches}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> SharedTokens | None:
        """What ``to_json`` gave; ``None`` stays."""
        return data and cls(tuple(data["student"]), tuple(data["teacher"]), data["patches"])  # type: ignore[return-value]

    def rows(self, rows: Tensor | None) -> Tensor | None:
        """Of the student's query rows (B, N) that count, those that are compared (B, n).

        Raises:
            ValueError: another number of rows than the student has tokens.
        """
        if rows is None:
            return None
        if rows.shape[-1] != len(self.student) + self.patches:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}, but the student has {len(self.student) + self.patches} tokens: "
                "expected (B, Q) by the student's tokens."
            )
        return _take(rows, self.of_student, -1)

    def student_states(self, states: Tensor) -> Tensor:
        """Of the student's hidden states (B, N, E) those of the compared tokens, (B, n, E).

        Raises:
            ValueError: states of other tokens.
        """
        return self._of_states(states, self.student, self.of_student, "student")

    def teacher_states(self, states: Tensor) -> Tensor:
        """Of the teacher's hidden states those of the same tokens, in the same order."""
        return self._of_states(states, self.teacher, self.of_teacher, "teacher")

    def _of_states(self, states: Tensor, layout: Layout, places: list[int], whose: str) -> Tensor:
        if states.shape[1] != len(layout) + self.patches:
            raise ValueError(
                f"hidden states of the {whose} {tuple(states.shape)} have {states.shape[1]} tokens, but the plan "
                f"compares {self._expected(layout)}: it was made for another input size or another model."
            )
        return _take(states, places, 1)

    def taught(self, teacher: AttentionRecord) -> AttentionRecord:
        """(B, T, n, D) queries of the compared tokens, all keys: the teacher as squeezing sees it.

        The teacher's maps stay what they are: the mixing weights are those of what its layer really writes, at the
        rows that are compared. That a student lacks some of the keys is a matter of the comparison (``squeezed``).
        """
        self._check(teacher, self.teacher, "teacher")
        return _select(teacher, self.of_teacher, None)

    def squeezed(self, student: AttentionRecord, teacher: AttentionRecord) -> tuple[AttentionRecord, AttentionRecord]:
        """Both records for a comparison of mixed maps: (B, ·, n, ·) queries, the teacher's keys.

        The student's keys stand at the places of the teacher's; a key that it lacks is forbidden to it. So the
        teacher's maps are mixed first and the mixture is renormalised on the common keys (METHOD §4, Support); the
        student's own further keys leave no trace.

        Raises:
            ValueError: records of other tokens, a causal mask.
        """
        taught = self.taught(teacher)
        self._check(student, self.student, "student")
        learned = _select(student, self.of_student, self.of_student)
        if len(self) != teacher.num_keys:
            learned = _spread(learned, self.of_teacher, teacher.num_keys)
        elif self.of_teacher != list(range(len(self))):  # the same kinds in another order
            learned = _select(learned, None, [self.of_teacher.index(place) for place in range(len(self))])
        return learned, taught

    def sliced(self, student: AttentionRecord, teacher: AttentionRecord) -> tuple[AttentionRecord, AttentionRecord]:
        """Both records as self-attention among the compared tokens alone: (B, ·, n, ·) queries, keys and values.

        For what is compared head by head, where renormalising a head's map on the common keys is to leave the other
        keys out.

        Raises:
            ValueError: records of other tokens, a causal mask.
        """
        self._check(student, self.student, "student")
        self._check(teacher, self.teacher, "teacher")
        mine, theirs = self.of_student, self.of_teacher
        return _select(student, mine, mine), _select(teacher, theirs, theirs)

    def _check(self, record: AttentionRecord, layout: Layout, whose: str) -> None:
        expected = len(layout) + self.patches
        if (record.num_queries, record.num_keys) != (expected, expected):
            raise ValueError(
                f"{whose} {record.name!r} has {record.num_queries} queries × {record.num_keys} keys, but the plan "
                f"compares {self._expected(layout)}: it was made for another input size or another model."
            )

    def _expected(self, layout: Layout) -> str:
        return f"{len(layout) + self.patches} tokens ({len(layout)} special, {self.patches} patches)"


def share_tokens(
    student: AttentionRecord,
    teacher: AttentionRecord,
    student_layout: Layout | None,
    teacher_layout: Layout | None,
) -> SharedTokens | None:
    """What two layers have in common.

    Args:
        student_layout, teacher_layout: their special tokens; ``None`` where not known.

    Returns:
        The shared tokens; ``None`` where a layout is not known, or a layer attends to another sequence: then all
        tokens are compared, one by one.

    Raises:
        ValueError: different patch grids, or different tokens and no layout that says which; names both.
    """
    own = all(record.num_queries == record.num_keys for record in (student, teacher))
    if student_layout is None or teacher_layout is None or not own:
        check_comparable(student, teacher)
        return None
    check_same_samples(student, teacher)
    return match_tokens(
        student.num_keys,
        teacher.num_keys,
        student_layout,
        teacher_layout,
        f"student {student.name!r} and teacher {teacher.name!r} compare different tokens: {student.num_queries} "
        f"queries × {student.num_keys} keys against {teacher.num_queries} × {teacher.num_keys}",
    )


def match_tokens(
    student: int, teacher: int, student_layout: Layout, teacher_layout: Layout, difference: str
) -> SharedTokens:
    """What two sequences have in common, by how many tokens they have and which of these are special.

    Args:
        student, teacher: tokens of each.
        student_layout, teacher_layout: their special tokens.
        difference: how the sequences differ, should they: begins the message.

    Raises:
        ValueError: different patch grids; names both.
    """
    mine, theirs = student - len(student_layout), teacher - len(teacher_layout)
    if mine != theirs or mine < 0:
        raise ValueError(
            f"{difference}. Without special tokens ({_listed(student_layout)} against {_listed(teacher_layout)}) these "
            f"are grids of {mine} and {theirs} patches: they can only be compared patch by patch. Use the same image "
            "size and patch size; where the special tokens are others, name them (student_tokens, teacher_tokens)."
        )
    return SharedTokens(student_layout, teacher_layout, mine)


def _listed(layout: Layout) -> str:
    return ", ".join(layout) or "none"


def _take(tensor: Tensor, places: Sequence[int], dim: int) -> Tensor:
    """``tensor`` at these places; itself where they are all, a view where they are consecutive."""
    if list(places) == list(range(tensor.shape[dim])):
        return tensor
    if list(places) == list(range(places[0], places[0] + len(places))):
        return tensor.narrow(dim, places[0], len(places))
    return tensor.index_select(dim, torch.tensor(places, device=tensor.device))


def _select(record: AttentionRecord, queries: Sequence[int] | None, keys: Sequence[int] | None) -> AttentionRecord:
    """A record of some of its query rows and keys; ``None`` keeps all."""
    queries = list(range(record.num_queries)) if queries is None else queries
    keys = list(range(record.num_keys)) if keys is None else keys
    mask = record.attention_mask
    if len(queries) == record.num_queries and len(keys) == record.num_keys and queries == keys == sorted(keys):
        return record
    _refuse_causal(record)
    if mask is not None:
        for dim, places in ((-2, queries), (-1, keys)):
            if mask.dim() >= -dim and mask.shape[dim] > 1:
                mask = _take(mask, places, dim)
    return AttentionRecord(
        record.name,
        _take(record.query, queries, 2),
        _take(record.key, keys, 2),
        None if record.value is None else _take(record.value, keys, 2),
        attention_mask=mask,
        scale=record.scale,
        output_weight=lambda: record.output_weight,
    )


def _spread(record: AttentionRecord, places: Sequence[int], keys: int) -> AttentionRecord:
    """A record whose keys stand at ``places`` among ``keys`` keys; the others are forbidden. Without values."""
    _refuse_causal(record)
    where = torch.tensor(places, device=record.key.device)
    batch, heads, _, width = record.key.shape
    key = record.key.new_zeros(batch, heads, keys, width).index_copy(2, where, record.key)
    mask = record.attention_mask
    if mask is None:
        mask = torch.ones(1, 1, 1, len(places), dtype=torch.bool, device=record.key.device)
    mask = mask.expand(*mask.shape[:-1], len(places))
    forbidden: Any = False if mask.dtype == torch.bool else -torch.inf
    mask = mask.new_full((*mask.shape[:-1], keys), forbidden).index_copy(-1, where, mask)
    return AttentionRecord(record.name, record.query, key, attention_mask=mask, scale=record.scale)


def _refuse_causal(record: AttentionRecord) -> None:
    if record.is_causal:
        raise ValueError(
            f"{record.name!r} is causal: tokens can only be picked out of attention without a causal mask."
        )


__all__ = ["KINDS", "Layout", "SharedTokens", "check_layout", "known_layout", "match_tokens", "share_tokens"]
