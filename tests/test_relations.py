"""MiniLM's relations, squeezed relations, and the squared difference of attention, against what their definitions say.

The definitions are written down here once more: dense, in float64, with every map and the output width formed, from
METHOD and the papers alone. Of the package a record is only read through its attributes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import oracle
from oracle import changed
from squeezeheads import (
    AttentionMSE,
    Distillation,
    MiniLMRelations,
    SqueezedHeads,
    SqueezedRelations,
    calibrate_groups,
    record_attention,
    recording,
)
from squeezeheads.objectives import Evidence, attention_mse, squeeze_plan
from squeezeheads.objectives.attention_mse import squared_difference
from squeezeheads.objectives.layer_plan import LayerPair
from squeezeheads.objectives.squeeze_plan import LayerPlan
from strategies import MASKS, generator, make_record, make_rows, padded, padded_rows
from tiny import classifier, image_batch, language_model, token_batch

LEAVES = ("query", "key", "value", "attention_mask")
KINDS = ("queries", "keys", "values")
UNEQUAL = ((0, 3, 5), (1,), (2, 4))


# ------------------------------------------------------------------------------------------------ the definitions again


def weighted_mean(each: Tensor, support: Tensor, rows: Tensor | None) -> Tensor:
    """Mean of (B, H, N) over heads and rows with weight; support (B, H, N, N)."""
    weight = support.any(-1).double()
    if rows is not None:
        weight = weight * rows.double()[:, None]
    each = torch.where(weight > 0, each, torch.zeros_like(each))
    return (weight * each).sum() / weight.sum().clamp_min(1e-300)


def relation_kl(taught: Tensor, learned: Tensor, support: Tensor, rows: Tensor | None) -> Tensor:
    """KL between softmaxes of inner products (B, R, N, N) over the support (B, N, N)."""
    support = support[:, None].expand(taught.shape)
    log_p, log_q = oracle.log_softmax(taught, support), oracle.log_softmax(learned, support)
    return weighted_mean((log_p.exp() * support * (log_p - log_q)).sum(-1), support, rows)


def both_may_attend(student, teacher) -> Tensor:
    """(B, N, N): through any head of either model."""
    return oracle.allowed(student).any(1) & oracle.allowed(teacher).any(1)


def dense_minilm(student, teacher, heads: int, kinds, rows=None) -> Tensor:
    losses = []
    for kind in kinds:
        inner = []
        for record in (teacher, student):
            tensor = {"queries": record.query, "keys": record.key, "values": record.value}[kind].double()
            batch, own, tokens, width = tensor.shape
            merged = torch.stack([tensor[:, h, :, d] for h in range(own) for d in range(width)], -1)  # (B, N, H·D)
            size = own * width // heads
            cut = [merged[:, :, r * size : (r + 1) * size] for r in range(heads)]
            inner.append(torch.stack([x @ x.transpose(1, 2) / size**0.5 for x in cut], 1))
        losses.append(relation_kl(inner[0].detach(), inner[1], both_may_attend(student, teacher), rows))
    return sum(losses) / len(losses)


def dense_squeezed(student, teacher, groups, rows=None) -> Tensor:
    circuits = oracle.circuits(teacher)  # (B, T, N, E)
    carried = torch.stack([circuits[:, list(group)].sum(1) for group in groups], 1)
    values = oracle.per_query_head(student, student.value).double()

    def inner(record, features):
        width, seen = features.shape[-1], oracle.seen_keys(record, rows)
        scores = []
        for sample in range(features.shape[0]):
            tokens = features[sample][:, seen[sample]]  # (heads, seen, width)
            square = tokens.square().mean((1, 2)) if seen[sample].any() else torch.ones(features.shape[1]).double()
            one = features[sample]
            scores.append(one @ one.transpose(1, 2) / (square[:, None, None] * width**0.5))
        return torch.stack(scores)

    return relation_kl(
        inner(teacher, carried).detach(), inner(student, values), both_may_attend(student, teacher), rows
    )


def dense_mse(student, teacher, compare: str, rows=None) -> Tensor:
    support = oracle.allowed(student) & oracle.allowed(teacher)
    if compare == "scores":
        difference = (oracle.scores(student) - oracle.scores(teacher).detach()) * support
        each = difference.square().sum(-1) / support.sum(-1).clamp_min(1)
    else:
        taught = oracle.softmax(oracle.scores(teacher), support).detach()
        each = (oracle.softmax(oracle.scores(student), support) - taught).square().sum(-1)
    return weighted_mean(each, support, rows)


# ----------------------------------------------------------------------------------------------------------- how to run


def with_leaves(record):
    parts = {}
    for name in LEAVES:
        tensor = getattr(record, name)
        if tensor is not None and tensor.is_floating_point():
            parts[name] = tensor.detach().clone().requires_grad_()
    return changed(record, **parts)


def gradients(record):
    leaves = [getattr(record, name) for name in LEAVES]
    return {
        name: leaf.grad for name, leaf in zip(LEAVES, leaves, strict=True) if leaf is not None and leaf.grad is not None
    }


def planned(objective, groups=None):
    """An objective with a plan of one layer."""
    names = ("student", "teacher", 0, 0)
    objective.plan = (LayerPair(*names) if groups is None else LayerPlan(*names, groups),)
    return objective


def value_of(objective, student, teacher, rows=None) -> Tensor:
    return objective(Evidence({}, None, learned={0: student}, taught={0: teacher}, rows=rows))


def check(objective, dense, student, teacher, rows=None, rtol=1e-9, atol=1e-12):
    """Value and every gradient of the student equal those of the definition; what it does not name gets none."""
    mine, theirs = with_leaves(student), oracle.lift(student, grad=True)
    theirs = changed(theirs, value=theirs.value.clone().requires_grad_())
    teacher = with_leaves(teacher)
    loss = value_of(objective, mine, teacher, rows)
    expected = dense(theirs, oracle.lift(teacher), rows)
    assert loss.dtype == (torch.float64 if student.query.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
    loss.backward(), expected.backward()
    found, wanted = gradients(mine), gradients(theirs)
    assert not gradients(teacher)
    for name in LEAVES:
        grad = wanted.get(name)
        if grad is None or (grad == 0).all():
            assert name not in found or found[name].abs().max() <= atol, name
        else:
            torch.testing.assert_close(
                found[name].double(), grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    return loss


def pair(mask="none", teacher_mask=None, tokens=9, dtype=torch.float64, seed=0, equal=False, model_width=None):
    """Grouped queries on both sides, different widths; `equal` gives both 6 heads."""
    student = make_record(
        seed, heads=6 if equal else 3, kv_heads=3 if equal else 1, queries=tokens, width=4, value_width=8, mask=mask,
        dtype=dtype, name="student.attention",
    )  # fmt: skip
    teacher = make_record(
        seed + 1, heads=6, kv_heads=2, queries=tokens, width=8, value_width=6, model_width=model_width, dtype=dtype,
        mask=mask if teacher_mask is None else teacher_mask, name="teacher.attention",
    )  # fmt: skip
    return student, teacher


def minilm(heads=2, kinds=KINDS):
    return planned(MiniLMRelations(relation_heads=heads, kinds=list(kinds)))


OBJECTIVES = {
    "minilm": (lambda: minilm(), lambda s, t, r: dense_minilm(s, t, 2, KINDS, r), False),
    "squeezed": (
        lambda: planned(SqueezedRelations(), UNEQUAL),
        lambda s, t, r: dense_squeezed(s, t, UNEQUAL, r),
        False,
    ),
    "scores": (lambda: planned(AttentionMSE(compare="scores")), lambda s, t, r: dense_mse(s, t, "scores", r), True),
    "maps": (lambda: planned(AttentionMSE(compare="maps")), lambda s, t, r: dense_mse(s, t, "maps", r), True),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


# ----------------------------------------------------------------------------------------------- against the definition


@every_objective
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_of_both_models(name, mask):
    make, dense, equal = OBJECTIVES[name]
    for seed, rows in ((0, "none"), (10, "float")):
        student, teacher = pair(mask, seed=seed, equal=equal)
        check(make(), dense, student, teacher, make_rows(rows, generator(seed), 2, 9))


@every_objective
@pytest.mark.parametrize("mask, teacher_mask", (("causal", "random_bool"), ("window", "bias_inf"), ("none", "causal")))
def test_models_with_different_masks(name, mask, teacher_mask):
    make, dense, equal = OBJECTIVES[name]
    check(make(), dense, *pair(mask, teacher_mask, seed=3, equal=equal))


@every_objective
@pytest.mark.parametrize("rows", ("bool", "integer", "float", "single"))
def test_every_kind_of_rows(name, rows):
    make, dense, equal = OBJECTIVES[name]
    check(make(), dense, *pair("causal", seed=5, equal=equal), make_rows(rows, generator(2), 2, 9))


@every_objective
@pytest.mark.parametrize("tokens", (1, 2, 63, 211))
@pytest.mark.parametrize("mask", ("none", "causal", "random_per_head"))
def test_odd_sizes_in_float32(name, tokens, mask):
    make, dense, equal = OBJECTIVES[name]
    student, teacher = pair(mask, tokens=tokens, dtype=torch.float32, seed=7, equal=equal)
    check(make(), dense, student, teacher, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("heads", (1, 2, 4))
@pytest.mark.parametrize("kinds", [list(k) for n in (1, 2) for k in itertools.combinations(KINDS, n)])
def test_minilm_with_any_heads_and_kinds(heads, kinds):
    check(minilm(heads, kinds), lambda s, t, r: dense_minilm(s, t, heads, kinds, r), *pair("causal", seed=1))


@pytest.mark.parametrize("model_width", (1, 5, 16, 100))
@pytest.mark.parametrize("groups", (UNEQUAL, ((4, 5), (0,), (1, 2, 3)), ((2,), (2,), (0,)), ((0, 1, 2, 3, 4, 5),) * 3))
def test_the_isometry_stands_in_for_the_output_width(model_width, groups):
    """From far below to far above the width that a group spans; more student heads than groups; groups that overlap."""
    student, teacher = pair("causal", seed=2, model_width=model_width)
    check(planned(SqueezedRelations(), groups), lambda s, t, r: dense_squeezed(s, t, groups, r), student, teacher)


def test_squeezed_relations_do_not_see_the_size_of_values():
    """rms divides it out, and the gradient knows: it is orthogonal to the values of each head."""
    student, teacher = pair("causal", seed=4)
    student = make_record(4, heads=4, kv_heads=2, queries=9, width=4, value_width=8, mask="causal", dtype=torch.float64)
    objective = planned(SqueezedRelations(), ((0, 1), (2,), (3, 4), (5,)))
    loss = value_of(objective, learner := with_leaves(student), teacher)
    larger = changed(student, value=student.value * torch.tensor([3.0, 0.01])[None, :, None, None])
    with torch.no_grad():
        torch.testing.assert_close(value_of(objective, larger, teacher), loss.detach())
        taught = changed(teacher, output_weight=teacher.output_weight * 7)
        torch.testing.assert_close(value_of(objective, student, taught), loss.detach())
    loss.backward()
    assert learner.value.grad.abs().max() > 1e-4
    along = (learner.value.grad * learner.value).sum((2, 3))
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", ((9,), (9, 1), (2, 1, 1, 9), (1, 6, 1, 9), (2, 6, 9, 1), (1, 1, 1, 1)))
@pytest.mark.parametrize("compare", ("scores", "maps"))
def test_a_learned_bias_gets_its_gradient(compare, shape):
    student, teacher = pair("none", "causal", seed=6, equal=True)
    student = changed(student, attention_mask=torch.randn(shape, generator=generator(1)).double())
    objective = planned(AttentionMSE(compare=compare))
    check(objective, lambda s, t, r: dense_mse(s, t, compare, r), student, teacher)


@pytest.mark.parametrize("shape", ((9, 1), (2, 1, 9, 1), (1, 6, 1, 1)))
@every_objective
def test_masks_broadcast_along_keys(name, shape):
    """They switch rows off; the keys of the other rows are still counted one by one."""
    make, dense, equal = OBJECTIVES[name]
    student, teacher = pair("none", seed=6, equal=equal)
    may = torch.rand(shape, generator=generator(3)) < 0.6
    if shape[1:2] == (6,):
        may[:, 0] = True
        teacher = changed(teacher, attention_mask=may)
    else:
        student = changed(student, attention_mask=may)
    check(make(), dense, student, teacher)


@every_objective
def test_models_that_differ_are_told_from_equal_ones(name):
    """The definitions give clearly different numbers for different models, and 0 for equal ones."""
    make, dense, equal = OBJECTIVES[name]
    student, teacher = pair("causal", equal=equal)
    assert dense(student, teacher, None) > 0.01
    if name != "squeezed":
        assert value_of(make(), with_leaves(teacher), teacher).item() == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------------------------- what must change nothing


def run(objective, student, teacher, rows=None):
    student = with_leaves(student)
    loss = value_of(objective, student, teacher, rows)
    loss.backward()
    return loss.detach(), gradients(student)


@every_objective
@pytest.mark.parametrize("mask", ("none", "causal"))
@pytest.mark.parametrize("left, right", ((3, 0), (0, 4), (2, 5)))
def test_padding_changes_nothing(name, mask, left, right):
    make, _, equal = OBJECTIVES[name]
    student, teacher = pair(mask, seed=8, equal=equal)
    rows = make_rows("float", generator(4), 2, 9)
    loss, grads = run(make(), student, teacher, rows)
    wide = [padded(record, left, right, size=50.0) for record in (student, teacher)]
    wide_loss, wide_grads = run(make(), *wide, padded_rows(student, left, right, rows))
    torch.testing.assert_close(wide_loss, loss)
    for part, grad in grads.items():
        inside = slice(left, left + 9)
        torch.testing.assert_close(wide_grads[part][:, :, inside], grad)
        outside = torch.cat([wide_grads[part][:, :, :left], wide_grads[part][:, :, left + 9 :]], 2)
        assert (outside == 0).all(), f"{part}: padding gets a gradient"


@every_objective
def test_parts_of_a_batch_weigh_by_their_rows(name):
    make, _, equal = OBJECTIVES[name]
    student, teacher = pair("causal", seed=9, equal=equal)
    rows = make_rows("bool", generator(4), 2, 9)

    def sample(record, index):
        parts = {part: getattr(record, part)[index : index + 1] for part in ("query", "key", "value")}
        return changed(record, **parts)

    with torch.no_grad():
        whole = value_of(make(), student, teacher, rows)
        each = [value_of(make(), sample(student, b), sample(teacher, b), rows[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(whole, sum(x * rows[b].sum() for b, x in enumerate(each)) / rows.sum())


@every_objective
def test_tokens_that_no_counted_row_may_attend_to_change_nothing(name):
    """Under a window of three, prompt tokens far before the response; tokens after it; and a masked one within."""
    make, _, equal = OBJECTIVES[name]
    student, teacher = pair("none", tokens=12, seed=11, equal=equal)
    place = torch.arange(12)
    may = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 3) & (place != 8)[None]
    student, teacher = (changed(record, attention_mask=may) for record in (student, teacher))
    rows = torch.zeros(2, 12)
    rows[:, [7, 9, 10]] = 1
    free = [0, 1, 2, 3, 4, 8, 11]  # rows 7, 9, 10 see 5, 6, 7, 9, 10

    def with_other_tokens(record, tokens):
        def other(tensor):
            tensor = tensor.clone()
            tensor[:, :, tokens] = 20 * torch.randn(tensor[:, :, tokens].shape, generator=generator(5)).double()
            return tensor

        return changed(record, query=other(record.query), key=other(record.key), value=other(record.value))

    loss, _ = run(make(), student, teacher, rows)
    after, grads = run(make(), with_other_tokens(student, free), with_other_tokens(teacher, free), rows)
    torch.testing.assert_close(after, loss)
    for part in grads.keys() & {"query", "key", "value"}:
        assert (grads[part][:, :, free] == 0).all(), part
    seen, _ = run(make(), with_other_tokens(student, [5]), with_other_tokens(teacher, [5]), rows)
    assert (seen - loss).abs() > 1e-4, "token 5 is seen by row 7"


@every_objective
@pytest.mark.parametrize("mask", ("all", "additive", "rows"))
def test_nothing_to_compare_is_zero_with_zero_gradient(name, mask):
    make, _, equal = OBJECTIVES[name]
    student, teacher = pair("none", dtype=torch.float32, equal=equal)
    rows = None
    if mask == "rows":
        rows = torch.zeros(2, 9)
    elif mask == "all":
        student, teacher = (changed(r, attention_mask=torch.zeros(2, 1, 9, 9).bool()) for r in (student, teacher))
    else:
        student, teacher = (changed(r, attention_mask=torch.full((2, 1, 1, 9), -torch.inf)) for r in (student, teacher))
    loss, grads = run(make(), student, teacher, rows)
    assert loss == 0 and all((grad == 0).all() for grad in grads.values())


def test_values_of_zero_have_no_direction():
    student, teacher = pair("causal", dtype=torch.float32)
    for record in (student, teacher):
        record.value[0] = 0.0
    loss, grads = run(planned(SqueezedRelations(), UNEQUAL), student, teacher)
    assert loss.isfinite() and grads["value"].isfinite().all()


@every_objective
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_and_autocast_compute_in_float32(name, dtype):
    make, dense, equal = OBJECTIVES[name]
    student, teacher = pair("causal", tokens=33, dtype=dtype, equal=equal)
    with torch.autocast("cpu", dtype):
        loss, grads = run(make(), student, teacher)
    torch.testing.assert_close(loss.double(), dense(student, teacher, None), rtol=1e-5, atol=1e-6)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("compare", ("scores", "maps"))
@pytest.mark.parametrize("mask", ("none", "causal", "bias_per_head", "random_per_head"))
@pytest.mark.parametrize("one_block", (False, True))
def test_tile_size_changes_nothing(compare, mask, one_block, monkeypatch):
    """On another device all heads are one block: run that way here too."""
    student, teacher = pair(mask, tokens=70, seed=12, equal=True)
    rows = make_rows("float", generator(1), 2, 70)
    if one_block:
        monkeypatch.setattr(attention_mse, "_head_blocks", lambda heads, device: [list(range(heads))])

    def with_tiles(size):
        learner = with_leaves(student)
        loss = squared_difference(learner, teacher, compare, rows, tile_bytes=size)
        loss.backward()
        return loss.detach(), gradients(learner)

    loss, grads = with_tiles(2**31)
    torch.testing.assert_close(loss, dense_mse(student, teacher, compare, rows))
    for size in (1, 30_000, 200_000):
        small_loss, small_grads = with_tiles(size)
        torch.testing.assert_close(small_loss, loss)
        assert small_grads.keys() == grads.keys()
        for part, grad in grads.items():
            torch.testing.assert_close(small_grads[part], grad)


PEAK = """
import sys
import torch
from squeezeheads import AttentionMSE, AttentionRecord, MiniLMRelations, SqueezedRelations
from squeezeheads.objectives import Evidence
from squeezeheads.objectives.layer_plan import LayerPair
from squeezeheads.objectives.squeeze_plan import LayerPlan

