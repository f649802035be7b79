"""Models that differ by special tokens: what is compared, against dense oracles that pick tokens by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, set_seed

import oracle
from oracle import changed, lift
from squeezeheads import (
    AttentionMSE,
    AttentionRecord,
    Distillation,
    HiddenStates,
    MiniLMRelations,
    OrthogonalProjection,
    SqueezedHeads,
    SqueezedRelations,
    group_heads,
    record_attention,
    squeezed_attention_loss,
)
from squeezeheads.objectives import Evidence
from squeezeheads.reports.tables import plan_table
from squeezeheads.token_layout import _KNOWN, SharedTokens, known_layout, share_tokens
from test_relations import KINDS, dense_minilm, dense_mse, dense_squeezed, value_of
from tiny import image_batch

CLASS, DEIT, REGISTERS = ("class",), ("class", "distillation"), ("class", "register", "register")


def model(kind: str, heads: int = 3, layers: int = 1, seed: int = 0, **changes) -> nn.Module:
    """A tiny classifier of transformers' type ``kind``: images (1, 8, 8), 16 patches unless changed."""
    set_seed(seed)
    sizes = {"hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 48}
    config = CONFIG_MAPPING[kind](attn_implementation="sdpa")
    for name, value in {
        **sizes,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
        **changes,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return (classes[0] if isinstance(classes, tuple) else classes)(config).eval()


def records(mine, theirs, patches: int = 5, mask: str = "none", seed: int = 0):
    """Student of 3 heads, teacher of 6 (3 key/value), in float64; ``mask`` is a learned bias of the student."""
    g = torch.Generator().manual_seed(seed)

    def make(name, heads, kv, width, tokens):
        draw = [torch.randn(2, h, tokens, width, generator=g, dtype=torch.double) for h in (heads, kv, kv)]
        bias = torch.randn(1, heads, tokens, tokens, generator=g, dtype=torch.double) if mask == "bias" else None
        weight = torch.randn(heads, width, 12, generator=g, dtype=torch.double)
        return AttentionRecord(name, *draw, attention_mask=bias, output_weight=weight)

    return make("student", 3, 3, 4, len(mine) + patches), make("teacher", 6, 3, 3, len(theirs) + patches)


def by_hand(record, rows, keys):
    """The record of these rows and keys alone."""
    mask = record.attention_mask
    return changed(
        record,
        query=record.query[:, :, rows],
        key=record.key[:, :, keys],
        value=None if record.value is None else record.value[:, :, keys],
        attention_mask=None if mask is None else mask[:, :, rows][..., keys],
    )


# Layouts of student and teacher, and by hand: places of the tokens that both have, for 5 patches.
CASES = {
    "the teacher has a distillation token": (CLASS, DEIT, [0, *range(1, 6)], [0, *range(2, 7)]),
    "the student has a distillation token": (DEIT, CLASS, [0, *range(2, 7)], [0, *range(1, 6)]),
    "each has what the other lacks": (DEIT, REGISTERS, [0, *range(2, 7)], [0, *range(3, 8)]),
    "registers in equal number": (REGISTERS, REGISTERS[::-1], [*range(8)], [2, 0, 1, *range(3, 8)]),
    "no token in common but patches": (("distillation",), REGISTERS, [*range(1, 6)], [*range(3, 8)]),
    "equal layouts": (DEIT, DEIT, [*range(7)], [*range(7)]),
}


def dense_loss(student, teacher, groups, weights, mine, theirs, rows=None) -> Tensor:
    """By the definition: the teacher's own maps, mixed by the weights of what its layer writes at the compared rows,
    restricted to the common keys, renormalised; the student's maps on the common keys."""
    mix = oracle.mixing_matrix(by_hand(teacher, theirs, [*range(teacher.key.shape[2])]), groups, weights, rows)
    mixed = torch.einsum("bst,btqk->bsqk", mix, oracle.maps(teacher))[:, :, theirs][..., theirs]
    target = (mixed / mixed.sum(-1, keepdim=True)).detach()
    log_student = oracle.scores(student)[:, :, mine][..., mine].log_softmax(-1)
    kl = (torch.special.xlogy(target, target) - target * log_student).sum(-1)
    weight = torch.ones(kl.shape[0], kl.shape[2], dtype=torch.double) if rows is None else rows.double()
    return (kl * weight[:, None]).sum() / (weight.sum() * kl.shape[1])


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
@pytest.mark.parametrize("weights", ["least_squares", "joint", "values", "mean", "select"])
@pytest.mark.parametrize("mask", ["none", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_dense_definition(case, mask, weights, implementation):
    layouts, (mine, theirs) = CASES[case][:2], CASES[case][2:]
    student, teacher = records(*layouts, mask=mask)
    groups = group_heads(6, 3)
    ours, dense = lift(student, grad=True), lift(student, grad=True)
    loss = squeezed_attention_loss(
        [ours], [teacher], weights=weights, implementation=implementation,
        student_tokens=layouts[0], teacher_tokens=layouts[1],
    )  # fmt: skip
    expected = dense_loss(dense, teacher, groups, weights, mine, theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    loss.backward(), expected.backward()
    for name in ("query", "key", "attention_mask") if mask == "bias" else ("query", "key"):
        found, wanted = getattr(ours, name).grad, getattr(dense, name).grad
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
        assert wanted.abs().sum() > 0


def test_rows_are_the_students():
    student, teacher = records(DEIT, REGISTERS)
    rows = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1, 1]]).bool()
    mine, theirs = CASES["each has what the other lacks"][2:]
    loss = squeezed_attention_loss(
        [lift(student, grad=True)], [teacher], rows=rows, student_tokens=DEIT, teacher_tokens=REGISTERS
    )
    expected = dense_loss(student, teacher, group_heads(6, 3), "least_squares", mine, theirs, rows[:, mine])
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"rows has shape \(2, 8\), but the student has 7 tokens"):
        squeezed_attention_loss(
            [lift(student, grad=True)], [teacher], rows=torch.ones(2, 8), student_tokens=DEIT, teacher_tokens=REGISTERS
        )


def test_mixing_is_that_of_the_teachers_own_maps():
    """With the keys cut off before squeezing, the weights would be those of a layer that the teacher does not have."""
    student, teacher = records(CLASS, DEIT)
    tokens = share_tokens(student, teacher, CLASS, DEIT)
    assert tokens is not None
    groups, (mine, theirs) = group_heads(6, 3), CASES["the teacher has a distillation token"][2:]
    whole = oracle.mixing_matrix(by_hand(teacher, theirs, [*range(7)]), groups)
    cut = oracle.mixing_matrix(by_hand(teacher, theirs, theirs), groups)
    every_row = oracle.mixing_matrix(teacher, groups)
    assert (whole - cut).abs().max() > 0.01 and (whole - every_row).abs().max() > 0.01
    objective = SqueezedHeads(schedule="progressive", student_tokens=["class"], teacher_tokens=list(DEIT))
    first = Evidence({}, None, learned={0: lift(student, grad=True)}, taught={0: teacher})
    objective.prepare([first])
    expected = dense_loss(student, teacher, groups, "least_squares", mine, theirs)
    torch.testing.assert_close(objective(first).detach(), expected, rtol=1e-10, atol=0)


def cut(loss, mine, theirs):
    """A dense definition of a loss between equal tokens, on the compared ones."""
    return lambda s, t, rows=None: loss(by_hand(s, mine, mine), by_hand(t, theirs, theirs), rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["relations", "mse", "minilm"])
def test_other_objectives_compare_the_shared_tokens(case, name):
    """Relations and single heads: the same tokens alone, as if there were no others."""
    *layouts, mine, theirs = CASES[case]
    student, teacher = records(*layouts)
    if name == "mse":
        student = changed(student, query=student.query.repeat(1, 2, 1, 1))  # six heads
    options = {"student_tokens": list(layouts[0]), "teacher_tokens": list(layouts[1])}
    make = {
        "relations": lambda **o: SqueezedRelations(schedule="progressive", **o),
        "mse": lambda **o: AttentionMSE(compare="maps", **o),
        "minilm": lambda **o: MiniLMRelations(relation_heads=3, **o),
    }[name]
    objective, plain = make(**options), make()
    ours, cut_by_hand = with_gradients(student), with_gradients(student)
    first = Evidence({}, None, learned={0: ours}, taught={0: teacher})
    objective.prepare([first])
    loss = objective(first)
    other = by_hand(cut_by_hand, mine, mine)
    taught = by_hand(teacher, theirs, theirs)
    plain.prepare([Evidence({}, None, learned={0: other}, taught={0: taught})])
    expected = value_of(plain, other, taught)
    dense = {
        "relations": lambda: dense_squeezed(other, taught, group_heads(6, 3)),
        "mse": lambda: dense_mse(other, taught, "maps"),
        "minilm": lambda: dense_minilm(other, taught, 3, KINDS),
    }[name]()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, dense, rtol=1e-9, atol=1e-12)
    loss.backward(), expected.backward()
    for part in ("query", "key", "value"):
        found, wanted = getattr(ours, part).grad, getattr(cut_by_hand, part).grad
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=part)


