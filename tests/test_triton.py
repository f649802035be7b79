"""The Triton kernels, in Triton's interpreter, against the dense float64 oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
import test_divergence
from oracle import changed
from squeezeheads import attention_divergence, group_heads, mixing_matrix, squeezed_attention_loss
from squeezeheads.divergence import triton as kernels
from squeezeheads.squeezing import weights as weights_module
from squeezeheads.squeezing.triton_grams import triton_difference_grams
from strategies import MASKS, cases, generator, make_case, make_record, make_rows
from test_divergence import check, run, tame

# Small, odd, and now and then more than a block of 64.
lengths = st.one_of(st.integers(1, 9), st.integers(1, 40), st.integers(60, 70))
some_cases = cases(lengths=lengths, most_heads=6)


@pytest.fixture(autouse=True, scope="module")
def frozen_masks():
    """No mask asks for a gradient: the kernels refuse learned ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_divergence, "LEAVES", ("query", "key"))
        yield


@settings(max_examples=8)
@given(case=some_cases, reduction=st.sampled_from(("mean", "sum", "none")))
def test_float32_equals_the_oracle(case, reduction):
    check_float32(case, reduction)


@pytest.mark.slow
@settings(max_examples=60)
@given(case=some_cases, reduction=st.sampled_from(("mean", "sum", "none")))
def test_float32_equals_the_oracle_on_many(case, reduction):
    check_float32(case, reduction)


def check_float32(case, reduction):
    assume(tame(case))
    incoming = None
    if reduction == "none":
        shape = (*case.mix.shape[:2], case.student.query.shape[2])
        incoming = torch.randn(shape, generator=generator(5))
    check(case, "triton", reduction, incoming)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@settings(max_examples=3)
@given(data=st.data())
def test_half_precision_equals_the_oracle(dtype, data):
    """P and Q are rounded to the inputs' format before they are multiplied with keys and queries, nothing else is."""
    check_half(dtype, data)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@settings(max_examples=20)
@given(data=st.data())
def test_half_precision_equals_the_oracle_on_many(dtype, data):
    check_half(dtype, data)


def check_half(dtype, data):
    case = data.draw(cases(dtype=dtype, lengths=lengths, most_heads=6))
    assume(tame(case))
    check(case, "triton", product_eps=torch.finfo(dtype).eps)


@pytest.mark.parametrize("queries, keys", ((1, 1), (1, 63), (63, 1), (64, 64), (65, 65), (130, 130), (63, 200)))
@pytest.mark.parametrize("mask", ("none", "causal"))
def test_odd_sizes(queries, keys, mask):
    sizes = {"queries": queries, "keys": keys, "batch": 1, "student_heads": 2, "teacher_heads": 3}
    check(make_case(student_mask=mask, teacher_mask=mask, mix="dense", **sizes), "triton")


TEACHER_MASKS = ("none", "causal", "causal_and_padding", "random_per_head", "bias_inf")
# Every mask of either side stands in the tests of every day; all pairs are slow in the interpreter.
PAIRS = [
    pytest.param(mine, theirs, marks=[pytest.mark.slow] if (i + j) % len(TEACHER_MASKS) else [])
    for i, mine in enumerate(MASKS)
    for j, theirs in enumerate(TEACHER_MASKS)
]


@pytest.mark.parametrize(("student_mask", "teacher_mask"), PAIRS)
def test_every_mask_on_both_sides(student_mask, teacher_mask):
    heads = {"student_heads": 6, "student_kv_heads": 2, "teacher_heads": 8, "teacher_kv_heads": 4}
    seed = TEACHER_MASKS.index(teacher_mask)
    case = make_case(
        seed, queries=13, keys=13, student_mask=student_mask, teacher_mask=teacher_mask, rows="float", **heads
    )
    check(case, "triton")


@pytest.mark.parametrize("block", (pytest.param(16, marks=pytest.mark.slow), 32, 128))
def test_blocks_change_nothing(block):
    case = make_case(3, queries=70, keys=70, student_mask="causal", teacher_mask="causal")
    student = test_divergence.with_leaves(case.student)
    loss = kernels.triton_divergence(student, case.teacher, case.mix, block=block)
    loss.backward()
    expected, gradients = run(case, "tiled")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(getattr(student, name).grad, gradient, atol=1e-7, rtol=1e-4)


def test_a_single_query_gets_the_gradient_that_it_asks_for():
    case = make_case(4, queries=9, keys=9)
    for name in ("query", "key"):
        alone = changed(case.student, **{name: getattr(case.student, name).clone().requires_grad_()})
        attention_divergence(alone, case.teacher, case.mix, implementation="triton").backward()
        assert torch.allclose(getattr(alone, name).grad, run(case, "tiled")[1][name], atol=1e-7, rtol=1e-4)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    """None is needed for that. What the interpreter takes the compiler may not."""
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10


# ------------------------------------------------------------------------------------------------------- the Gram pass


def dense_gram(record, group, rows=None):
    """(B, (k−1)·k, (k−1)·k) inner products of the (A_i − A_0) X_l over the rows that count."""
    maps, circuits = oracle.maps(oracle.lift(record)), oracle.circuits(oracle.lift(record))
    first, *others = group
    vectors = [(maps[:, i] - maps[:, first]) @ circuits[:, head] for i in others for head in group]  # (B, Q, E)
    weights = 1.0 if rows is None else rows.double().sqrt()[..., None]
    flat = torch.stack([(vector * weights).flatten(1) for vector in vectors], dim=1)
    return flat @ flat.transpose(1, 2)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_grams_equal_the_dense_ones(kind, dtype):
    record = make_record(5, heads=6, kv_heads=3, queries=21, keys=21, width=5, value_width=7, mask=kind, dtype=dtype)
    rows = make_rows("float", generator(3), 2, 21)
    groups = ((0, 3, 4), (1, 5))
    # Differences are rounded to the inputs' format before they are multiplied with values.
    eps = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for group, found in zip(groups, triton_difference_grams(record, groups, rows), strict=True):
        expected = dense_gram(record, group, rows)
        size = expected.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        assert found.shape == expected.shape and ((found - expected).abs() <= eps * size + 1e-9).all()


