"""The divergence and its gradients against the dense float64 oracle, and what must hold whatever the numbers are."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
from oracle import changed
from squeezeheads.divergence import attention_divergence, tiled
from strategies import (
    MASKS,
    MIXES,
    ROWS,
    Case,
    cases,
    generator,
    make_case,
    make_mask,
    make_mix,
    make_record,
    padded,
    padded_rows,
)

IMPLEMENTATIONS = ("reference", "tiled")
LEAVES = ("query", "key", "attention_mask")
EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# -------------------------------------------------------------------------------------------------------------- helpers


def with_leaves(record):
    """The record with query, key and floating mask as leaves that ask for gradients, in their own format."""
    changes = {}
    for name in LEAVES:
        tensor = getattr(record, name)
        if tensor is not None and tensor.is_floating_point():
            # `detach` keeps the strides: the leaf stays as non-contiguous as the models' own queries are.
            changes[name] = tensor.detach().requires_grad_()
    return changed(record, **changes)


def gradients(record):
    return {
        name: getattr(record, name).grad for name in LEAVES if getattr(getattr(record, name), "requires_grad", False)
    }


def run(case, implementation, reduction="mean", incoming=None):
    student = with_leaves(case.student)
    loss = attention_divergence(
        student,
        case.teacher,
        case.mix,
        rows=case.rows,
        temperature=case.temperature,
        reduction=reduction,
        implementation=implementation,
    )
    loss.backward(torch.ones_like(loss) if incoming is None else incoming)
    return loss.detach(), gradients(student)


def run_oracle(case, reduction="mean", incoming=None):
    student = oracle.lift(case.student, grad=True)
    loss = oracle.divergence(student, oracle.lift(case.teacher), case.mix, case.rows, case.temperature, reduction)
    loss.backward(torch.ones_like(loss) if incoming is None else incoming.double())
    return loss.detach(), gradients(student)


def per_row_gradient(case, reduction, incoming):
    """(B, S, Q): the derivative of the loss by each row's KL."""
    support = oracle.common_support(case.student, case.teacher, case.mix)
    weight = oracle.row_weights(case.student, case.rows)[:, None]
    valid = support.any(-1) & (weight > 0)
    if reduction == "none":
        return valid * incoming.double()
    weight = weight * valid
    return weight if reduction == "sum" else weight / weight.sum().clamp_min(1e-300)


def check(case, implementation, reduction="mean", incoming=None, product_eps=0.0):
    """Value and gradients equal the oracle's to 1e-5 of their size, above the floor that float32 arithmetic leaves.

    The floor: a score of magnitude M (the sum of |terms|) is only known to eps * M, so log P and log Q are known to
    about 2 * eps * M; with sum P |log P - log Q| <= KL + 2/e this moves a row's KL by eps * (4 + M) * (2 + KL), where
    the 4 is for the rounding of exp, log and sums of numbers near 1. Likewise Q - P is known to eps * (4 + M) times
    Q + P, which matters where the two nearly cancel. With ordinary scores (M about 10) the floor is 3e-6 nats.

    Args:
        product_eps: relative rounding of P and Q before they are multiplied with keys and queries, where an
            implementation rounds them to the inputs' format.
    """
    loss, grads = run(case, implementation, reduction, incoming)
    expected, expected_grads = run_oracle(case, reduction, incoming)
    inputs = case.student.query.dtype
    exact = inputs == torch.float64
    eps, relative = (EPS64, 1e-12) if exact else (EPS32, 1e-5)
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert loss.shape == expected.shape

    size = max(oracle.score_magnitude(r, case.temperature) for r in (case.student, case.teacher))
    noise = eps * (4 + size)
    each, _ = run_oracle(case, "none")
    per_row = per_row_gradient(case, reduction, incoming)
    floor = noise * (2 + each)
    if reduction != "none":
        floor = (floor * per_row).sum()
    error = (loss.double() - expected).abs()
    assert (error <= relative * expected.abs() + floor).all(), (
        f"value off by {error.max():.3e} at {expected.abs().max():.3e}"
    )

    assert grads.keys() == expected_grads.keys()
    magnitudes = oracle.gradient_magnitudes(case.student, case.teacher, case.mix, per_row, case.temperature)
    # Probabilities below the smallest normal number are known to that number alone.
    smallest = torch.finfo(torch.float64 if exact else torch.float32).tiny
    lost = smallest * (1 + max(t.double().abs().sum() for t in (case.student.query, case.student.key)))
    for name, grad in grads.items():
        wanted = expected_grads[name]
        assert grad is not None, f"no gradient for {name}"
        assert grad.dtype == inputs and grad.shape == wanted.shape
        allowance = relative * wanted.abs().max() + (2 * noise + product_eps) * magnitudes[name] + lost
        if inputs in (torch.float16, torch.bfloat16):
            # Arithmetic is float32; the result is then rounded once to the inputs' format: half an ulp, or one
            # subnormal step.
            info = torch.finfo(inputs)
            allowance = allowance + info.eps / 2 * (wanted.abs() + allowance) + info.smallest_normal * info.eps
        error = (grad.double() - wanted).abs()
        assert (error <= allowance).all(), f"{name}: off by {error.max():.3e} at {wanted.abs().max():.3e}"