FEATURES = {
    "linear": HiddenStates(layers=[[0, 1], [1, 1]]),
    "orthogonal": OrthogonalProjection(),
    "whitened": HiddenStates(layers="last", normalisation="whiten", calibration_batches=3),
}


def features(layouts, seed=0, widths=(6, 8)) -> Evidence:
    """Hidden states of two layers of each model, 5 patches; the student's special tokens and one patch do not count in
    one sample."""
    g = torch.Generator().manual_seed(seed)
    learned, taught = (
        tuple(torch.randn(3, len(layout) + 5, width, generator=g) + 0.5 for _ in range(3))
        for layout, width in zip(layouts, widths, strict=True)
    )
    rows = torch.ones(3, len(layouts[0]) + 5, dtype=torch.bool)
    rows[1, : len(layouts[0])] = rows[1, -2] = False
    return Evidence({}, {"hidden_states": learned}, {"hidden_states": taught}, rows=rows)


def dense_features(objective, weights, learned, taught, rows, mine, theirs, calibration) -> Tensor:
    """Token by token, by their places in either sequence."""
    losses = []
    for (weight, bias), pair in zip(weights, objective.plan, strict=True):
        errors = []
        for b in range(len(learned[0])):
            for i, j in zip(mine, theirs, strict=True):
                if rows is None or rows[b, i]:
                    goal = taught[pair.teacher_layer + 1][b, j].double()
                    if objective.normalisation == "standardise":
                        goal = (goal - goal.mean()) / (goal.var(correction=0) + 1e-5).sqrt()
                    if objective.normalisation == "whiten":
                        seen = torch.cat(
                            [
                                e.teacher["hidden_states"][pair.teacher_layer + 1][sample, there][None].double()
                                for e in calibration
                                for sample in range(3)
                                for here, there in zip(mine, theirs, strict=True)
                                if e.rows[sample, here]
                            ]
                        )
                        values, vectors = torch.linalg.eigh(torch.cov(seen.T, correction=0))
                        goal = vectors @ torch.diag(values**-0.5) @ vectors.T @ (goal - seen.mean(0))
                    guess = weight @ learned[pair.student_layer + 1][b, i].double()
                    errors.append((guess + (0 if bias is None else bias) - goal).square().mean())
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FEATURES)
def test_features_are_those_of_the_shared_tokens(case, name):
    """Value, and the student's gradient: tokens that only one model has are no part of it."""
    *layouts, mine, theirs = CASES[case]
    objective = dataclasses.replace(FEATURES[name], student_tokens=list(layouts[0]), teacher_tokens=list(layouts[1]))
    calibration = [features(layouts, seed) for seed in range(objective.batches_to_prepare)]
    objective.prepare(calibration)
    stored = json.loads(json.dumps(objective.plan_to_json()))
    again = dataclasses.replace(objective)
    again.plan_from_json(stored)
    assert again.plan == objective.plan and str(again.plan[0].tokens).endswith(f"teacher's {len(layouts[1]) + 5})")
    given = features(layouts, seed=7)
    learned = tuple(s.requires_grad_() for s in given.student["hidden_states"])
    taught = given.teacher["hidden_states"]
    weights = [(m.weight.detach().double(), m.bias) for m in objective.projector.maps]
    value = objective(given)
    expected = dense_features(objective, weights, learned, taught, given.rows, mine, theirs, calibration)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    layers = [learned[pair.student_layer + 1] for pair in objective.plan]
    for found, wanted in zip(torch.autograd.grad(value, layers), torch.autograd.grad(expected, layers), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=rf"rows has shape \(3, {len(layouts[0]) + 6}\)"):
        objective(dataclasses.replace(given, rows=torch.ones(3, len(layouts[0]) + 6)))


