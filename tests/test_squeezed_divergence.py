"""Weights and divergence in one sweep: what both give one after the other, and what the dense reference gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from squeezeheads import attention_divergence, group_heads, mixing_matrix
from squeezeheads.divergence import tiled
from squeezeheads.squeezed_divergence import squeezed_divergence
from squeezeheads.squeezing.weights import MAP_WEIGHTS
from strategies import MASKS, ROWS, generator, make_record, make_rows

GROUPS = {
    "adjacent": lambda: group_heads(6, 3),
    "uneven": lambda: ((0, 1, 2, 3), (4,), (5,)),
    "in another order": lambda: ((4, 0), (5, 2, 1), (3,)),
    "some heads left out": lambda: ((0, 1), (3, 4), (5,)),
    "one group twice": lambda: ((0, 1), (0, 1), (2, 3, 4, 5)),
    "shared heads": lambda: ((0, 1), (1, 2), (5, 2, 3)),
}


def records(seed=0, mask="none", teacher_mask=None, dtype=torch.float32, queries=13):
    student = make_record(seed, heads=3, kv_heads=1, queries=queries, width=8, mask=mask, dtype=dtype)
    teacher = make_record(
        seed + 1, heads=6, kv_heads=3, queries=queries, width=10, value_width=7, mask=teacher_mask or mask, dtype=dtype
    )
    return student, teacher


def with_gradients(student, loss):
    leaves = {name: getattr(student, name).detach().clone().requires_grad_() for name in ("query", "key")}
    value = loss(oracle.changed(student, **leaves))
    if value.requires_grad:
        value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def one_after_the_other(student, teacher, groups, weights="least_squares", rows=None):
    mix = mixing_matrix(teacher, groups, weights=weights, rows=rows)
    return with_gradients(student, lambda record: attention_divergence(record, teacher, mix, rows=rows))


def together(student, teacher, groups, weights="least_squares", rows=None):
    return with_gradients(
        student, lambda record: squeezed_divergence(record, teacher, groups, weights=weights, rows=rows)
    )


def assert_same(found, expected, tolerance):
    (value, gradients), (other, others) = found, expected
    assert value.dtype == other.dtype
    torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == others[name].dtype
        size = others[name].abs().max().item()
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=tolerance * size + 1e-12)


@pytest.fixture(params=["kept", "made again", "in small tiles"])
def way(request, monkeypatch):
    if request.param == "made again":
        monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    if request.param == "in small tiles":
        monkeypatch.setattr("squeezeheads.tiling.TILE_BYTES", 4 * 13 * 6 * 4)
    return request.param


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("weights", MAP_WEIGHTS)
def test_it_is_what_both_give_one_after_the_other(way, groups, weights):
    student, teacher = records(3, "causal")
    arguments = (student, teacher, GROUPS[groups](), weights)
    assert_same(together(*arguments), one_after_the_other(*arguments), 2e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ROWS)
def test_masks_and_rows(way, mask, kind):
    student, teacher = records(5, mask)
    rows = make_rows(kind, generator(4), 2, 13)
    arguments = (student, teacher, GROUPS["in another order"](), "least_squares", rows)
    assert_same(together(*arguments), one_after_the_other(*arguments), 5e-5)


@settings(max_examples=25)
@given(st.data())
def test_masks_may_differ(data):
    student, teacher = records(data.draw(st.integers(0, 99)), *(data.draw(st.sampled_from(MASKS)) for _ in range(2)))
    rows = make_rows(data.draw(st.sampled_from(ROWS)), generator(1), 2, 13)
    groups = GROUPS[data.draw(st.sampled_from(sorted(GROUPS)))]()
    arguments = (student, teacher, groups, "least_squares", rows)
    assert_same(together(*arguments), one_after_the_other(*arguments), 1e-4)


@pytest.mark.parametrize(("weights", "solve"), [("least_squares", oracle.rounds), ("joint", oracle.joint)])
@pytest.mark.parametrize("mask", ["none", "causal", "padding_left"])
def test_the_dense_reference_gives_the_same(way, weights, solve, mask):
    student, teacher = records(7, mask, dtype=torch.float64)
    groups, rows = ((4, 0), (5, 2, 1), (3,)), make_rows("bool", generator(2), 2, 13)
    mix = torch.zeros(2, 3, 6, dtype=torch.float64)
    for index, group in enumerate(groups):
        mix[:, index, list(group)] = solve(teacher, group, rows) if len(group) > 1 else 1.0
    expected = with_gradients(student, lambda record: oracle.divergence(record, teacher, mix, rows))
    assert_same(together(student, teacher, groups, weights, rows), expected, 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(way, dtype):
    student, teacher = records(2, "causal", dtype=dtype)
    arguments = (student, teacher, GROUPS["adjacent"]())
    with torch.autocast("cpu", torch.bfloat16):
        found = together(*arguments)
    assert_same(found, one_after_the_other(*arguments), 2e-2)
    torch.testing.assert_close(found[0], one_after_the_other(*arguments)[0], rtol=2e-5, atol=0)


def test_maps_that_are_small_enough_are_made_once(monkeypatch):
    student, teacher = records(0, "causal")
    made = []
    make = tiled.TiledMaps._make
    monkeypatch.setattr(tiled.TiledMaps, "_make", lambda self, *a: (made.append(a[:2]), make(self, *a))[1])
    together(student, teacher, group_heads(6, 3))
    assert len(made) == 3, "one tile a group"
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    together(student, teacher, group_heads(6, 3))
    assert len(made) == 3 + 6


def test_an_empty_batch_gives_nothing():
    student, teacher = (oracle.changed(r, query=r.query[:0], key=r.key[:0], value=r.value[:0]) for r in records())
    value, gradients = together(student, teacher, group_heads(6, 3))
    assert value == 0 and all(gradient.numel() == 0 for gradient in gradients.values())


def test_without_a_student_that_learns_there_is_a_value():
    student, teacher = records()
    with torch.no_grad():
        value = squeezed_divergence(student, teacher, group_heads(6, 3))
    torch.testing.assert_close(value, one_after_the_other(student, teacher, group_heads(6, 3))[0])


def test_what_does_not_fit_is_named():
    student, teacher = records()
    with pytest.raises(ValueError, match="groups has 2 entries for 3 heads of 'attention'"):
        squeezed_divergence(student, teacher, group_heads(6, 2))
    with pytest.raises(ValueError, match="weights='least_squares' needs the value-output circuits"):
        squeezed_divergence(student, oracle.changed(teacher, value=None), group_heads(6, 3))
    with pytest.raises(ValueError, match="temperature"):
        squeezed_divergence(student, teacher, group_heads(6, 3), temperature=0.0)
    with pytest.raises(ValueError, match="weights='best'"):
        squeezed_divergence(student, teacher, group_heads(6, 3), weights="best")


def test_what_is_kept_is_not_more_than_one_groups_maps(monkeypatch):
    """Groups of several sizes are cut into other tiles; their maps take each other's place."""
    kept = []
    take = tiled.Workspace.take

    def noting(self, name, shape, dtype):
        found = take(self, name, shape, dtype)
        kept.append(sum(t.numel() for (name, _), t in self._kept.items() if name.startswith("maps")))
        return found

    monkeypatch.setattr(tiled.Workspace, "take", noting)
    monkeypatch.setattr("squeezeheads.tiling.TILE_BYTES", 192 * 2**10)  # 29, 33 and 40 rows a tile
    student = make_record(0, heads=3, queries=197, width=8)
    teacher = make_record(1, heads=9, queries=197, width=8)
    together(student, teacher, ((0, 1, 2, 3), (4, 5, 6), (7, 8)))
    largest = 2 * 4 * 197**2
    assert largest <= max(kept) <= 1.1 * largest
