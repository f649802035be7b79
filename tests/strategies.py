"""Random attention records, and how to pad them. Hypothesis draws shapes and a seed; torch fills the tensors."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import changed
from squeezeheads.attention import AttentionRecord

MASKS = (
    "none",
    "causal",
    "causal_bool",
    "causal_and_padding",
    "padding_left",
    "padding_right",
    "padding_additive",
    "random_bool",
    "random_per_head",
    "additive_inf",
    "additive_min",
    "bias",
    "bias_per_head",
    "bias_inf",
    "window",
)
ROWS = ("none", "bool", "integer", "float", "single")
MIXES = ("groups", "dense", "one_hot", "some_zero")


@dataclasses.dataclass(frozen=True)
class Case:
    student: AttentionRecord
    teacher: AttentionRecord
    mix: Tensor
    rows: Tensor | None
    temperature: float = 1.0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_mask(kind: str, gen: torch.Generator, batch: int, heads: int, queries: int, keys: int):
    """An attention mask of this kind and `is_causal`. Bool: true where the key may be used."""
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    if kind == "none":
        return None, False
    if kind == "causal":
        return None, True
    if kind == "causal_bool":
        return causal, False
    if kind in ("padding_left", "padding_right", "padding_additive", "causal_and_padding"):
        # From 0: a sample that is all padding must do no harm.
        length = torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=gen)
        place = torch.arange(keys)
        real = place < length if kind == "padding_right" else place >= keys - length
        if kind == "padding_additive":
            return torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min), False
        return real, kind == "causal_and_padding"
    if kind in ("random_bool", "random_per_head"):
        may = torch.rand(batch, heads if kind == "random_per_head" else 1, queries, keys, generator=gen) < 0.6
        may[torch.rand(may.shape[:3], generator=gen) < 0.15] = False
        return may, False
    if kind == "additive_inf":
        return torch.zeros(queries, keys).masked_fill(~causal, -torch.inf), False
    if kind == "additive_min":
        may = torch.rand(batch, 1, queries, keys, generator=gen) < 0.7
        return torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min), False
    if kind == "bias":
        return 2 * torch.randn(queries, keys, generator=gen), False
    if kind == "bias_per_head":
        return 2 * torch.randn(1, heads, queries, keys, generator=gen), False
    if kind == "bias_inf":
        bias = 2 * torch.randn(batch, heads, queries, keys, generator=gen)
        return bias.masked_fill(torch.rand(bias.shape, generator=gen) < 0.3, -torch.inf), False
    if kind == "window":
        reach = int(torch.randint(1, 8, (), generator=gen))
        return causal & causal.new_ones(queries, keys).triu(1 - reach), False
    raise AssertionError(kind)


def make_record(
    seed: int = 0,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    queries: int = 7,
    keys: int | None = None,
    width: int = 8,
    value_width: int | None = None,
    model_width: int | None = None,
    mask: str = "none",
    scale: float | None = None,
    score_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    name: str = "attention",
    transposed: bool = True,
) -> AttentionRecord:
    gen = generator(seed)
    kv_heads = kv_heads or heads
    keys = queries if keys is None else keys
    value_width = width if value_width is None else value_width
    model_width = heads * value_width if model_width is None else model_width

    def tensor(heads, length, width):
        if transposed:  # the layout that models produce: heads split off a projection, so not contiguous
            return torch.randn(batch, length, heads, width, generator=gen).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, width, generator=gen).to(dtype)

    attention_mask, is_causal = make_mask(mask, gen, batch, heads, queries, keys)
    if attention_mask is not None and attention_mask.is_floating_point():
        # A mask of finfo.min rounds to -inf or finfo.min in a narrower format; both must mean "masked".
        attention_mask = attention_mask.to(dtype)
    return AttentionRecord(
        name=name,
        query=tensor(heads, queries, width) * score_scale,
        key=tensor(kv_heads, keys, width),
        value=tensor(kv_heads, keys, value_width),
        attention_mask=attention_mask,
        is_causal=is_causal,
        scale=scale,
        output_weight=torch.randn(heads, value_width, model_width, generator=gen).to(dtype) * value_width**-0.5,
    )


def make_mix(
    kind: str, gen: torch.Generator, batch: int, students: int, teachers: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, S, T), rows convex; float64 with a float64 record, as `mixing_matrix` has it, else float32."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if kind == "one_hot":
        return torch.nn.functional.one_hot(torch.randint(teachers, (batch, students), generator=gen), teachers).to(
            dtype
        )
    weight = torch.rand(batch, students, teachers, generator=gen, dtype=dtype) + 0.05
    if kind == "some_zero":
        keep = torch.rand(batch, students, teachers, generator=gen) < 0.5
        keep[..., 0] |= ~keep.any(-1)
        weight = weight * keep
    if kind == "groups":
        if students <= teachers:
            owner = torch.arange(teachers) * students // teachers
            keep = owner == torch.arange(students)[:, None]
        else:
            keep = torch.arange(teachers) == (torch.arange(students) * teachers // students)[:, None]
        weight = weight * keep
    return weight / weight.sum(-1, keepdim=True)


def make_rows(kind: str, gen: torch.Generator, batch: int, queries: int) -> Tensor | None:
    if kind == "none":
        return None
    keep = torch.rand(batch, queries, generator=gen) < 0.7
    if kind == "single":
        keep = torch.zeros(batch, queries, dtype=torch.bool)
        keep[0, int(torch.randint(queries, (), generator=gen))] = True
    if kind == "integer":  # what tokenizers return
        return keep.long()
    if kind == "float":
        return keep * (0.1 + 3 * torch.rand(batch, queries, generator=gen))
    return keep


def make_case(
    seed: int = 0,
    batch: int = 2,
    queries: int = 7,
    keys: int = 7,
    student_heads: int = 2,
    student_kv_heads: int | None = None,
    teacher_heads: int = 4,
    teacher_kv_heads: int | None = None,
    student_width: int = 5,
    teacher_width: int = 8,
    student_mask: str = "none",
    teacher_mask: str = "none",
    rows: str = "none",
    mix: str = "groups",
    temperature: float = 1.0,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_score_scale: float = 1.0,
    teacher_score_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
) -> Case:
    gen = generator(seed)
    shared = {"batch": batch, "queries": queries, "keys": keys, "dtype": dtype, "transposed": transposed}
    return Case(
        student=make_record(
            seed + 1,
            heads=student_heads,
            kv_heads=student_kv_heads,
            width=student_width,
            mask=student_mask,
            scale=student_scale,
            score_scale=student_score_scale,
            name="student.attention",
            **shared,
        ),
        teacher=make_record(
            seed + 2,
            heads=teacher_heads,
            kv_heads=teacher_kv_heads,
            width=teacher_width,
            mask=teacher_mask,
            scale=teacher_scale,
            score_scale=teacher_score_scale,
            name="teacher.attention",
            **shared,
        ),
        mix=make_mix(mix, gen, batch, student_heads, teacher_heads, dtype),
        rows=make_rows(rows, gen, batch, queries),
        temperature=temperature,
    )


# Mostly small, where odd cases live and runs are fast; now and then up to the sizes that span several tiles.
lengths = st.one_of(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 200))
widths = st.sampled_from((1, 2, 3, 5, 8, 16, 33, 64))


@st.composite
def head_counts(draw, most: int = 12):
    """Query heads and a divisor of them."""
    heads = draw(st.integers(1, most))
    return heads, draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))


@st.composite
def cases(
    draw,
    dtype: torch.dtype = torch.float32,
    score_scales=(1e-3, 1.0, 1.0, 3.0),
    masks=MASKS,
    lengths=lengths,
    most_heads: int = 12,
):
    students, student_kv = draw(head_counts(most_heads))
    teachers, teacher_kv = draw(head_counts(most_heads))
    queries = draw(lengths)
    return make_case(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 3)),
        queries=queries,
        keys=draw(st.one_of(st.just(queries), lengths)),
        student_heads=students,
        student_kv_heads=student_kv,
        teacher_heads=teachers,
        teacher_kv_heads=teacher_kv,
        student_width=draw(widths),
        teacher_width=draw(widths),
        student_mask=draw(st.sampled_from(masks)),
        teacher_mask=draw(st.sampled_from(masks)),
        rows=draw(st.sampled_from(ROWS)),
        mix=draw(st.sampled_from(MIXES)),
        temperature=draw(st.sampled_from((1.0, 1.0, 0.5, 2.0, 7.3))),
        student_scale=draw(st.sampled_from((None, None, 0.3, 1.0))),
        teacher_scale=draw(st.sampled_from((None, None, 0.3, 1.0))),
        student_score_scale=draw(st.sampled_from(score_scales)),
        teacher_score_scale=draw(st.sampled_from(score_scales)),
        dtype=dtype,
        transposed=draw(st.booleans()),
    )


@st.composite
def teachers(draw, dtype: torch.dtype = torch.float64, most_heads: int = 6, score_scales=(0.1, 1.0, 1.0, 4.0)):
    """A teacher record and rows, for the squeezing tests."""
    heads, kv_heads = draw(head_counts(most_heads))
    batch, queries = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 9), st.integers(1, 40)))
    seed = draw(st.integers(0, 2**31))
    record = make_record(
        seed,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=draw(st.one_of(st.just(queries), st.integers(1, 40))),
        width=draw(st.sampled_from((1, 3, 8))),
        value_width=draw(st.sampled_from((1, 4, 8))),
        # From far below to far above the width that a group of heads spans.
        model_width=draw(st.sampled_from((1, 5, 16, 100))),
        mask=draw(st.sampled_from([kind for kind in MASKS if kind != "random_per_head"])),
        score_scale=draw(st.sampled_from(score_scales)),
        dtype=dtype,
    )
    return record, make_rows(draw(st.sampled_from(ROWS)), generator(seed), batch, queries)


def padded(record: AttentionRecord, left: int, right: int, seed: int = 99, size: float = 3.0) -> AttentionRecord:
    """The same self-attention with junk tokens added on either side, and a mask that hides them."""
    gen = generator(seed)

    def widen(tensor):
        if tensor is None:
            return None
        batch, heads, _, width = tensor.shape
        before, after = (
            size * torch.randn(batch, heads, count, width, generator=gen).to(tensor.dtype) for count in (left, right)
        )
        return torch.cat((before, tensor, after), 2)

    length = record.key.shape[2]
    place = torch.arange(left + length + right)
    real = (place >= left) & (place < left + length)
    assert record.attention_mask is None, "the padding mask takes this place"
    return changed(
        record,
        query=widen(record.query),
        key=widen(record.key),
        value=widen(record.value),
        attention_mask=real[None, None, None, :].expand(record.query.shape[0], 1, 1, -1),
    )


def padded_rows(record: AttentionRecord, left: int, right: int, rows: Tensor | None = None) -> Tensor:
    """Rows for `padded`: weight 0 on the junk."""
    batch, _, length, _ = record.query.shape
    rows = torch.ones(batch, length) if rows is None else rows
    return torch.nn.functional.pad(rows, (left, right))
