"""Logit and feature objectives against a second version: dense, in float64, from their definitions, by autograd."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from squeezeheads import (
    Distillation,
    HiddenStates,
    JensenShannon,
    LogitKD,
    OrthogonalProjection,
    ReverseKL,
    TaskLoss,
)
from squeezeheads.batches import next_token_targets
from squeezeheads.objectives import Evidence, token_chunks
from squeezeheads.objectives.projected_features import WHITENING_FLOOR
from squeezeheads.objectives.token_chunks import mean_divergence
from tiny import classifier, image_batch, language_model, token_batch

# --------------------------------------------------------------------------------------------------------------- logits

LOGITS = {
    "forward": LogitKD(temperature=1.7),
    "reverse": ReverseKL(temperature=0.6),
    "js": JensenShannon(temperature=1.3, beta=0.2),
    "js_near_1": JensenShannon(temperature=2.0, beta=0.9),
}


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def dense(objective, student, teachers, targets=None):
    """As the definitions stand, with probabilities rather than their logarithms, in the student's dtype."""
    scores = torch.stack([t.to(student.dtype) for t in teachers]).mean(0)
    p = (scores / objective.temperature).softmax(-1).detach()
    q = (student / objective.temperature).softmax(-1)
    if isinstance(objective, JensenShannon):
        m = objective.beta * p + (1 - objective.beta) * q
        each = objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)
    else:
        each = kl(q, p) if isinstance(objective, ReverseKL) else kl(p, q)
    return each.mean() if targets is None else each[targets].sum() / targets.sum().clamp_min(1)


def value_and_gradient(loss, leaf):
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def problem(shape=(3, 7, 63), teachers=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(teachers + 1)]
    targets = torch.rand(shape[:-1], generator=generator) < 0.6
    return made[0].to(dtype).requires_grad_(), [t.to(dtype) for t in made[1:]], targets