def test_features_of_deit_against_vit_and_back():
    """The models' own layouts, through ``Distillation``; and what cannot be compared, before any training."""
    for kinds in (("deit", "vit"), ("vit", "deit")):
        student, teacher = model(kinds[0], 3, layers=2), model(kinds[1], 6, layers=3, seed=1)
        objectives = {"linear": HiddenStates(), "orthogonal": OrthogonalProjection()}
        distillation, batch = Distillation(teacher, objectives), image_batch(3)
        out = distillation(student, batch)
        hidden = [
            m(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states for m in (student, teacher)
        ]
        places = [[0, *range(kind == "deit" and 2 or 1, 17 + (kind == "deit"))] for kind in kinds]
        for name, objective in objectives.items():
            weights = [(m.weight.detach().double(), m.bias) for m in objective.projector.maps]
            expected = dense_features(objective, weights, *hidden, None, *places, [])
            torch.testing.assert_close(out.terms[name].double(), expected.detach(), rtol=1e-4, atol=1e-6)
        out.loss.backward()
        with pytest.raises(ValueError, match=r"grids of 4 and 16 patches") as caught:
            Distillation(teacher, {"linear": HiddenStates()})(model(kinds[0], 3, patch_size=4), batch)
        assert "student layer 0 (3," in str(caught.value) and "teacher layer" in str(caught.value)
        with pytest.raises(ValueError, match=r"student .* have .* tokens, but the plan compares 1[78] tokens"):
            distillation(model(kinds[0], 3, layers=2, patch_size=4), batch)


def test_features_of_models_that_do_not_say_which_tokens_they_have():
    """Token by token where there are as many; else the error says how to name them."""
    given = features((CLASS, DEIT))
    with pytest.raises(ValueError, match=r"\(3, 6, 6\).*\(3, 7, 8\) differ.*name them \(student_tokens, teacher_tok"):
        HiddenStates().prepare([dataclasses.replace(given, rows=None, student_layout=CLASS)])
    with pytest.raises(ValueError, match="teacher_tokens='class'"):
        HiddenStates(teacher_tokens="class")
    named = HiddenStates(teacher_tokens=["class", "distillation"])
    assert named.plan_options != HiddenStates().plan_options
    named.prepare([dataclasses.replace(given, student_layout=CLASS, teacher_layout=REGISTERS)])
    assert len(named.plan[0].tokens) == 6, "what is given goes before what is known"


def with_gradients(record):
    parts = {name: getattr(record, name).clone().requires_grad_() for name in ("query", "key", "value")}
    return changed(record, **parts)


@pytest.mark.parametrize("kind", _KNOWN)
def test_known_layouts_count_the_models_tokens(kind):
    network = model(kind)
    with torch.no_grad(), record_attention(network) as recorded:
        network(pixel_values=image_batch(2)["pixel_values"])
    layout = known_layout(network)
    assert layout is not None and recorded[0].num_keys == 16 + len(layout)
    assert known_layout(nn.Sequential(network)) == layout, "through a wrapper"
    assert layout.count("distillation") == (kind == "deit")


def test_registers_are_counted_by_the_configuration():
    assert known_layout(model("dinov2_with_registers", num_register_tokens=2)) == REGISTERS
    assert known_layout(nn.Linear(2, 2)) is None


def test_198_tokens_against_197():
    """DeiT's own sizes, both ways, through the objective and against the dense definition in float64."""
    sizes = {"image_size": 224, "patch_size": 16}
    pixels = torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    for student_kind, teacher_kind in (("vit", "deit"), ("deit", "vit")):
        student = model(student_kind, 3, **sizes).double()
        teacher = model(teacher_kind, 6, seed=1, **sizes).double()
        objective = SqueezedHeads(schedule="progressive")
        distillation = Distillation(teacher, {"attention": objective})
        out = distillation(student, {"pixel_values": pixels.double()})
        (layer,) = objective.plan
        assert len(layer.tokens) == 197
        with record_attention(student) as learned:
            student(pixel_values=pixels.double())
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(pixel_values=pixels.double())
        assert {learned[0].num_keys, taught[0].num_keys} == {197, 198}
        short, long = [*range(197)], [0, *range(2, 198)]
        mine, theirs = (short, long) if student_kind == "vit" else (long, short)
        expected = dense_loss(learned[0], taught[0], layer.groups, "least_squares", mine, theirs)
        torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
        parameters = [p for p in student.parameters() if p.requires_grad]
        for found, wanted in zip(
            torch.autograd.grad(out.loss, parameters, allow_unused=True),
            torch.autograd.grad(expected, parameters, allow_unused=True),
            strict=True,
        ):
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_plan_is_stored_and_printed_with_its_tokens():
    teacher, student, batch = model("deit", 6), model("vit", 3), image_batch(3)
    objectives = {"attention": SqueezedHeads(calibration_batches=2), "relations": SqueezedRelations()}
    Distillation(teacher, objectives).prepare(student, [batch, image_batch(3, seed=1)])
    for objective in objectives.values():
        stored = json.loads(json.dumps(objective.plan_to_json()))
        assert stored[0]["tokens"] == {"student": ["class"], "teacher": ["class", "distillation"], "patches": 16}
        again = type(objective)()
        again.plan_from_json(stored)
        assert again.plan == objective.plan
    old = [{key: value for key, value in layer.items() if key != "tokens"} for layer in stored]
    again.plan_from_json(old)  # of a run from before there were layouts
    assert again.plan[0].tokens is None
    caption = plan_table(stored, "attention").caption
    assert caption == "tokens compared: class + 16 patches (17 of the student's 17, of the teacher's 18)"
    assert plan_table(old, "attention").caption == "tokens compared: all"


def test_different_grids_are_named():
    distillation = Distillation(model("deit", 6), {"attention": SqueezedHeads()})
    with pytest.raises(ValueError, match="grids of 4 and 16 patches") as caught:
        distillation(model("vit", 3, patch_size=4), image_batch(2))
    assert "vit.layers.0.attention" in str(caught.value) and "deit.layers.0.attention" in str(caught.value)
    # As many tokens in both, but not the same: one has a register where the other has a patch.
    student, teacher = records(CLASS, CLASS)
    with pytest.raises(ValueError, match="grids of 5 and 4 patches"):
        share_tokens(student, teacher, CLASS, DEIT)


def test_unknown_layouts_compare_token_by_token():
    student, teacher = records(CLASS, DEIT)
    with pytest.raises(ValueError, match="different tokens: 6 queries × 6 keys against 7 × 7"):
        share_tokens(student, teacher, None, DEIT)
    assert share_tokens(student, student, None, CLASS) is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"teacher_tokens=\['klass'\].*class, distillation, register"):
        SqueezedHeads(teacher_tokens=["klass"])
    student, teacher = records(CLASS, DEIT)
    with pytest.raises(ValueError, match="causal"):
        share_tokens(student, teacher, CLASS, DEIT).squeezed(
            changed(student, is_causal=True), changed(teacher, is_causal=True)
        )
    with pytest.raises(ValueError, match="'teacher' has 7 queries × 7 keys, but the plan compares 9 tokens"):
        SharedTokens(CLASS, DEIT, 7).sliced(records(CLASS, DEIT, 7)[0], teacher)


def test_given_layouts_are_part_of_what_a_plan_holds_for():
    assert SqueezedHeads().plan_options != SqueezedHeads(teacher_tokens=["class"]).plan_options
    assert "teacher_tokens" not in SqueezedHeads().plan_options, "plans of earlier runs stay good"


def test_similar_groups_are_found_on_the_compared_rows():
    student, teacher = records(CLASS, REGISTERS, seed=0)
    theirs = [0, *range(3, 8)]
    compared = oracle.similar_groups([by_hand(teacher, theirs, [*range(8)])], 3)
    assert compared != oracle.similar_groups([teacher], 3), "another seed is needed: rows make no difference here"
    objective = SqueezedHeads(student_tokens=["class"], teacher_tokens=list(REGISTERS))
    objective.prepare([Evidence({}, None, learned={0: student}, taught={0: teacher})])
    assert objective.plan[0].groups == compared
