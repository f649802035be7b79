"""What every objective owes: a mean over items, a gradient for the student, none for the teacher, clear errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from squeezeheads import (
    AttentionMSE,
    DeiTHard,
    DeiTSoft,
    Distillation,
    HiddenStates,
    JensenShannon,
    LogitKD,
    MiniLMRelations,
    OrthogonalProjection,
    ReverseKL,
    SqueezedHeads,
    SqueezedRelations,
    TaskLoss,
    attention_divergence,
    calibrate_groups,
    group_heads,
    mixing_matrix,
    pair_layers,
    record_attention,
    squeezed_attention_loss,
)
from squeezeheads import distillation as distillation_module
from squeezeheads.batches import next_token_targets
from squeezeheads.objectives import OBJECTIVES, squeeze_plan
from tiny import classifier, deit_student, image_batch, language_model, token_batch

# A new objective is one row here: its options, chosen to be off the defaults.
ROWS = {
    "task": TaskLoss(weight=0.3),
    "logits": LogitKD(weight=0.7, temperature=2.0),
    "attention": SqueezedHeads(weight=1.5, temperature=1.3),
    "squeezed_relations": SqueezedRelations(weight=0.6, weights="joint"),
    "attention_mse": AttentionMSE(weight=0.8, compare="maps"),
    "minilm": MiniLMRelations(weight=1.2, relation_heads=4, layers="uniform"),
    "reverse_kl": ReverseKL(weight=0.9, temperature=1.5),
    "jensen_shannon": JensenShannon(weight=1.1, temperature=0.8, beta=0.3),
    "hidden_states": HiddenStates(weight=0.4, layers=[[0, 1], [1, 0]], normalisation="standardise"),
    "orthogonal": OrthogonalProjection(weight=0.2, layers="uniform", normalisation="none"),
    "deit_hard": DeiTHard(weight=0.5),
    "deit_soft": DeiTSoft(weight=0.7, temperature=3.0),
}
# Those that images alone have a use for: tests/test_deit.py cuts their batches.
IMAGES_ALONE = ("deit_hard", "deit_soft")
TEXT_ROWS = [name for name in ROWS if name not in IMAGES_ALONE]

# Heads of the teacher; students have 3.
TEACHER_HEADS = {name: 6 for name in ROWS} | {"attention_mse": 3}


def fresh(name: str):
    return dataclasses.replace(ROWS[name])


def gradients(student, distillation) -> list[torch.Tensor]:
    """Of the student, and of what objectives train beside it."""
    projectors = [o.projector for o in distillation.objectives.values() if o.projector is not None]
    return [p.grad.clone() for m in (student, *projectors) for p in m.parameters() if p.grad is not None]


def parts(batch: dict, sizes: list[int]) -> list[dict]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [{k: v[a : a + n] for k, v in batch.items()} for a, n in zip(starts, sizes, strict=True)]


CAUSAL = {"targets": next_token_targets}

# Those of denoisers: tests/test_diffusion.py.
DENOISERS_ALONE = {"prediction_matching"}


def test_every_objective_has_a_row():
    assert ROWS.keys() == OBJECTIVES.keys() - DENOISERS_ALONE


@pytest.mark.parametrize("name", ROWS)
def test_gradient_reaches_the_student_and_not_the_teacher(name):
    teacher = classifier(TEACHER_HEADS[name], seed=1)
    student = deit_student() if name in IMAGES_ALONE else classifier(3)
    out = Distillation(teacher, {name: fresh(name)})(student, image_batch(5))
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    objective = ROWS[name]
    torch.testing.assert_close(out.loss.detach(), objective.weight * objective.scale * out.terms[name])


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_parts_of_a_batch_add_up_to_the_whole(name):
    """Gradient accumulation, uneven parts: loss and gradient are those of the whole batch."""
    teacher = language_model(TEACHER_HEADS[name], seed=1)
    batch = token_batch([9, 2, 5, 7, 1], total=9)
    found = []
    for sizes in ([5], [1, 3, 1], [2, 3]):
        student = language_model(3)
        distillation = Distillation(teacher, {name: fresh(name)}, targets=next_token_targets, loss_takes_count=True)
        distillation.prepare(student, [batch])
        counts = distillation.count(batch)
        total = sum(distillation(student, part, counts=counts).loss for part in parts(batch, sizes))
        # The last part of [1, 3, 1] has one token and so no prediction.
        total.backward()
        found.append((total.detach(), gradients(student, distillation)))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-7)
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_which_predictions_count_is_told_by_the_student(wrapped):
    """Position i of a causal language model predicts label i + 1: a prompt's last position counts, the last one not."""
    teacher, student, batch = language_model(6, seed=1).eval(), language_model(3).eval(), token_batch([9, 6], total=9)
    batch["labels"][:, :4] = -100
    if wrapped:
        student = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    by_default, told = (Distillation(teacher, {"logits": LogitKD()}, **options) for options in ({}, CAUSAL))
    with pytest.raises(RuntimeError, match="prepare"):
        by_default.count(batch)
    assert by_default(student, batch).terms == told(student, batch).terms
    assert by_default.count(batch) == {"logits": 5 + 2}
    images = Distillation(classifier(6).eval(), {"logits": LogitKD()})
    images(classifier(3), image_batch(4))
    assert images.count(image_batch(4)) == {"logits": 4}


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_padding_changes_nothing(name):
    """Neither its side nor its amount nor what stands there; a prompt that is masked away is no more than padding."""
    teacher, student = language_model(TEACHER_HEADS[name], seed=1).eval(), language_model(3).eval()
    plain = token_batch([7, 4], total=7)
    distillation = Distillation(teacher, {name: fresh(name)}, targets=next_token_targets)
    distillation.prepare(student, [plain])
    found = []
    for side, total in (("right", 7), ("right", 11), ("left", 7), ("left", 12)):
        batch = token_batch([7, 4], total=total, side=side)
        if total > 7:
            junk = torch.randint(1, 40, batch["input_ids"].shape, generator=torch.Generator().manual_seed(total))
            batch["input_ids"] = torch.where(batch["attention_mask"] == 0, junk, batch["input_ids"])
        for module in (student, distillation.objectives[name].projector):
            if module is not None:
                module.zero_grad()
        loss = distillation(student, batch).loss
        loss.backward()
        found.append((f"{side} padding to {total}", loss.detach(), gradients(student, distillation)))
    for how, loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][1], rtol=1e-5, atol=1e-6, msg=how)
        for a, b in zip(grads, found[0][2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=how)


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_a_sample_that_counts_nothing_leaves_no_trace(name):
    """An empty response: its rows and predictions count nothing. Alone it gives 0, and finite gradients."""
    teacher, student = language_model(TEACHER_HEADS[name], seed=1).eval(), language_model(3).eval()
    batch, empty = token_batch([7, 5], total=7), token_batch([6], total=7, seed=4)
    empty["labels"].fill_(-100)
    distillation = Distillation(
        teacher,
        {name: fresh(name)},
        rows=lambda inputs: (inputs["labels"] != -100).any(-1, keepdim=True) & inputs["attention_mask"].bool(),
        targets=next_token_targets,
        loss_takes_count=True,
    )
    distillation.prepare(student, [batch])
    found = []
    for inputs in (batch, {k: torch.cat([v, empty[k]]) for k, v in batch.items()}, empty):
        for module in (student, distillation.objectives[name].projector):
            if module is not None:
                module.zero_grad(set_to_none=False)
        loss = distillation(student, inputs).loss
        loss.backward()
        found.append((loss.detach(), gradients(student, distillation)))
    (alone, grads), (together, same), (nothing, none) = found
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    for a, b in zip(same, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert nothing == 0 and all((g == 0).all() for g in none)


def test_logit_kd_is_the_mean_of_each_predictions_divergence():
    teacher, student = language_model(6, seed=1).eval(), language_model(3).eval()
    batch = token_batch([6, 3], total=6)
    tau = 1.7
    out = Distillation(teacher, {"logits": LogitKD(temperature=tau)}, targets=next_token_targets)(student, batch)
    total, count = 0.0, 0
    with torch.no_grad():
        p = (teacher(**batch).logits.double() / tau).softmax(-1)
        q = (student(**batch).logits.double() / tau).softmax(-1)
    for row, length in enumerate([6, 3]):
        for i in range(length - 1):  # position i predicts token i + 1
            total += (p[row, i] * (p[row, i] / q[row, i]).log()).sum().item()
            count += 1
    assert out.terms["logits"].item() == pytest.approx(total / count, rel=1e-5)
    assert out.loss.item() == pytest.approx(tau**2 * total / count, rel=1e-5)
    assert out.counts["logits"].item() == count


def test_logit_kd_names_both_shapes():
    teacher, student = classifier(6, num_labels=7), classifier(3)
    with pytest.raises(ValueError, match=r"\(4, 10\).*\(4, 7\)"):
        Distillation(teacher, {"logits": LogitKD()})(student, image_batch(4))


def test_task_loss_needs_labels():
    with pytest.raises(TypeError, match="labels"):
        Distillation(None, {"task": TaskLoss()})(classifier(3), {"pixel_values": image_batch(2)["pixel_values"]})


def test_task_loss_is_the_models_own():
    student, batch = classifier(3), image_batch(6)
    out = Distillation(None, {"task": TaskLoss()})(student, batch)
    torch.testing.assert_close(out.loss, F.cross_entropy(student(**batch).logits, batch["labels"]))


@pytest.mark.parametrize("schedule", ["progressive", "balanced", "similar"])
@pytest.mark.parametrize("layers", ["uniform", "last", [[0, 3], [1, 0]]])
def test_squeezed_heads_is_the_mean_over_layer_pairs(schedule, layers):
    """The objective, the function, and the parts put together by hand agree."""
    teacher, student, batch = classifier(6, layers=4, seed=1).eval(), classifier(3).eval(), image_batch(4)
    objective = SqueezedHeads(schedule=schedule, layers=layers, weights="joint", temperature=1.4)
    value = Distillation(teacher, {"attention": objective})(student, batch).terms["attention"]
    with torch.no_grad(), record_attention(student) as learned, record_attention(teacher) as taught:
        student(**batch), teacher(**batch)
    pairs, by_hand, groupings = pair_layers(2, 4, layers), [], []
    for s, t in pairs:
        if schedule == "similar":
            (groups,) = calibrate_groups([[taught[t]]], 3, weights="joint")
        else:
            groups = group_heads(6, 3, schedule)
        groupings.append(groups)
        mix = mixing_matrix(taught[t], groups, weights="joint")
        by_hand.append(attention_divergence(learned[s], taught[t], mix, temperature=1.4, implementation="reference"))
    torch.testing.assert_close(value, torch.stack(by_hand).mean(), rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        function = squeezed_attention_loss(
            learned, taught, layers=layers, schedule=groupings, weights="joint", temperature=1.4
        )
    torch.testing.assert_close(function, value)


@pytest.mark.parametrize("layers", ["uniform", "last", [[0, 2], [1, 2]], [[1, 0]]])
def test_groupings_of_all_teacher_layers_are_those_of_the_paired_ones(layers):
    """What ``calibrate_groups`` finds on whole recordings is taken as it is."""
    teacher, student, batch = classifier(6, layers=4, seed=1).eval(), classifier(3).eval(), image_batch(4)
    with torch.no_grad(), record_attention(student) as learned, record_attention(teacher) as taught:
        student(**batch), teacher(**batch)
    found = calibrate_groups([taught], 3)
    assert len(found) == 4 and len(set(found)) == 4, "layers whose groups are alike would show nothing"
    by_pair = [found[t] for _, t in pair_layers(2, 4, layers)]
    with torch.no_grad():
        whole = squeezed_attention_loss(learned, taught, layers=layers, schedule=found)
        torch.testing.assert_close(whole, squeezed_attention_loss(learned, taught, layers=layers, schedule=by_pair))
        with pytest.raises(ValueError, match=r"3 groupings for \d layer pairs and 4 teacher layers: expected one for"):
            squeezed_attention_loss(learned, taught, layers=layers, schedule=found[:3])


def test_only_planned_layers_are_recorded(monkeypatch):
    teacher, student, batch = classifier(6, layers=4, seed=1), classifier(3), image_batch(2)
    distillation = Distillation(teacher, {"attention": SqueezedHeads(layers="last")})
    distillation.prepare(student, [batch])
    seen = []
    original = SqueezedHeads.__call__
    monkeypatch.setattr(SqueezedHeads, "__call__", lambda self, e: seen.append(e) or original(self, e))
    distillation(student, batch)
    assert list(seen[0].taught) == [3] and list(seen[0].learned) == [1]


def test_different_token_counts_are_named():
    teacher, student = classifier(6, patch_size=2), classifier(3, patch_size=4)
    with pytest.raises(ValueError, match=r"5 queries × 5 keys against 17 × 17"):
        Distillation(teacher, {"attention": SqueezedHeads()})(student, image_batch(2))


def test_a_student_that_cannot_learn_is_an_error():
    teacher, student, batch = classifier(6), classifier(3), image_batch(2)
    with torch.no_grad(), record_attention(student) as learned, record_attention(teacher) as taught:
        student(**batch), teacher(**batch)
    with pytest.raises(RuntimeError, match="no gradient can reach"):
        squeezed_attention_loss(learned, taught)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_weights_decay_from_full_to_nothing(decay):
    objective = TaskLoss(weight=2.0, decay=decay)
    assert objective.weight_at(0.0) == 2.0
    assert objective.weight_at(1.0) == pytest.approx(2.0 if decay == "none" else 0.0)
    assert objective.weight_at(0.5) == pytest.approx(2.0 if decay == "none" else 1.0)
    if decay == "cosine":
        assert objective.weight_at(0.25) > TaskLoss(weight=2.0, decay="linear").weight_at(0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskLoss(weight=-1), "weight=-1"),
        (lambda: TaskLoss(weight=float("nan")), "weight=nan"),
        (lambda: TaskLoss(decay="quick"), "decay='quick'"),
        (lambda: LogitKD(temperature=0), "temperature=0"),
        (lambda: ReverseKL(temperature=float("inf")), "temperature=inf"),
        (lambda: JensenShannon(beta=0), "beta=0.*LogitKD"),
        (lambda: JensenShannon(beta=1.0), "beta=1.0.*ReverseKL"),
        (lambda: HiddenStates(normalisation="batch"), "normalisation='batch'"),
        (lambda: OrthogonalProjection(calibration_batches=0), "calibration_batches=0"),
        (lambda: SqueezedHeads(temperature=-1), "temperature=-1"),
        (lambda: SqueezedHeads(calibration_batches=0), "calibration_batches=0"),
        (lambda: Distillation(None, {}), "empty"),
        (lambda: Distillation(None, {"logits": LogitKD()}), "needs a teacher"),
        (lambda: pair_layers(2, 4, "first"), "'first'"),
        (lambda: pair_layers(2, 4, [[0, 4]]), r"\[0, 4\]"),
        (lambda: pair_layers(2, 4, [[0, 1], [0, 2]]), "each student layer once"),
        (lambda: pair_layers(0, 4), "student has 0"),
        (lambda: pair_layers(2, 4, 5), r"layers=5: expected uniform, last, or pairs"),
        (lambda: pair_layers(2, 4, None), r"layers=None: expected uniform, last, or pairs"),
        (lambda: pair_layers(2, 4, [0, 1]), r"layers=\[0, 1\]: expected uniform, last, or pairs"),
        (lambda: pair_layers(2, 4, [[0.5, 1]]), r"layers=\[\[0\.5, 1\]\]: expected .* whole numbers"),
        (lambda: pair_layers(2, 4, ["01"]), r"layers=\['01'\]: expected"),
        (lambda: pair_layers(2, 4, [[0, 1, 2]]), r"\[0, 1, 2\] is no pair"),
        (lambda: pair_layers(2, 4, []), r"layers=\[\]: expected at least one pair"),
    ],
)
def test_impossible_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, ((0, 1), (1, 3), (2, 5))),
        (4, 6, ((0, 1), (1, 2), (2, 4), (3, 5))),  # ⌈l · 6 / 4⌉ = 2, 3, 5, 6
        (6, 6, tuple((i, i) for i in range(6))),
        (12, 30, tuple((i, -(-(i + 1) * 30 // 12) - 1) for i in range(12))),
        (4, 2, ((0, 0), (1, 0), (2, 1), (3, 1))),
    ],
)
def test_uniform_layers(student, teacher, expected):
    assert pair_layers(student, teacher) == expected


def test_an_objective_calibrates_on_as_many_batches_as_it_asks_for(monkeypatch):
    """Whatever others ask for: its plan must not depend on the company it keeps."""
    used = []
    original = squeeze_plan.GroupSearch.look_at
    monkeypatch.setattr(
        squeeze_plan.GroupSearch,
        "look_at",
        lambda s, record, rows: used.append(record.query.sum()) or original(s, record, rows),
    )
    batches = [token_batch([9, 7, 8], total=9, seed=seed) for seed in range(8)]
    teacher, student = language_model(6, layers=4, width=36, seed=1), language_model(3)
    plans, looked_at = [], []
    for others in ({}, {"whitened": OrthogonalProjection(normalisation="whiten", calibration_batches=8)}):
        used.clear()
        heads = SqueezedHeads(calibration_batches=2)
        Distillation(teacher, {"heads": heads, **others}, targets=next_token_targets).prepare(student, batches)
        plans.append(heads.plan)
        looked_at.append(len({float(x) for x in used}))
    assert looked_at == [2 * 2] * 2 and plans[0] == plans[1], "two batches, two layers"


@pytest.mark.parametrize("room", [0, 100_000, None], ids=["nothing is kept", "the second is kept", "all is kept"])
def test_calibration_keeps_no_more_than_fits_and_finds_the_same(monkeypatch, room):
    """What is not kept is made anew for each round: memory does not grow with the batches."""
    teacher, student = language_model(6, layers=4, width=36, seed=1), language_model(2)
    batches = [token_batch([9, 7, 8], total=9, seed=seed) for seed in range(4)]
    taught = []
    with torch.no_grad():
        for batch in batches:
            with record_attention(teacher.eval()) as recorded:
                teacher(**batch)
            taught.append([recorded[1], recorded[3]])  # the teacher layers of two student layers
    expected = calibrate_groups(taught, 2, rows=[b["attention_mask"] for b in batches])
    if room is not None:
        monkeypatch.setattr(distillation_module, "KEPT_BYTES", room)
    passes = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    objectives = {"heads": SqueezedHeads(), "whitened": OrthogonalProjection(normalisation="whiten")}
    Distillation(teacher, objectives, targets=next_token_targets).prepare(student, batches)
    assert tuple(layer.groups for layer in objectives["heads"].plan) == expected
    # 6 heads become 2 in four rounds; statistics are taken of one pair of layers.
    again = {0: 3 * 4 + 3, 100_000: 2 * 4 + 2, None: 0}[room]
    assert len(passes) == (4 if room is None else 1 + again + (room > 0))


@pytest.mark.parametrize("labels", [True, False])
def test_parts_without_a_mask_weigh_by_their_length(labels):
    teacher, student = language_model(6, seed=1).eval(), language_model(3).eval()
    objectives = {"minilm": MiniLMRelations(relation_heads=2)} | ({} if labels else {"logits": LogitKD()})
    ids = [torch.randint(1, 40, (1, n), generator=torch.Generator().manual_seed(n)) for n in (4, 16)]
    bare = [{"input_ids": x, **({"labels": x} if labels else {})} for x in ids]
    masked = [{**part, "attention_mask": torch.ones_like(part["input_ids"])} for part in bare]
    found = []
    for parts in (bare, masked):
        distillation = Distillation(teacher, objectives, targets=next_token_targets)
        distillation.prepare(student, parts)
        each = [distillation.count(part) for part in parts]
        counts = {name: sum(c[name] for c in each) for name in objectives}
        found.append(sum(distillation(student, part, counts=counts).loss for part in parts))
        assert counts["minilm"] == 20
    torch.testing.assert_close(*found)


def test_weights_of_rows_may_add_up_to_less_than_one():
    teacher, student, batch = language_model(6, seed=1).eval(), language_model(3).eval(), token_batch([9, 7], 9)
    distillation = Distillation(
        teacher, {"x": MiniLMRelations(relation_heads=2)}, rows=lambda i: 0.01 * i["attention_mask"].float()
    )
    whole = distillation(student, batch)
    part = distillation(student, batch, counts=distillation.count(batch))
    torch.testing.assert_close(part.loss, whole.loss)


def test_the_sources_defaults():
    assert MiniLMRelations().layers == OrthogonalProjection().layers == "last"
    assert OrthogonalProjection().normalisation == "standardise" and HiddenStates().normalisation == "none"
    assert AttentionMSE().compare == "scores" and JensenShannon().beta == 0.5
    uniform = {"attention", "squeezed_relations", "attention_mse", "hidden_states"}
    assert all(OBJECTIVES[name]().layers == "uniform" for name in uniform)


def test_teachers_keep_no_cache():
    teacher, seen = language_model(6, seed=1), []
    teacher.register_forward_hook(lambda module, given, outputs: seen.append(outputs.get("past_key_values")))
    Distillation(teacher, {"x": LogitKD(), "y": SqueezedHeads()})(language_model(3), token_batch([6], total=6))
    assert seen == [None] * len(seen) and seen


@pytest.mark.parametrize("side", ("left", "right"))
def test_labels_that_padding_would_predict_are_refused(side):
    """With padding on the left the first token of a sample is preceded by padding: how much of it must not matter."""
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    real = real if side == "left" else real.flip(1)
    ids = torch.arange(10).reshape(2, 5) + 1
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)}
    distillation = Distillation(None, {"task": TaskLoss()}, targets=next_token_targets)
    if side == "right":
        distillation.prepare(language_model(3), [batch])
        return
    with pytest.raises(ValueError, match="1 labels of a batch would be predicted from padding"):
        distillation.prepare(language_model(3), [batch])
    mended = {**batch, "labels": ids.where(real & torch.tensor([[False] + [True] * 4]) & real.roll(1, 1), -100)}
    distillation.prepare(language_model(3), [mended])