def call(objective, student, teachers, targets=None):
    teacher = teachers[0] if len(teachers) == 1 else list(teachers)
    return objective(Evidence({}, student=student, teacher=teacher, targets=targets))


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counted", ["all", "some", "none"])
def test_logit_objectives_equal_the_dense_version(name, teachers, dtype, counted):
    student, taught, targets = problem(teachers=teachers, dtype=dtype)
    targets = {"all": None, "some": targets, "none": torch.zeros_like(targets)}[counted]
    reference = student.detach().double().requires_grad_()
    expected = value_and_gradient(dense(LOGITS[name], reference, taught, targets), reference)
    found = value_and_gradient(call(LOGITS[name], student, taught, targets), student)
    rtol, atol = (1e-5, 1e-7) if dtype == torch.float32 else (1e-11, 1e-13)
    # What rounding does to the definitions themselves differs by processor; as much is allowed here.
    leaf = student.detach().requires_grad_()
    rounded = value_and_gradient(dense(LOGITS[name], leaf, taught, targets), leaf)
    for a, b, naive in zip(found, expected, rounded, strict=True):
        assert a.dtype == dtype
        budget = max(atol, 2 * float((naive - b).abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=budget)
    if counted == "none":
        assert found[0] == 0 and (found[1] == 0).all()


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("counted", ["some", "none"])
def test_predictions_that_do_not_count_are_computed_along_where_looking_would_wait(name, counted, monkeypatch):
    student, taught, targets = problem(teachers=2)
    targets = targets if counted == "some" else torch.zeros_like(targets)
    with torch.no_grad():
        student[~targets] = torch.inf  # whatever a model says there
    expected = value_and_gradient(call(LOGITS[name], student, taught, targets), student)
    monkeypatch.setattr(token_chunks, "_finding_is_cheap", lambda device: False)
    found = value_and_gradient(call(LOGITS[name], student, taught, targets), student)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert (found[1][~targets] == 0).all()


@pytest.mark.parametrize("name", LOGITS)
def test_gradients_by_finite_differences(name):
    student, taught, targets = problem((2, 3, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: 1.7 * call(LOGITS[name], s, taught, targets), student)


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("chunk_bytes", [1, 63 * 4, 63 * 4 * 5 + 1, 2**20])
def test_chunks_change_nothing(name, chunk_bytes):
    student, taught, targets = problem(teachers=2)
    objective = LOGITS[name]
    options = {"temperature": objective.temperature, "targets": targets}
    expected = value_and_gradient(mean_divergence(student, taught, objective.divergence, **options), student)
    cut = mean_divergence(student, taught, objective.divergence, **options, chunk_bytes=chunk_bytes)
    value, gradient = value_and_gradient(cut, student)
    torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_any_layout(name):
    """Classifiers' two dimensions, slices that are no block of memory, an expanded teacher."""
    student, taught, targets = problem((4, 9, 17))
    for cut in ((slice(None), 0), (slice(None), slice(1, None, 2))):
        reference = student.detach().double().requires_grad_()
        expected = value_and_gradient(
            dense(LOGITS[name], reference[cut], [taught[0][:1].expand(4, -1, -1)[cut]], targets[cut]), reference
        )
        loss = call(LOGITS[name], student[cut], [taught[0][:1].expand(4, -1, -1)[cut]], targets[cut])
        for a, b in zip(value_and_gradient(loss, student), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_gradient_once(name, dtype):
    """The dense version gets the same rounded logits: all that is left is float32 arithmetic and one rounding."""
    student, taught, targets = problem((2, 40, 500), teachers=2, dtype=dtype)
    reference = student.detach().double().requires_grad_()
    value, exact = value_and_gradient(dense(LOGITS[name], reference, taught, targets), reference)
    found, gradient = value_and_gradient(call(LOGITS[name], student, taught, targets), student)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-7)
    info = torch.finfo(dtype)
    # Twice: in the store, and after the factor. Small ones by the smallest number there is; float32's own error.
    budget = 2 * info.eps * exact.abs() + 2 * info.smallest_normal * info.eps + 1e-6 / targets.sum()
    assert ((gradient.double() - exact).abs() <= budget).all()


def test_a_factor_beyond_half_precision_is_no_overflow():
    """What a gradient scaler does: the factor 65,536 times 8 is no float16, the gradient is."""
    student, taught, _ = problem((1, 8, 50), dtype=torch.float16)
    (plain,) = torch.autograd.grad(call(LogitKD(), student, taught), student)
    (scaled,) = torch.autograd.grad(2.0**19 * call(LogitKD(), student, taught), student)
    large = plain.abs() > 1e-3  # no subnormal numbers
    torch.testing.assert_close(scaled[large].double(), plain[large].double() * 2**19, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", LOGITS)
def test_forbidden_tokens(name):
    """Logits of −∞ in both models take no part."""
    student, taught, targets = problem()
    barred = torch.zeros_like(student, dtype=torch.bool)
    barred[..., 40:] = True
    expected = value_and_gradient(call(LOGITS[name], student[..., :40], [taught[0][..., :40]], targets), student)
    masked = [t.masked_fill(barred, -torch.inf) for t in (student, *taught)]
    found = value_and_gradient(call(LOGITS[name], masked[0], masked[1:], targets), student)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert call(LOGITS[name], student.detach() * torch.nan, taught, targets).isnan()  # and no mistake is hidden


def test_jensen_shannon_between_the_two_kls():
    student, taught, _ = problem(dtype=torch.float64)
    forward, reverse = (call(kind(), student, taught).item() for kind in (LogitKD, ReverseKL))
    small = 1e-9
    assert call(JensenShannon(beta=small), student, taught).item() / small == pytest.approx(forward, rel=1e-3)
    assert call(JensenShannon(beta=1 - small), student, taught).item() / small == pytest.approx(reverse, rel=1e-3)
    far = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    assert call(JensenShannon(), far[0], [far[1]]).item() == pytest.approx(torch.tensor(2.0).log().item())
    swapped = call(JensenShannon(beta=0.3), student, taught), call(JensenShannon(beta=0.7), taught[0], [student])
    torch.testing.assert_close(*swapped)


def test_tau_squared_is_in_the_total_alone():
    student, taught, _ = problem((3, 11))
    for kind in (LogitKD, ReverseKL, JensenShannon):
        objective = kind(temperature=3.0)
        assert objective.scale == 9.0
        assert call(objective, student, taught).item() == pytest.approx(dense(objective, student, taught).item())


@pytest.mark.parametrize("kind", [LogitKD, ReverseKL, JensenShannon])
def test_the_mean_of_two_teachers(kind):
    """Through Distillation, by an objective that names none; one that names its teacher gets that one."""
    first, second = language_model(6, seed=1).eval(), language_model(4, seed=2).eval()
    student, batch = language_model(3).eval(), token_batch([6, 4], total=6)
    objectives = {"mean": kind(temperature=1.4), "second": kind(temperature=1.4, teacher="b")}
    out = Distillation({"a": first, "b": second}, objectives, targets=next_token_targets)(student, batch)
    with torch.no_grad():
        mine, *theirs = (model(**batch).logits.double() for model in (student, first, second))
    targets = next_token_targets(batch)
    expected = {"mean": dense(objectives["mean"], mine, theirs, targets)}
    expected["second"] = dense(objectives["mean"], mine, theirs[1:], targets)
    for name, value in expected.items():
        assert out.terms[name].item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teachers", "targets", "message"),
    [
        ((2, 5, 7), [(2, 5, 7), (2, 5, 8)], None, r"two teachers \(2, 5, 7\) and \(2, 5, 8\)"),
        ((2, 5, 7), [(2, 5, 8), (2, 5, 8)], None, r"\(2, 5, 7\).*\(2, 5, 8\).*same classes or vocabulary"),
        ((2, 5, 7), [(2, 4, 7)], None, r"\(2, 5, 7\).*\(2, 4, 7\).*same tokens"),
        ((2, 5, 7), [(2, 5, 7)], (2, 4), r"targets \(2, 4\).*\(2, 5\)"),
        ((7,), [(7,)], None, r"\(7,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(student, teachers, targets, message):
    marks = None if targets is None else torch.ones(targets, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        call(LogitKD(), torch.zeros(student), [torch.zeros(shape) for shape in teachers], marks)


def test_a_second_derivative_is_refused():
    student, taught, _ = problem()
    weight = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(weight * call(LogitKD(), student, taught), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    loss = call(LogitKD(), student, taught)
    # The same graph twice is no second derivative.
    first, second = (torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_teachers_get_no_gradient_and_none_is_made_without_one():
    student, taught, _ = problem()
    taught[0].requires_grad_()
    call(LogitKD(), student, taught).backward()
    assert taught[0].grad is None
    with torch.no_grad():
        assert not call(LogitKD(), student, taught).requires_grad
    assert not call(LogitKD(), student.detach(), taught).requires_grad
    asked = []

    def divergence(log_student, log_teacher, gradient):
        asked.append(gradient)
        return LogitKD().divergence(log_student, log_teacher, gradient)

    mean_divergence(student, taught, divergence)
    with torch.no_grad():
        mean_divergence(student, taught, divergence)
    mean_divergence(student.detach(), taught, divergence)
    assert asked == [True, False, False]


# What a fresh process holds at most, beside both models' logits, in a forward and backward pass.
PROBE = """
import json, resource, sys, torch
from squeezeheads import JensenShannon, LogitKD, ReverseKL
from squeezeheads.objectives import Evidence, token_chunks
torch.set_num_threads(1)
kind = {"forward": LogitKD, "reverse": ReverseKL, "js": JensenShannon}[sys.argv[1]]
def run(tokens):
    make = lambda: torch.randn(1, tokens, 32000, dtype=torch.bfloat16)
    student, teacher = make().requires_grad_(), make()
    targets = torch.ones(1, tokens, dtype=torch.bool)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind(temperature=2.0)(Evidence({}, student=student, teacher=teacher, targets=targets)).backward()
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16)
print(json.dumps([1024 * kb for kb in run(2048)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_memory_is_two_gradients_in_the_logits_type_and_a_few_chunks(kind):
    """2,048 tokens by 32,000: one set of float32 logits is 250 MiB, and the textbook version holds five or more."""
    done = subprocess.run([sys.executable, "-c", PROBE, kind], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    held = after - before
    gradients = 2 * 2048 * 32000 * 2  # the one that is kept, and the one that backward returns
    print(f"{kind}: {held / 2**20:.0f} MiB beside the logits, of which gradients {gradients / 2**20:.0f} MiB")
    # Chunks of 8 MiB, and what the allocator keeps; one float32 set more would be 250 MiB.
    assert held < gradients + 14 * 8 * 2**20


# ------------------------------------------------------------------------------------------------------------- features

FEATURES = {
    "linear": HiddenStates(layers=[[0, 2], [1, 0]]),
    "linear_standardised": HiddenStates(normalisation="standardise"),
    "linear_whitened": HiddenStates(layers="last", normalisation="whiten", calibration_batches=2),
    "orthogonal": OrthogonalProjection(),
    "orthogonal_plain": OrthogonalProjection(layers="uniform", normalisation="none"),
    "orthogonal_whitened": OrthogonalProjection(layers="uniform", normalisation="whiten", calibration_batches=3),
}
PAIRS = {"uniform": [(0, 1), (1, 3)], "last": [(1, 3)]}  # 2 student layers, 4 teacher layers


def states(width, layers, batch=3, tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(batch, tokens, width, generator=generator) + 0.5 for _ in range(layers + 1))


def evidence(rows=True, seed=0, widths=(10, 14)):
    count = torch.arange(11) < torch.tensor([[11], [6], [9]]) if rows else None
    learned, taught = states(widths[0], 2, seed=seed), states(widths[1], 4, seed=seed + 100)
    return Evidence({}, student={"hidden_states": learned}, teacher={"hidden_states": taught}, rows=count)


def prepared(name, widths=(10, 14), rows=True):
    objective = dataclasses.replace(FEATURES[name])
    torch.manual_seed(1)
    objective.prepare([evidence(rows, seed, widths) for seed in range(objective.batches_to_prepare)])
    return objective


def weights_of(projector, index):
    """(E_T, E_S) and (E_T,), from the parameters alone."""
    state = {k: v.detach().double() for k, v in projector.state_dict().items()}
    prefix = f"maps.{index}."
    if prefix + "weight" in state:
        return state[prefix + "weight"].requires_grad_(), state[prefix + "bias"].requires_grad_()
    return state[prefix + "parametrizations.weight.original"].requires_grad_(), None


def cayley(projector, index, original):
    """base · (I − A/2)⁻¹ (I + A/2), A skew from the lower triangle of the taller way round; its first columns."""
    base = projector.state_dict()[f"maps.{index}.parametrizations.weight.0.base"].double()
    tall = original if original.shape[0] >= original.shape[1] else original.T
    lower = torch.cat([tall.tril(), tall.new_zeros(len(tall), len(tall) - tall.shape[1])], dim=1)
    half, one = (lower - lower.T) / 2, torch.eye(len(tall), dtype=torch.double)
    weight = base @ (torch.linalg.inv(one - half) @ (one + half))[:, : tall.shape[1]]
    return weight if original.shape[0] >= original.shape[1] else weight.T


def whitener(observed, layer):
    """Mean and Σ^-½ with its floor, from all calibration rows at once."""
    rows = torch.cat(
        [e.teacher["hidden_states"][layer + 1][slice(None) if e.rows is None else e.rows] for e in observed]
    )
    rows = rows.reshape(-1, rows.shape[-1]).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    return rows.mean(0), vectors @ torch.diag(values.clamp_min(WHITENING_FLOOR * values.mean()) ** -0.5) @ vectors.T


def dense_features(objective, given, parameters, learned, observed):
    """Row by row, feature by feature, pair by pair."""
    pairs = PAIRS.get(objective.layers, objective.layers) if isinstance(objective.layers, str) else objective.layers
    total, count = torch.zeros((), dtype=torch.double), 0
    for index, (s, t) in enumerate(pairs):
        weight, bias = parameters[index]
        if bias is None:
            weight = cayley(objective.projector, index, weight)
        for b in range(3):
            for i in range(11):
                if given.rows is not None and not given.rows[b, i]:
                    continue
                goal = given.teacher["hidden_states"][t + 1][b, i].double()
                if objective.normalisation == "standardise":
                    goal = (goal - goal.mean()) / (goal.var(correction=0) + 1e-5).sqrt()
                if objective.normalisation == "whiten":
                    mean, matrix = whitener(observed, t)
                    goal = matrix @ (goal - mean)
                guess = weight @ learned[s + 1][b, i] + (0 if bias is None else bias)
                total = total + (guess - goal).square().sum()
                count += len(goal)
    return total / count


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("widths", [(10, 14), (14, 10), (8, 8)])
@pytest.mark.parametrize("rows", [True, False])
def test_feature_objectives_equal_the_dense_version(name, widths, rows):
    """Value, and the gradient of student and projector, at parameters that have moved."""
    objective = prepared(name, widths, rows)
    with torch.no_grad():
        for p in objective.projector.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    given = evidence(rows, 7, widths)
    observed = [evidence(rows, seed, widths) for seed in range(objective.batches_to_prepare)]
    learned = [s.double().requires_grad_() for s in given.student["hidden_states"]]
    parameters = [weights_of(objective.projector, i) for i in range(len(objective.plan))]
    expected = dense_features(objective, given, parameters, learned, observed)
    expected.backward()

    leaves = tuple(s.clone().requires_grad_() for s in given.student["hidden_states"])
    value = objective(dataclasses.replace(given, student={"hidden_states": leaves}))
    value.backward()
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(leaves, learned, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    own = [p.grad.double() for p in objective.projector.parameters()]
    other = [p.grad for pair in parameters for p in pair if p is not None]
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_rows_that_do_not_count_may_hold_anything(name):
    objective = prepared(name)
    given = evidence(seed=7)
    expected = objective(given)
    for outputs in (given.student, given.teacher):
        for state in outputs["hidden_states"]:
            state[~given.rows] = torch.nan
    value = objective(given)
    value.backward()
    assert torch.equal(value, expected)
    assert all(p.grad.isfinite().all() for p in objective.projector.parameters())


@pytest.mark.parametrize("widths", [(10, 14), (14, 10), (8, 8)])
def test_orthonormal_whatever_the_optimiser_does(widths):
    objective = prepared("orthogonal", widths)
    optimizer = torch.optim.AdamW(objective.projector.parameters(), lr=0.3, weight_decay=0.5)
    weight = objective.projector.maps[0].weight.detach()
    for seed in range(5):
        optimizer.zero_grad()
        objective(evidence(seed=seed, widths=widths)).backward()
        optimizer.step()
    moved = objective.projector.maps[0].weight.detach()
    assert (moved - weight).abs().max() > 0.1
    for matrix in (weight, moved):
        product = matrix.T @ matrix if widths[0] <= widths[1] else matrix @ matrix.T
        torch.testing.assert_close(product, torch.eye(min(widths)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_projections_are_not_rounded_under_autocast(name):
    objective, given = prepared(name), evidence(seed=7)
    expected = objective(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(given), expected)


def test_whitened_features_have_mean_0_and_covariance_1():
    objective = prepared("orthogonal_whitened")
    observed = [evidence(seed=seed) for seed in range(3)]
    rows = torch.cat([e.teacher["hidden_states"][4][e.rows] for e in observed])
    white = objective._projectors.whiten(1, rows)
    torch.testing.assert_close(white.mean(0), torch.zeros(14), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(14), rtol=0, atol=1e-4)


def test_whitening_is_the_same_wherever_features_lie():
    """Features far from 0: a difference of large sums would be nothing but rounding."""
    chunks = [1e4 + 1e-3 * torch.randn(40, 6, dtype=torch.double) for _ in range(3)]
    projectors = prepared("orthogonal_whitened", widths=(6, 6))._projectors
    projectors.double().calibrate(0, chunks)
    white = projectors.whiten(0, torch.cat(chunks))
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(6).double(), rtol=0, atol=1e-4)


def test_directions_that_calibration_never_showed_are_not_blown_up():
    """Four rows span three of six directions: the others are held to vary by the floor's share of the mean variance."""
    projectors = prepared("orthogonal_whitened", widths=(6, 6))._projectors
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    projectors.calibrate(0, [rows])
    stretch = torch.linalg.eigvalsh(projectors.get_buffer("whitening_0").double())
    mean = rows.double().var(0, correction=0).mean()
    torch.testing.assert_close(stretch[3:], (WHITENING_FLOOR * mean).rsqrt().expand(3), rtol=1e-4, atol=0)


def test_whitening_without_variance_or_statistics_is_an_error():
    objective = dataclasses.replace(FEATURES["orthogonal_whitened"])
    flat = evidence()
    flat.teacher["hidden_states"] = tuple(torch.ones_like(s) for s in flat.teacher["hidden_states"])
    with pytest.raises(ValueError, match="same in all 26 calibration rows.*standardise"):
        objective.prepare([flat])
    with pytest.raises(ValueError, match="no row"):
        objective.prepare([dataclasses.replace(evidence(), rows=torch.zeros(3, 11, dtype=torch.bool))])
    made = prepared("orthogonal_whitened")
    taken = dataclasses.replace(made)
    taken.plan_from_json(json.loads(json.dumps(made.plan_to_json())))
    with pytest.raises(RuntimeError, match="load_state_dict"):
        taken(evidence())
    taken.projector.load_state_dict(made.projector.state_dict())
    assert torch.equal(taken(evidence()), made(evidence()))


@pytest.mark.parametrize("name", FEATURES)
def test_a_projector_is_made_anew_from_its_plan_and_state(name):
    made = prepared(name)
    taken = dataclasses.replace(made)
    assert not taken.prepared and taken.projector is None
    taken.plan_from_json(json.loads(json.dumps(made.plan_to_json())))
    assert taken.prepared and taken.plan == made.plan
    taken.projector.load_state_dict(made.projector.state_dict())
    assert torch.equal(taken(evidence(seed=7)), made(evidence(seed=7)))
    kept = made.projector
    made.plan_from_json(made.plan_to_json())  # the trainer hands all processes the first one's plan
    assert made.projector is kept
    twin = copy.deepcopy(made)
    assert torch.equal(twin(evidence(seed=7)), made(evidence(seed=7)))
    shared = {p.data_ptr() for p in twin.projector.parameters()} & {p.data_ptr() for p in made.projector.parameters()}
    assert not shared


def test_a_wrapper_is_called_in_the_projectors_place():
    class Doubled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, states):
            self.calls += 1
            return [2 * s for s in self.module(states)]

    objective, given = prepared("linear_whitened"), evidence(seed=7)
    before = objective(given)
    objective.projector = wrapper = Doubled(objective.projector)
    assert objective(given) != before and wrapper.calls == 1 and objective.projector is wrapper


@pytest.mark.parametrize("name", ["linear", "orthogonal_whitened"])
def test_making_a_projector_leaves_the_generator_alone(name):
    objective = dataclasses.replace(FEATURES[name])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    objective.prepare([evidence(seed=seed) for seed in range(3)])
    made = objective.projector.state_dict()
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(4)  # the training's seed decides where it starts
    objective.prepare([evidence(seed=seed) for seed in range(3)])
    assert any(
        not torch.equal(a, b) for a, b in zip(made.values(), objective.projector.state_dict().values(), strict=True)
    )


def test_objectives_with_the_same_options_train_a_projector_each():
    """A plan shared between them would leave the second one without statistics."""
    teacher, student = language_model(6, layers=4, width=36, seed=1), language_model(3)
    objectives = {n: OrthogonalProjection(normalisation="whiten") for n in ("one", "two")}
    distillation = Distillation(teacher, objectives)
    batches = [token_batch([9, 7, 8], total=9, seed=seed) for seed in range(8)]
    distillation.prepare(student, batches)
    assert distillation.calibration_batches == 8
    assert objectives["one"].projector is not objectives["two"].projector
    out = distillation(student, batches[0])
    assert out.loss.isfinite() and out.terms["one"] > 0


def test_layers_count_from_the_first_after_the_embeddings():
    """A ViT: the last pair is what both models return after their last layer, with its class token."""
    teacher, student, batch = classifier(6, layers=4, width=36, seed=1).eval(), classifier(3).eval(), image_batch(4)
    objective = HiddenStates(layers="last")
    out = Distillation(teacher, {"features": objective})(student, batch)
    with torch.no_grad():
        mine = student(batch["pixel_values"], output_hidden_states=True).hidden_states
        theirs = teacher(batch["pixel_values"], output_hidden_states=True).hidden_states
        (plan,) = objective.plan
        assert (plan.student_layer, plan.teacher_layer, plan.student_width, plan.teacher_width) == (1, 3, 24, 36)
        guess = objective.projector.maps[0](mine[2])
    assert out.terms["features"].item() == pytest.approx(nn.functional.mse_loss(guess, theirs[4]).item(), rel=1e-5)
    assert out.counts["features"] == 4  # each image has the same number of rows


def test_features_that_do_not_fit_are_named():
    objective = prepared("linear")
    short = dataclasses.replace(evidence(), teacher={"hidden_states": tuple(s[:, :9] for s in states(14, 4))})
    with pytest.raises(ValueError, match=r"student layer 0 \(3, 11, 10\) and teacher layer 2 \(3, 9, 14\)"):
        objective(short)
    with pytest.raises(ValueError, match=r"student layer 0 \(3, 11, 10\)"):
        dataclasses.replace(objective).prepare([short])
    with pytest.raises(ValueError, match=r"rows \(3, 10\)"):
        objective(dataclasses.replace(evidence(), rows=torch.ones(3, 10, dtype=torch.bool)))
    with pytest.raises(TypeError, match="student returned .* without hidden states.*output_hidden_states"):
        objective(dataclasses.replace(evidence(), student={"logits": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match="no pair"):
        HiddenStates(layers=[[0, 4]]).prepare([evidence()])
    with pytest.raises(RuntimeError, match="not prepared"):
        HiddenStates()(evidence())
    with pytest.raises(AttributeError, match="TaskLoss has no projector"):
        TaskLoss().projector = nn.Linear(1, 1)


def test_small_weights_of_rows_are_relative():
    objective, given = prepared("linear"), evidence(seed=7)
    torch.testing.assert_close(objective(dataclasses.replace(given, rows=given.rows * 1e-3)), objective(given))