@pytest.mark.parametrize("tokens", (1, 63, 64, 65, 130))
def test_grams_of_odd_sizes(tokens):
    record = make_record(6, batch=1, heads=4, queries=tokens, mask="causal")
    for group, found in zip(((0, 1), (2, 3)), triton_difference_grams(record, ((0, 1), (2, 3)), None), strict=True):
        expected = dense_gram(record, group)
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()) + 1e-12)


def test_single_heads_have_no_differences():
    grams = triton_difference_grams(make_record(), ((0,), (1, 2), (3,)), None)
    assert [gram.shape for gram in grams] == [(2, 0, 0), (2, 2, 2), (2, 0, 0)]


@pytest.mark.parametrize("weights", ("least_squares", "joint", "select"))
@pytest.mark.parametrize("alpha_rows", (None, 9))
def test_mixing_matrices_are_the_tiled_ones(weights, alpha_rows):
    record = make_record(8, heads=5, queries=30, mask="causal")
    options = {"weights": weights, "alpha_rows": alpha_rows}
    found, expected = (
        mixing_matrix(record, group_heads(5, 2), implementation=name, **options) for name in ("triton", "tiled")
    )
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_loss_takes_the_implementation_along(monkeypatch):
    teacher, student = make_record(9, heads=4, queries=20), make_record(10, heads=2, queries=20)
    student.query.requires_grad_()
    tiled = squeezed_attention_loss([student], [teacher])
    calls, grams, launched = [], weights_module.triton_grams, kernels.triton_divergence
    monkeypatch.setattr(weights_module, "triton_grams", lambda: calls.append("grams") or grams())
    monkeypatch.setattr(kernels, "triton_divergence", lambda *args: calls.append("divergence") or launched(*args))
    assert squeezed_attention_loss([student], [teacher]).item() == tiled.item() and calls == []
    fused = squeezed_attention_loss([student], [teacher], implementation="triton")
    assert fused.item() == pytest.approx(tiled.item(), rel=1e-5)
    assert calls == ["grams", "divergence"]


def test_autocast_does_not_move_the_weights():
    record = make_record(11, heads=4, queries=20)
    record = changed(record, value=100 * record.value)
    plain = mixing_matrix(record, group_heads(4, 2), implementation="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixing_matrix(record, group_heads(4, 2), implementation="triton"), plain)


def test_small_incoming_gradients_survive_half_precision():
    case = make_case(12, queries=30, keys=30, dtype=torch.float16)
    student = test_divergence.with_leaves(case.student)
    loss = attention_divergence(student, case.teacher, case.mix, reduction="none", implementation="triton")
    loss.backward(torch.full_like(loss, 4e-6) * 2**10)
    small = student.key.grad.clone()
    student.key.grad = None
    loss = attention_divergence(student, case.teacher, case.mix, reduction="none", implementation="triton")
    loss.backward(torch.full_like(loss, 1.0))
    expected = student.key.grad.double() * 4e-6 * 2**10
    assert (small.double() - expected).norm() <= 0.01 * expected.norm()


def test_formats_may_differ_between_query_and_key():
    case = make_case(13)
    student = changed(case.student, key=case.student.key.bfloat16().float())
    mixed = changed(case.student, key=case.student.key.bfloat16())
    expected = attention_divergence(student, case.teacher, case.mix, implementation="triton")
    assert torch.equal(attention_divergence(mixed, case.teacher, case.mix, implementation="triton"), expected)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_learned_masks_are_refused():
    case = make_case(student_mask="bias")
    student = changed(case.student, attention_mask=case.student.attention_mask.requires_grad_())
    with pytest.raises(ValueError, match="makes no gradient for the attention mask of 'student.attention'"):
        attention_divergence(student, case.teacher, case.mix, implementation="triton")


def test_float64_is_refused():
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match='use "tiled" or "reference" for float64'):
        attention_divergence(case.student, case.teacher, case.mix, implementation="triton")
    with pytest.raises(ValueError, match="float64"):
        attention_divergence(
            changed(case.student, query=case.student.query.float(), key=case.student.key.float()),
            case.teacher, case.mix, implementation="triton",
        )  # fmt: skip
    with pytest.raises(ValueError, match="float64"):
        triton_difference_grams(case.teacher, group_heads(4, 2), None)


def test_a_second_derivative_is_refused():
    case = make_case()
    student = test_divergence.with_leaves(case.student)
    loss = attention_divergence(student, case.teacher, case.mix, implementation="triton")
    (gradient,) = torch.autograd.grad(loss, student.query, create_graph=True)
    with pytest.raises(RuntimeError, match="the Triton attention divergence has no second derivative"):
        gradient.sum().backward()


def test_a_processor_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    case = make_case()
    with pytest.raises(RuntimeError, match="needs a CUDA device, but 'student.attention' is on cpu"):
        attention_divergence(case.student, case.teacher, case.mix, implementation="triton")


def test_without_triton_the_error_says_what_brings_it():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, squeezeheads as sh\n"
        "r = sh.AttentionRecord('a', torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))\n"
        "sh.attention_divergence(r, r, torch.ones(1, 1, 1))\n"
        "sh.attention_divergence(r, r, torch.ones(1, 1, 1), implementation='triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: implementation=\"triton\" needs the package 'triton'" in done.stderr