name, tokens = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)

def record(tokens, leaf):
    make = lambda: torch.randn(1, 4, tokens, 16).requires_grad_(leaf)
    return AttentionRecord("layer", make(), make(), make(), is_causal=True, output_weight=torch.randn(4, 16, 64))

def once(tokens):
    student, teacher = record(tokens, True), record(tokens, False)
    if name == "dense":
        return torch.nn.functional.mse_loss(student.maps(), teacher.maps()).backward()
    pair = LayerPair("s", "t", 0, 0)
    objective = {
        "scores": lambda: AttentionMSE(compare="scores"), "maps": lambda: AttentionMSE(compare="maps"),
        "minilm": MiniLMRelations, "squeezed": SqueezedRelations,
    }[name]()
    groups = tuple((h,) for h in range(4))
    objective.plan = (LayerPlan("s", "t", 0, 0, groups) if name == "squeezed" else pair,)
    objective(Evidence({}, None, learned={0: student}, taught={0: teacher})).backward()

once(64)
def memory(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

# From what is resident now to the peak of this process: ru_maxrss would begin with the peak of the process that started
# this one, and hide a map.
before = memory("VmRSS")
once(tokens)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("name", ("scores", "maps", "minilm", "squeezed", "dense"))
def test_no_map_is_alive_outside_a_tile(name):
    """Peak memory of value and gradient in a process of its own, against the bytes of one head's map."""
    tokens = 4000  # one map is larger than the buffers of a tile together
    command = [sys.executable, "-c", PEAK, name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one_map = 4 * tokens**2
    grown = int(done.stdout)
    print(f"{name}: {grown / 2**20:.1f} MiB, one map of one head {one_map / 2**20:.1f} MiB")
    if name == "dense":
        assert grown > 4 * one_map, "the measure itself sees no maps"
    else:
        assert grown < one_map


# ------------------------------------------------------------------------------------------------- in the models' hands


@pytest.mark.parametrize("name", ("squeezed", "minilm", "scores"))
def test_recorded_models_equal_the_definition(name):
    """Grouped queries on both sides, left padding, several layers, groups found on data."""
    heads = 3 if name == "scores" else 6
    teacher = language_model(heads, layers=3, num_key_value_heads=heads // 3, seed=1)
    student = language_model(3, width=12, num_key_value_heads=1)
    batch = token_batch([9, 4, 6], total=9, side="left")
    objective = {
        "squeezed": lambda: SqueezedRelations(),
        "minilm": lambda: MiniLMRelations(relation_heads=2, layers="uniform"),
        "scores": lambda: AttentionMSE(),
    }[name]()
    out = Distillation(teacher, {name: objective})(student, batch)
    with torch.no_grad(), record_attention(student.eval()) as learned, record_attention(teacher.eval()) as taught:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        student(**inputs), teacher(**inputs)
    assert [(layer.student_position, layer.teacher_position) for layer in objective.plan] == [(0, 1), (1, 2)]
    expected = []
    for layer in objective.plan:
        records = learned[layer.student_position], taught[layer.teacher_position]
        rows = batch["attention_mask"]
        if name == "squeezed":
            expected.append(dense_squeezed(*records, layer.groups, rows))
        elif name == "minilm":
            expected.append(dense_minilm(*records, 2, KINDS, rows))
        else:
            expected.append(dense_mse(*records, "scores", rows))
    torch.testing.assert_close(out.terms[name].double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-7)
    assert out.counts[name] == 19


def test_one_plan_serves_squeezed_heads_and_relations(monkeypatch):
    teacher, student, batch = classifier(6, seed=1), classifier(3), image_batch(2)
    calls = []
    original = squeeze_plan.GroupSearch
    monkeypatch.setattr(squeeze_plan, "GroupSearch", lambda *a: calls.append(1) or original(*a))
    heads, relations = SqueezedHeads(), SqueezedRelations()
    objectives = {"heads": heads, "relations": relations, "minilm": MiniLMRelations(layers="uniform")}
    Distillation(teacher, objectives).prepare(student, [batch])
    assert heads.plan == relations.plan and len(calls) == 2, "two layers, calibrated once"
    assert isinstance(objectives["minilm"].plan[0], LayerPair)


def test_a_shared_plan_is_checked_for_each_objective():
    """SqueezedHeads with weights="mean" needs no projection; relations do, and say so before the first step."""
    teacher, student, batch = classifier(6, seed=1), classifier(3), image_batch(2)
    options = {"weights": "mean", "schedule": "balanced"}
    objectives = {"heads": SqueezedHeads(**options), "relations": SqueezedRelations(**options)}
    original = recording.AttentionRecord
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "AttentionRecord", lambda *a, **k: original(*a, **{**k, "output_weight": None}))
        with pytest.raises(ValueError, match=r"squeezed relation needs .* output projection is not known"):
            Distillation(teacher, objectives).prepare(student, [batch])


def test_kinds_of_plan_do_not_collide():
    options = [
        SqueezedRelations(layers="last").plan_options,
        AttentionMSE(layers="last").plan_options,
        MiniLMRelations(layers="last").plan_options,
        MiniLMRelations(layers="last", relation_heads=2).plan_options,
        MiniLMRelations(layers="last", kinds=["values"]).plan_options,
    ]
    assert all(options) and all(a != b for a, b in itertools.combinations(options, 2))
    assert SqueezedRelations(layers="last").plan_options == SqueezedHeads(layers="last").plan_options
    assert json.loads(json.dumps(options)) == options


@pytest.mark.parametrize("make", (AttentionMSE, lambda: MiniLMRelations(layers=[[0, 1], [1, 0]]), SqueezedRelations))
def test_a_stored_plan_is_taken_up(make):
    teacher, student, batch = classifier(3, seed=1), classifier(3), image_batch(2)
    first, second = make(), make()
    distillation = Distillation(teacher, {"x": first})
    value = distillation(student.eval(), batch).terms["x"]
    assert not second.prepared
    second.plan_from_json(json.loads(json.dumps(first.plan_to_json())))
    assert second.prepared and second.plan == first.plan
    torch.testing.assert_close(Distillation(teacher, {"x": second})(student, batch).terms["x"], value)


# ------------------------------------------------------------------------------------------------------------- mistakes


def prepared(objective, student, teacher):
    objective.prepare([Evidence({}, None, learned={0: student}, taught={0: teacher})])
    return objective


def test_unequal_heads_are_named():
    with pytest.raises(ValueError, match=r"has 3 heads and teacher 'teacher.attention' has 6.*SqueezedHeads"):
        prepared(AttentionMSE(), *pair())


def test_widths_that_do_not_divide_are_named():
    # Student 12, 4, 8 and teacher 48, 16, 12 features.
    with pytest.raises(
        ValueError, match=r"3 relation heads do not divide .* keys 4, .*relation_heads may be 1, 2, 4\.$"
    ):
        prepared(MiniLMRelations(relation_heads=3), *pair())
    with pytest.raises(ValueError, match=r"6 relation heads \(the teacher's heads, as relation_heads is left out\)"):
        prepared(MiniLMRelations(), *pair())
    prepared(MiniLMRelations(relation_heads=3, kinds=["queries"]), *pair())


@pytest.mark.parametrize("make", (SqueezedRelations, lambda: MiniLMRelations(relation_heads=2)))
def test_cross_attention_is_refused(make):
    student, teacher = (make_record(heads=4, queries=7, keys=9) for _ in range(2))
    with pytest.raises(ValueError, match=r"7 query rows to 9 keys: .* self-attention"):
        prepared(make(), student, teacher)


def test_cross_attention_can_be_compared_by_squared_difference():
    student, teacher = (make_record(s, heads=4, queries=7, keys=9, dtype=torch.float64) for s in (0, 1))
    check(planned(AttentionMSE()), lambda s, t, r: dense_mse(s, t, "scores", r), student, teacher)


def test_what_is_not_known_is_named():
    student, teacher = pair()
    cheap = {"schedule": "balanced", "weights": "mean"}
    with pytest.raises(ValueError, match=r"'teacher.attention', but its output projection is not known"):
        prepared(SqueezedRelations(**cheap), student, changed(teacher, output_weight=None))
    with pytest.raises(ValueError, match=r"values of 'student.attention'"):
        prepared(SqueezedRelations(**cheap), changed(student, value=None), teacher)
    with pytest.raises(ValueError, match=r"values of 'teacher.attention'"):
        prepared(MiniLMRelations(relation_heads=2), student, changed(teacher, value=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionMSE(compare="logits"), "compare='logits'"),
        (lambda: MiniLMRelations(relation_heads=0), "relation_heads=0"),
        (lambda: MiniLMRelations(relation_heads=2.0), r"relation_heads=2\.0"),
        (lambda: MiniLMRelations(kinds=[]), r"kinds=\[\]"),
        (lambda: MiniLMRelations(kinds=["values", "values"]), "each once"),
        (lambda: MiniLMRelations(kinds=["outputs"]), "'outputs'"),
    ],
)
def test_impossible_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_objective
def test_a_student_that_cannot_learn_is_an_error(name):
    make, _, equal = OBJECTIVES[name]
    with pytest.raises(RuntimeError, match="no gradient can reach"):
        value_of(make(), *pair(equal=equal))


@every_objective
def test_no_second_derivative_goes_unnoticed(name):
    make, _, equal = OBJECTIVES[name]
    student, teacher = pair(equal=equal)
    student = with_leaves(student)
    leaf = student.value if name == "squeezed" else student.query
    (grad,) = torch.autograd.grad(value_of(make(), student, teacher), [leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_groups_in_any_order():
    groups = ((5, 0, 3), (1,), (4, 2))
    student, teacher = pair("causal", seed=13)
    check(planned(SqueezedRelations(), groups), lambda s, t, r: dense_squeezed(s, t, groups, r), student, teacher)


def test_groups_are_found_on_the_rows_that_count():
    student, teacher = pair("none", seed=0)
    rows = torch.zeros(2, 9)
    rows[:, :2] = 1
    objective = SqueezedRelations()
    objective.prepare([Evidence({}, None, learned={0: student}, taught={0: teacher}, rows=rows)])
    (wanted,) = calibrate_groups([[teacher]], 3, weights="least_squares", rows=[rows])
    (without,) = calibrate_groups([[teacher]], 3, weights="least_squares")
    assert wanted != without, "the rows decide here"
    assert objective.plan[0].groups == wanted


def test_a_stored_plan_that_met_other_models_is_an_error():
    from squeezeheads import AttentionMSE
    from test_relations import minilm, value_of, with_leaves

    student, teacher = pair()
    with pytest.raises(ValueError, match="3 heads and teacher 'teacher.attention' has 6"):
        value_of(planned(AttentionMSE()), with_leaves(student), teacher)
    with pytest.raises(ValueError, match="3 relation heads do not divide"):
        value_of(minilm(3), with_leaves(student), teacher)