def tame(case):
    """The teacher leaves enough on the common support of every row for float32 to renormalise it."""
    _, support, mass = oracle.squeezed_rows(case.student, case.teacher, case.mix, case.temperature)
    return bool((mass[support.any(-1)] > 1e-30).all())


# ------------------------------------------------------------------------------------------------ anchors of the oracle


def by_hand():
    """One head, one row, two keys: P = (1/2, 1/2), Q = (1/4, 3/4)."""
    student = make_record(batch=1, heads=1, queries=1, keys=2, width=1, scale=1.0)
    teacher = make_record(batch=1, heads=1, queries=1, keys=2, width=1, scale=1.0)
    one = torch.ones(1, 1, 1, 1)
    student = changed(student, query=one, key=torch.tensor([1.0, 3.0]).log()[None, None, :, None])
    teacher = changed(teacher, query=one, key=torch.zeros(1, 1, 2, 1))
    return Case(student, teacher, torch.ones(1, 1, 1), None)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "auto", "oracle"))
def test_a_row_worked_out_by_hand(implementation):
    # KL = 1/2 log 2 + 1/2 log(2/3); Q - P = (-1/4, 1/4), so d/dkey = that and d/dquery = 1/4 log 3.
    loss, grads = run_oracle(by_hand()) if implementation == "oracle" else run(by_hand(), implementation)
    assert loss.item() == pytest.approx(0.14384103622589045, rel=1e-6)
    assert grads["key"].flatten().tolist() == pytest.approx([-0.25, 0.25], rel=1e-6)
    assert grads["query"].item() == pytest.approx(0.27465307216702745, rel=1e-6)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_maps_equal_the_oracle(kind, temperature):
    record = make_record(3, heads=6, kv_heads=2, queries=9, keys=11, mask=kind)
    found, expected = record.maps(temperature=temperature), oracle.maps(oracle.lift(record), temperature)
    assert torch.allclose(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert (found[~oracle.allowed(record)] == 0).all(), "a forbidden key must weigh exactly 0"


# --------------------------------------------------------------------------------------------------- against the oracle


@both
@settings(max_examples=120)
@given(case=cases(), reduction=st.sampled_from(("mean", "mean", "sum", "none")))
def test_float32_equals_the_oracle(implementation, case, reduction):
    assume(tame(case))
    incoming = None
    if reduction == "none":
        incoming = torch.randn(
            case.mix.shape[0], case.mix.shape[1], case.student.query.shape[2], generator=generator(5)
        )
    check(case, implementation, reduction, incoming)


@both
@settings(max_examples=25)
@given(case=cases(dtype=torch.float64))
def test_float64_equals_the_oracle(implementation, case):
    assume(tame(case))
    check(case, implementation)


@both
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@settings(max_examples=30)
@given(data=st.data())
def test_half_precision_inputs_equal_the_oracle(implementation, dtype, data):
    # The oracle sees the same rounded inputs, so all that may differ is float32 arithmetic and the rounding of the
    # gradients to the inputs' format.
    case = data.draw(cases(dtype=dtype))
    assume(tame(case))
    check(case, implementation)


@both
@settings(max_examples=30)
@given(case=cases(score_scales=(1.0, 30.0, 1000.0)))
def test_extreme_scores(implementation, case):
    loss, grads = run(case, implementation)
    assert loss.isfinite() and loss >= -1e-6
    assert all(grad.isfinite().all() for grad in grads.values())
    if tame(case):
        check(case, implementation)


@both
@pytest.mark.parametrize("queries, keys", ((1, 1), (1, 63), (63, 1), (63, 63), (63, 1000), (1000, 63), (1000, 1000)))
def test_odd_sizes(implementation, queries, keys):
    check(
        make_case(
            queries=queries,
            keys=keys,
            batch=1,
            student_heads=2,
            teacher_heads=3,
            student_mask="causal" if queries == keys else "none",
            teacher_mask="none",
            mix="dense",
        ),
        implementation,
    )


@both
@pytest.mark.parametrize("student_mask", MASKS)
def test_every_mask_of_the_student(implementation, student_mask):
    # Hypothesis draws these too; here each is sure to have been run, on both sides, with grouped heads.
    case = make_case(
        7,
        queries=13,
        keys=13,
        student_heads=6,
        student_kv_heads=2,
        teacher_heads=8,
        teacher_kv_heads=4,
        student_mask=student_mask,
    )
    check(case, implementation)
    other = make_case(
        8,
        queries=13,
        keys=13,
        student_heads=6,
        student_kv_heads=3,
        teacher_heads=8,
        teacher_mask=student_mask,
        mix="some_zero",
    )
    check(other, implementation)


@both
@pytest.mark.parametrize(
    "shape",
    ((7,), (1, 7), (7, 1), (7, 7), (4, 7, 7), (2, 1, 1, 7), (1, 4, 1, 7), (2, 4, 7, 1), (1, 1, 1, 1), (2, 4, 7, 7)),
)
def test_every_shape_of_a_learned_bias(implementation, shape):
    # Its gradient is summed over the dimensions along which it was broadcast.
    case = make_case(36, student_heads=4, student_kv_heads=2, teacher_heads=4, teacher_mask="causal", rows="float")
    bias = torch.randn(shape, generator=generator(6))
    check(changed(case, student=changed(case.student, attention_mask=bias, is_causal=True)), implementation)


@both
@pytest.mark.parametrize("student", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("teacher", (torch.float32, torch.bfloat16, torch.float16))
def test_models_in_different_formats(implementation, student, teacher):
    # One key/value head a query head: the reference sums shared ones in the inputs' format.
    parts = [make_case(37, dtype=dtype, student_mask="bias", teacher_mask="bias_inf") for dtype in (student, teacher)]
    check(changed(parts[0], teacher=parts[1].teacher), implementation)


@both
def test_a_double_precision_student_of_a_single_precision_teacher(implementation):
    parts = [make_case(38, dtype=dtype, student_heads=1, teacher_heads=2) for dtype in (torch.float64, torch.float32)]
    case = changed(parts[0], teacher=parts[1].teacher)
    loss, grads = run(case, implementation)
    expected, expected_grads = run_oracle(case)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # the teacher's maps are float32's
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= 1e-5 * expected_grads[name].abs().max(), name


@both
@pytest.mark.parametrize("share", (1e-9, 1e-3, 0.05, 0.07, 0.5))
@pytest.mark.parametrize("last", (False, True), ids=("first", "last"))
def test_two_heads_of_unequal_share(implementation, share, last):
    """However small a share: where the other head sees nothing, it alone is the teacher."""
    shares = torch.tensor([1 - share, share] if last else [share, 1 - share])
    case = make_case(39, batch=1, queries=6, keys=6, student_heads=1, teacher_heads=2)
    mask = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    mask[:, 0 if last else 1, ::2] = False
    case = changed(case, mix=shares[None, None], teacher=changed(case.teacher, attention_mask=mask))
    check(case, implementation)


@both
@pytest.mark.parametrize("teachers", (2, 3))
def test_shares_in_half_precision(implementation, teachers):
    """They are taken relative to their sum as they are, not as half precision rounds the quotient."""
    mix = torch.tensor([0.1, 0.9, 0.3])[:teachers].bfloat16()
    case = changed(make_case(40, student_heads=1, teacher_heads=teachers), mix=mix.expand(2, 1, -1))
    lifted = mix.double() / mix.double().sum()
    loss, _ = run(case, implementation)
    expected, _ = run_oracle(changed(case, mix=lifted.expand(2, 1, -1)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@both
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("students, teachers", ((2, 6), (6, 2), (3, 3), (1, 12), (12, 1)))
def test_every_mixture(implementation, mix, students, teachers):
    check(make_case(9, student_heads=students, teacher_heads=teachers, mix=mix, student_mask="causal"), implementation)


@both
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_every_kind_of_rows(implementation, rows, reduction):
    case = make_case(10, queries=11, keys=11, rows=rows, student_mask="random_bool")
    incoming = torch.randn(2, 2, 11, generator=generator(1)) if reduction == "none" else None
    check(case, implementation, reduction, incoming)


def test_reductions_agree_with_each_other():
    case = make_case(11, queries=11, keys=11, rows="float", student_mask="padding_left")
    each, total, mean = (run(case, "tiled", reduction)[0] for reduction in ("none", "sum", "mean"))
    weight = case.rows[:, None].double() * oracle.common_support(case.student, case.teacher, case.mix).any(-1)
    assert each.shape == (2, 2, 11)
    assert total.item() == pytest.approx((weight * each).sum().item(), rel=1e-5)
    assert mean.item() == pytest.approx(total.item() / weight.sum().item(), rel=1e-5)
    assert (each[weight == 0] == 0).all()
    # Unweighted: only whether the weight is above 0 matters.
    doubled = changed(case, rows=case.rows * 2)
    assert torch.equal(run(doubled, "tiled", "none")[0], each)
    assert run(doubled, "tiled", "mean")[0].item() == pytest.approx(mean.item(), rel=1e-6)


@both
@pytest.mark.parametrize("student_mask", ("none", "causal", "bias_per_head", "random_bool"))
def test_gradcheck(implementation, student_mask):
    case = make_case(
        12,
        batch=1,
        queries=3,
        keys=4,
        student_heads=4,
        student_kv_heads=2,
        student_width=2,
        teacher_heads=6,
        teacher_kv_heads=3,
        student_mask=student_mask,
        teacher_mask="causal",
        rows="float",
        mix="dense",
        temperature=1.7,
        dtype=torch.float64,
    )
    student = with_leaves(case.student)
    inputs = [getattr(student, name) for name in LEAVES if getattr(getattr(student, name), "requires_grad", False)]

    for reduction in ("mean", "none"):

        def loss(query, key, mask=student.attention_mask, reduction=reduction):
            return attention_divergence(
                changed(student, query=query, key=key, attention_mask=mask),
                case.teacher,
                case.mix,
                rows=case.rows,
                temperature=case.temperature,
                reduction=reduction,
                implementation=implementation,
            )

        assert torch.autograd.gradcheck(loss, inputs)


# ------------------------------------------------------------------------------------------------------------- autograd


@both
def test_inside_a_larger_graph(implementation):
    """Queries come out of a layer, and the loss is scaled and added to others: the incoming gradient is not 1."""

    def total(function, weight, record, teacher, case):
        query = record.query.to(weight.dtype) @ weight
        loss = function(changed(record, query=query), teacher)
        return (loss * 3.7) ** 2 + query.square().mean()

    case = make_case(13, student_mask="causal", dtype=torch.float64)
    weight = torch.randn(5, 5, generator=generator(2), dtype=torch.float64)
    grads = []
    for function in (
        lambda s, t: attention_divergence(s, t, case.mix, implementation=implementation),
        lambda s, t: oracle.divergence(s, t, case.mix),
    ):
        leaf = weight.clone().requires_grad_()
        total(function, leaf, case.student, case.teacher, case).backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-12)


@both
def test_backward_twice_through_a_kept_graph(implementation):
    # Gradients made in the forward pass must not be scaled in place.
    case = make_case(14)
    student = with_leaves(case.student)
    loss = attention_divergence(student, case.teacher, case.mix, implementation=implementation)
    first = torch.autograd.grad(loss * 2, (student.query, student.key), retain_graph=True)
    again = torch.autograd.grad(loss * 2, (student.query, student.key))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("nonlinear", (False, True))
def test_double_backward_is_refused(reduction, nonlinear):
    """A penalty on the gradient must not be treated as a constant without a word."""
    case = make_case(15)
    student = with_leaves(case.student)
    loss = attention_divergence(student, case.teacher, case.mix, reduction=reduction, implementation="tiled").sum()
    with pytest.raises(RuntimeError, match="(?i)(twice|double|second)"):
        (grad,) = torch.autograd.grad(loss**2 if nonlinear else loss, student.query, create_graph=True)
        (student.query.square().sum() + grad.square().sum()).backward()


@both
def test_only_the_student_gets_gradients(implementation):
    case = make_case(16, student_mask="bias", teacher_mask="bias")
    student, teacher, mix = with_leaves(case.student), with_leaves(case.teacher), case.mix.clone().requires_grad_()
    attention_divergence(student, teacher, mix, implementation=implementation).backward()
    assert all(grad.abs().sum() > 0 for grad in gradients(student).values())
    assert all(grad is None for grad in gradients(teacher).values())
    assert mix.grad is None


@both
@pytest.mark.parametrize("leaf", LEAVES)
def test_only_what_asks_for_a_gradient_gets_one(implementation, leaf):
    case = make_case(17, student_mask="bias")
    expected = run(case, implementation)[1][leaf]
    tensor = getattr(case.student, leaf).detach().clone().requires_grad_()
    student = changed(case.student, **{leaf: tensor})
    attention_divergence(student, case.teacher, case.mix, implementation=implementation).backward()
    assert torch.allclose(tensor.grad, expected, rtol=1e-5, atol=1e-7)


@both
def test_nothing_asks_for_a_gradient(implementation):
    case = make_case(18)
    loss = attention_divergence(case.student, case.teacher, case.mix, implementation=implementation)
    assert not loss.requires_grad
    with torch.no_grad():
        student = with_leaves(case.student)
        silent = attention_divergence(student, case.teacher, case.mix, implementation=implementation)
    assert not silent.requires_grad
    assert silent.item() == loss.item() == pytest.approx(run_oracle(case)[0].item(), rel=1e-5)


@both
def test_inputs_are_left_as_they_were(implementation):
    case = make_case(19, student_mask="bias_inf", teacher_mask="additive_min", rows="float", mix="dense")
    kept = {
        (side, name): getattr(getattr(case, side), name).clone() for side in ("student", "teacher") for name in LEAVES
    }
    mix, rows = case.mix.clone(), case.rows.clone()
    run(case, implementation)
    for (side, name), before in kept.items():
        assert torch.equal(getattr(getattr(case, side), name), before), f"{side} {name} was written to"
    assert torch.equal(case.mix, mix) and torch.equal(case.rows, rows)


@both
def test_a_teacher_recorded_in_inference_mode(implementation):
    case = make_case(38, student_mask="causal")
    with torch.inference_mode():
        teacher = changed(case.teacher, query=case.teacher.query * 1, key=case.teacher.key * 1)
        mix = case.mix * 1
    loss, grads = run(changed(case, teacher=teacher, mix=mix), implementation)
    expected, expected_grads = run(case, implementation)
    assert loss.item() == expected.item() and torch.equal(grads["key"], expected_grads["key"])


@both
def test_loss_scaling_saves_small_half_precision_gradients(implementation):
    """Most of these gradients are below the smallest float16; scaled by 2^16, as GradScaler does, none is lost."""
    case = make_case(39, queries=300, keys=300, dtype=torch.float16)
    _, grads = run(case, implementation, incoming=torch.tensor(65536.0))
    _, expected = run_oracle(case)
    for name, grad in grads.items():
        wanted = expected[name] * 65536
        assert ((grad.double() - wanted).abs() <= 1e-3 * wanted.abs() + 1e-5 * wanted.abs().max()).all()


@both
def test_autocast_does_not_lower_the_arithmetic(implementation):
    case = make_case(20, queries=40, keys=40, student_mask="causal")
    plain, plain_grads = run(case, implementation)
    student = with_leaves(case.student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_divergence(student, case.teacher, case.mix, implementation=implementation)
    loss.backward()  # outside, as torch asks for
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, grad in gradients(student).items():
        assert torch.allclose(grad, plain_grads[name], rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------- masks and empty rows


@both
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_older_mask_value_forbids_in_every_format(implementation, dtype):
    # -10000 rounds to -9984 in bfloat16.
    case = make_case(35, queries=6, keys=6, dtype=dtype)
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[:, 4:] = -1e4
    case = changed(case, student=changed(case.student, attention_mask=mask))
    hidden = changed(case, student=changed(case.student, attention_mask=mask == 0))
    loss, grads = run(case, implementation)
    expected, expected_grads = run(hidden, implementation)
    assert loss.item() == expected.item()
    assert torch.equal(grads["key"], expected_grads["key"])
    assert (grads["attention_mask"][:, 4:] == 0).all()


@both
@pytest.mark.parametrize("value", (-torch.inf, torch.finfo(torch.float32).min, -1e4, False))
def test_fully_masked_rows_are_left_out(implementation, value):
    """Rows 1 and 3 may attend to nothing: the rest is what the loss would be without them."""
    case = make_case(21, queries=6, keys=6, dtype=torch.float32)
    mask = torch.ones(6, 6, dtype=torch.bool) if value is False else torch.zeros(6, 6)
    mask[[1, 3]] = value
    student = changed(case.student, attention_mask=mask)
    loss, grads = run(changed(case, student=student), implementation)
    keep = [0, 2, 4, 5]
    without = changed(
        case,
        student=changed(case.student, query=case.student.query[:, :, keep]),
        teacher=changed(case.teacher, query=case.teacher.query[:, :, keep]),
    )
    expected, expected_grads = run_oracle(without)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["query"][:, :, [1, 3]] == 0).all()
    assert torch.allclose(grads["query"][:, :, keep].double(), expected_grads["query"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(grads["key"].double(), expected_grads["key"], rtol=1e-5, atol=1e-7)


@both
def test_a_large_finite_bias_is_not_a_mask(implementation):
    # ALiBi reaches thousands on long inputs: above -1e4 an entry is a score.
    case = make_case(22, queries=5, keys=5)
    mask = torch.zeros(5, 5)
    mask[0] = -9000.0  # a whole row: softmax does not notice, so the row must stay valid
    check(changed(case, student=changed(case.student, attention_mask=mask)), implementation)
    expected, _ = run_oracle(case)
    loss, _ = run(changed(case, student=changed(case.student, attention_mask=mask)), implementation)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


@both
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("reason", ("rows", "student", "teacher", "disjoint"))
def test_no_valid_row_gives_zero_and_zero_gradients(implementation, reduction, reason):
    case = make_case(23, queries=6, keys=6)
    nothing, left = torch.zeros(6, 6, dtype=torch.bool), torch.arange(6).expand(6, 6) < 3
    if reason == "rows":
        case = changed(case, rows=torch.zeros(2, 6, dtype=torch.bool))
    student_mask = {"student": nothing, "disjoint": left}.get(reason)
    teacher_mask = {"teacher": nothing, "disjoint": ~left}.get(reason)
    case = changed(
        case,
        student=changed(case.student, attention_mask=student_mask),
        teacher=changed(case.teacher, attention_mask=teacher_mask),
    )
    loss, grads = run(case, implementation, reduction)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in grads.values())


@both
def test_both_supports_count(implementation):
    """A causal student of a windowed teacher: the loss is that of two models which both have both masks."""
    case = make_case(24, queries=9, keys=9, student_mask="causal", teacher_mask="none")
    window = (torch.arange(9)[:, None] - torch.arange(9)).abs() <= 2
    case = changed(case, teacher=changed(case.teacher, attention_mask=window))
    check(case, implementation)
    shared = changed(
        case,
        student=changed(case.student, attention_mask=window),
        teacher=changed(case.teacher, is_causal=True),
        # A mixture of one head each: with several, renormalising before and after mixing differ.
        mix=make_mix("one_hot", generator(3), 2, 2, 4),
    )
    one_hot = changed(case, mix=shared.mix)
    assert run(one_hot, implementation)[0].item() == pytest.approx(run_oracle(shared)[0].item(), rel=1e-5)


@both
def test_only_the_teacher_heads_that_serve_a_student_head_limit_it(implementation):
    case = make_case(25, batch=1, queries=4, keys=4, student_heads=2, teacher_heads=2)
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask[:, 1] = False  # the second teacher head sees nothing
    case = changed(case, teacher=changed(case.teacher, attention_mask=mask), mix=torch.eye(2)[None])
    each, _ = run(case, implementation, "none")
    assert (each[:, 0] > 0).all() and (each[:, 1] == 0).all()
    check(case, implementation)


@both
def test_one_key_leaves_nothing_to_learn(implementation):
    loss, grads = run(make_case(26, queries=5, keys=1), implementation)
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert all(grad.abs().max() <= 1e-7 for grad in grads.values())


@both
def test_a_student_that_is_the_teacher_has_no_loss(implementation):
    case = make_case(27, queries=20, keys=20, student_heads=4, teacher_heads=4, teacher_mask="causal")
    case = changed(case, student=case.teacher, mix=torch.eye(4).expand(2, 4, 4))
    loss, grads = run(case, implementation)
    assert abs(loss.item()) <= 1e-6
    assert all(grad.abs().max() <= 1e-6 for grad in grads.values())


# ---------------------------------------------------------------------------------------------------------- invariances


@both
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("left, right", ((4, 0), (0, 4), (3, 2), (0, 70)))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_padding_changes_nothing(implementation, causal, left, right, reduction):
    case = make_case(28, queries=9, keys=9, dtype=torch.float64, rows="float")
    student, teacher = (changed(r, is_causal=causal) for r in (case.student, case.teacher))
    case = changed(case, student=student, teacher=teacher)
    wide = changed(
        case,
        student=padded(student, left, right),
        teacher=padded(teacher, left, right),
        rows=padded_rows(student, left, right, case.rows),
    )
    loss, grads = run(case, implementation, reduction)
    wide_loss, wide_grads = run(wide, implementation, reduction)
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for name in ("query", "key"):
        inner = wide_grads[name][:, :, left : left + 9]
        assert torch.allclose(inner, grads[name], rtol=1e-10, atol=1e-14)
        assert wide_grads[name].abs().sum() == pytest.approx(inner.abs().sum().item(), rel=1e-12), "gradient on padding"


@both
def test_a_batch_is_the_sum_of_its_samples(implementation):
    case = make_case(29, batch=3, queries=9, keys=9, student_mask="padding_left", teacher_mask="bias_inf", rows="float")
    whole, grads = run(case, implementation, "sum")

    def sample(record, i):
        mask = record.attention_mask
        return changed(
            record,
            **{name: getattr(record, name)[i : i + 1] for name in ("query", "key", "value")},
            attention_mask=mask[i : i + 1] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask,
        )

    parts = [
        run(
            Case(sample(case.student, i), sample(case.teacher, i), case.mix[i : i + 1], case.rows[i : i + 1]),
            implementation,
            "sum",
        )
        for i in range(3)
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(torch.cat([g["query"] for _, g in parts]), grads["query"], rtol=1e-5, atol=1e-7)


@settings(max_examples=40)
@given(
    case=cases(dtype=torch.float64),
    reduction=st.sampled_from(("mean", "sum", "none")),
    tile_bytes=st.sampled_from((1, 1000, 30_000, 1_000_000)),
)
def test_tile_size_changes_nothing(case, reduction, tile_bytes):
    assume(tame(case))

    def with_tiles(size):
        student = with_leaves(case.student)
        loss = tiled.tiled_divergence(
            student, case.teacher, case.mix, case.rows, case.temperature, reduction, tile_bytes=size
        )
        loss.sum().backward()
        return loss.detach(), gradients(student)

    (loss, grads), (whole_loss, whole_grads) = with_tiles(tile_bytes), with_tiles(2**31)
    assert torch.allclose(loss, whole_loss, rtol=1e-11, atol=1e-12)
    for name, grad in grads.items():
        assert torch.allclose(grad, whole_grads[name], rtol=1e-10, atol=1e-12 * (1 + whole_grads[name].abs().max()))


@settings(max_examples=40)
@given(case=cases(dtype=torch.float64), tile_bytes=st.sampled_from((1, 30_000, 2**31)))
def test_all_heads_in_one_block(case, tile_bytes):
    """Where reading `mix` would make a device wait, all heads share a block: tested here without such a device."""
    assume(tame(case))

    def one_block(problem):
        students, teachers = problem.mix.shape[1:]
        return [(list(range(students)), list(range(teachers)))]

    student = with_leaves(case.student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_head_blocks", one_block)
        loss = tiled.tiled_divergence(
            student, case.teacher, case.mix, case.rows, case.temperature, "mean", tile_bytes=tile_bytes
        )
        loss.backward()
    expected, expected_grads = run_oracle(case)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-12)
    for name, grad in gradients(student).items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-9, atol=1e-12 * (1 + grad.abs().max()))


@pytest.mark.parametrize("permuted", ("student", "teacher"))
def test_the_order_of_heads_only_matters_through_the_mixture(permuted):
    case = make_case(30, student_heads=3, teacher_heads=5, mix="dense", student_mask="bias_per_head")
    order = torch.tensor([2, 0, 1]) if permuted == "student" else torch.tensor([3, 1, 4, 0, 2])
    record = getattr(case, permuted)
    mask = record.attention_mask
    moved = changed(
        record,
        query=record.query[:, order],
        key=record.key[:, order],
        attention_mask=None if mask is None else mask[:, order],
    )
    mix = case.mix[:, order] if permuted == "student" else case.mix[:, :, order]
    assert run(changed(case, **{permuted: moved}, mix=mix), "tiled")[0].item() == pytest.approx(
        run(case, "tiled")[0].item(), rel=1e-6
    )


def test_auto_is_one_of_the_implementations():
    case = make_case(31, student_mask="causal")
    assert run(case, "auto")[0].item() == pytest.approx(run_oracle(case)[0].item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- mistakes


def names(*words):
    """A pattern that finds each of the words, in any order, as words of their own."""
    return "(?s)" + "".join(rf"(?=.*(?<![\w.]){re.escape(str(word))}(?![\w]))" for word in words)


@both
@pytest.mark.parametrize(
    "student, teacher, mix, found",
    (
        ({"batch": 11}, {"batch": 13}, (11, 2, 4), (11, 13)),
        ({"queries": 17}, {"queries": 19}, (2, 2, 4), (17, 19)),
        ({"keys": 17}, {"keys": 19}, (2, 2, 4), (17, 19)),
        ({"queries": 17, "keys": 17}, {"queries": 19, "keys": 19}, (2, 2, 4), (17, 19)),
        ({}, {}, (13, 2, 4), (13, 2)),
        ({"heads": 2}, {"heads": 4}, (2, 11, 4), (11, 2)),
        ({"heads": 2}, {"heads": 4}, (2, 2, 11), (11, 4)),
        ({"heads": 2}, {"heads": 4}, (2, 4), (2, 4)),
    ),
    ids=("batch", "queries", "keys", "tokens", "mix batch", "mix student heads", "mix teacher heads", "mix dimensions"),
)
def test_shapes_that_do_not_fit(implementation, student, teacher, mix, found):
    student = make_record(**{"heads": 2, "queries": 5, "keys": 6, **student})
    teacher = make_record(**{"heads": 4, "queries": 5, "keys": 6, **teacher})
    with pytest.raises(ValueError, match=names(*found)):
        attention_divergence(student, teacher, torch.ones(mix), implementation=implementation)


@both
@pytest.mark.parametrize("shape", ((2, 19), (13, 7), (7,), (2, 7, 1)))
def test_rows_that_do_not_fit(implementation, shape):
    case = make_case(32)
    with pytest.raises(ValueError, match=names(shape[-1] if shape == (2, 19) else shape[0])):
        attention_divergence(
            case.student, case.teacher, case.mix, rows=torch.ones(shape), implementation=implementation
        )


@pytest.mark.parametrize(
    "argument, options",
    (("implementation", ("auto", "reference", "tiled")), ("reduction", ("mean", "sum", "none"))),
)
def test_unknown_options_are_named_with_the_known_ones(argument, options):
    case = make_case(33)
    with pytest.raises(ValueError) as caught:
        attention_divergence(case.student, case.teacher, case.mix, **{argument: "median"})
    assert all(word in str(caught.value) for word in ("median", *options))


@both
@pytest.mark.parametrize("temperature", (0.0, -1.0, float("nan")))
def test_impossible_temperatures(implementation, temperature):
    case = make_case(34)
    with pytest.raises(ValueError, match="temperature"):
        attention_divergence(
            case.student, case.teacher, case.mix, temperature=temperature, implementation=implementation
        )


def test_every_mask_kind_of_the_strategies_is_what_it_says():
    """The strategies are part of the argument: a kind that never masked anything would prove nothing."""
    for kind in MASKS:
        mask, is_causal = make_mask(kind, generator(4), 3, 4, 30, 30)
        record = changed(make_record(batch=3, heads=4, queries=30), attention_mask=mask, is_causal=is_causal)
        may = oracle.allowed(record)
        if kind in ("none", "bias", "bias_per_head"):
            assert may.all()
        else:
            assert may.any() and not may.all()


@both
def test_an_empty_batch_gives_nothing(implementation):
    case = make_case()
    student, teacher = (
        changed(record, query=record.query[:0], key=record.key[:0], value=record.value[:0])
        for record in (case.student, case.teacher)
    )
    assert attention_divergence(student, teacher, case.mix[:0], implementation=implementation).item() == 0
