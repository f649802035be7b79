"""Schedules, and the mixing matrix against the dense float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from oracle import changed
from squeezeheads.squeezing import attention_energy, calibrate_groups, group_heads, mixing_matrix, squeezing_residual
from strategies import generator, make_record, make_rows, padded, padded_rows, teachers

WEIGHTS = ("least_squares", "joint", "values", "mean", "select")
every_weights = pytest.mark.parametrize("weights", WEIGHTS)


# ------------------------------------------------------------------------------------------------------------ schedules


def heads(text):
    """ "1-4 5-8 9" -> ((0, 1, 2, 3), (4, 5, 6, 7), (8,)): the groups as the paper counts, from 1."""
    groups = []
    for part in text.split():
        first, _, last = part.partition("-")
        groups.append(tuple(range(int(first) - 1, int(last or first))))
    return tuple(groups)


# By hand. A round merges adjacent pairs, an odd one kept; the last round only the first (count - S) of them.
PROGRESSIVE = {
    (9, 3): "1-4 5-8 9",  # 9 -> 5 -> 3
    (6, 3): "1-2 3-4 5-6",
    (12, 6): "1-2 3-4 5-6 7-8 9-10 11-12",
    (16, 6): "1-4 5-8 9-10 11-12 13-14 15-16",  # 16 -> 8, then two more merges
    (25, 12): "1-4 5-6 7-8 9-10 11-12 13-14 15-16 17-18 19-20 21-22 23-24 25",  # 25 -> 13, then one
    (25, 16): "1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16 17-18 19 20 21 22 23 24 25",  # nine merges
    (25, 20): "1-2 3-4 5-6 7-8 9-10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25",  # five
    (
        40,
        32,
    ): "1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40",
    (7, 7): "1 2 3 4 5 6 7",
    (3, 5): "1 1 2 2 3",  # the barrier falls in both directions
    (12, 1): "1-12",
    (5, 2): "1-4 5",  # 5 -> 3 -> 2
    (7, 2): "1-4 5-7",  # 7 -> 4 -> 2
    (1, 1): "1",
}
# Contiguous, sizes differ by at most 1, larger ones first.
BALANCED = {
    (9, 3): "1-3 4-6 7-9",
    (6, 3): "1-2 3-4 5-6",
    (12, 6): "1-2 3-4 5-6 7-8 9-10 11-12",
    (16, 6): "1-3 4-6 7-9 10-12 13-14 15-16",
    (25, 12): "1-3 4-5 6-7 8-9 10-11 12-13 14-15 16-17 18-19 20-21 22-23 24-25",
    (25, 16): PROGRESSIVE[25, 16],
    (25, 20): PROGRESSIVE[25, 20],
    (40, 32): PROGRESSIVE[40, 32],
    (7, 7): "1 2 3 4 5 6 7",
    (3, 5): "1 1 2 2 3",
    (5, 2): "1-3 4-5",
    (7, 2): "1-4 5-7",
}


@pytest.mark.parametrize(
    "schedule, teacher, student, expected",
    [("progressive", *pair, text) for pair, text in PROGRESSIVE.items()]
    + [("balanced", *pair, text) for pair, text in BALANCED.items()],
    ids=lambda value: None if isinstance(value, int) or value.isalpha() else "heads",
)
def test_schedules_are_pinned(schedule, teacher, student, expected):
    assert group_heads(teacher, student, schedule) == heads(expected)


def test_progressive_is_the_default_schedule():
    assert group_heads(9, 3) == heads(PROGRESSIVE[9, 3])


@pytest.mark.parametrize("schedule", ("progressive", "balanced"))
@settings(max_examples=100)
@given(teacher=st.integers(1, 70), student=st.integers(1, 70))
def test_schedules_serve_every_head(schedule, teacher, student):
    groups = group_heads(teacher, student, schedule)
    assert len(groups) == student
    used = [head for group in groups for head in group]
    if student <= teacher:
        assert used == list(range(teacher)), "every teacher head once, in order"
    else:
        assert all(len(group) == 1 for group in groups)
        assert used == sorted(used)
        counts = {used.count(head) for head in range(teacher)}
        assert counts <= {student // teacher, -(-student // teacher)}
    if schedule == "balanced":
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("teacher, student, bad", ((0, 3, 0), (4, 0, 0), (-4, 2, -4), (4, -2, -2)))
@pytest.mark.parametrize("schedule", ("progressive", "balanced"))
def test_impossible_head_counts(teacher, student, bad, schedule):
    with pytest.raises(ValueError, match=str(bad)):
        group_heads(teacher, student, schedule)


def test_unknown_options_are_named_with_the_known_ones():
    with pytest.raises(ValueError) as caught:
        group_heads(4, 2, "random")
    assert all(word in str(caught.value) for word in ("random", "progressive", "balanced"))
    with pytest.raises(ValueError) as caught:
        mixing_matrix(make_record(), ((0, 1), (2, 3)), weights="median")
    assert all(word in str(caught.value) for word in ("median", *WEIGHTS))


# -------------------------------------------------------------------------------------------------- mixture, in general


def tolerance(record):
    """The mixing matrix is float32; the sums behind it are as exact as the inputs allow."""
    return 1e-6 if record.query.dtype == torch.float64 else 1e-4


def group_of(record, mix, student_head, group):
    return mix[:, student_head, list(group)]


@every_weights
@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_convex_and_as_good_as_the_oracles(weights, data):
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
    record, rows = data.draw(teachers(dtype=dtype))
    count = record.query.shape[1]
    students = data.draw(st.integers(1, count + 2))
    groups = group_heads(count, students, data.draw(st.sampled_from(("progressive", "balanced"))))
    mix = mixing_matrix(record, groups, weights=weights, rows=rows)
    assert mix.shape == (record.query.shape[0], students, count)
    assert mix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (mix >= 0).all()
    assert torch.allclose(mix.sum(-1), torch.ones((), dtype=mix.dtype), atol=1e-6)
    reported = squeezing_residual(record, groups, mix, rows=rows)
    for head, group in enumerate(groups):
        outside = torch.ones(count, dtype=torch.bool)
        outside[list(group)] = False
        assert (mix[:, head, outside] == 0).all(), "weight outside the group"
        found = group_of(record, mix, head, group)
        expected = oracle.group_weights(record, group, weights, rows)
        energy = oracle.energy(record, group, rows)
        floor = tolerance(record) * (energy + scale_of_values(record, group, rows))
        left, best = (oracle.residual(record, group, w, rows) for w in (found, expected))
        if weights in ("least_squares", "joint", "select", "mean"):
            assert ((left - best).abs() <= 1e-5 * best + floor).all(), f"residual {left} where {best} is due"
        well_posed = oracle.conditioning(record, group, rows) > 1e-2
        if weights in ("least_squares", "values", "mean"):
            where = well_posed if weights == "least_squares" else torch.ones_like(well_posed)
            assert torch.allclose(found[where].double(), expected[where], atol=100 * tolerance(record))
        assert ((reported[:, head].double() - left).abs() <= 1e-5 * left + floor).all()


@settings(max_examples=30)
@given(drawn=teachers())
def test_energy_equals_the_oracles(drawn):
    record, rows = drawn
    expected = oracle.energy(record, list(range(record.query.shape[1])), rows)
    assert torch.allclose(attention_energy(record, rows), expected, rtol=1e-6, atol=1e-12)


def scale_of_values(record, group, rows):
    """The size of what cancels in a residual: the largest ||A_i Y||^2."""
    total = oracle.circuits(record)[:, list(group)].sum(1, keepdim=True)
    return (oracle.valid_maps(record, rows)[:, list(group)] @ total).square().sum((-1, -2)).amax(-1)


@every_weights
def test_equal_heads_give_the_identity(weights):
    record = make_record(1, heads=4)
    assert torch.equal(mixing_matrix(record, group_heads(4, 4), weights=weights), torch.eye(4).expand(2, 4, 4))


@every_weights
def test_more_student_heads_than_teacher_heads(weights):
    record = make_record(1, heads=3)
    mix = mixing_matrix(record, group_heads(3, 5), weights=weights)
    assert torch.equal(mix, torch.eye(3)[[0, 0, 1, 1, 2]].expand(2, 5, 3))


@every_weights
def test_no_gradient_flows_through_the_mixture(weights):
    record = make_record(2)
    record = changed(
        record,
        **{
            name: getattr(record, name).detach().requires_grad_() for name in ("query", "key", "value", "output_weight")
        },
    )
    mix = mixing_matrix(record, group_heads(4, 2), weights=weights)
    assert not mix.requires_grad and mix.grad_fn is None


@every_weights
def test_groups_need_not_be_contiguous(weights):
    """`similar` makes such groups: the answer is that of the same heads put side by side."""
    record = make_record(3, heads=5, dtype=torch.float64)
    order = [0, 3, 1, 2, 4]
    moved = changed(
        record,
        **{name: getattr(record, name)[:, order] for name in ("query", "key", "value")},
        output_weight=record.output_weight[order],
    )
    scattered = mixing_matrix(record, ((0, 3), (1, 2, 4)), weights=weights)
    together = mixing_matrix(moved, ((0, 1), (2, 3, 4)), weights=weights)
    assert torch.allclose(scattered[:, :, order], together, atol=1e-6)


@every_weights
@pytest.mark.parametrize("kv_heads", (1, 2, 3))
def test_grouped_query_heads_share_values_only(weights, kv_heads):
    record = make_record(4, heads=6, kv_heads=kv_heads, dtype=torch.float64)
    plain = changed(
        record,
        key=record.key.repeat_interleave(6 // kv_heads, 1),
        value=record.value.repeat_interleave(6 // kv_heads, 1),
    )
    groups = group_heads(6, 2)
    assert torch.allclose(
        mixing_matrix(record, groups, weights=weights), mixing_matrix(plain, groups, weights=weights), atol=1e-6
    )


@pytest.mark.parametrize("groups", (((0, 1), (2, 7)), ((0, 1), (2, -1)), ((0, 1), ())))
def test_groups_that_do_not_fit_the_record(groups):
    with pytest.raises(ValueError):
        mixing_matrix(make_record(), groups)


@pytest.mark.parametrize("shape", ((2, 19), (13, 7)))
def test_rows_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=str(max(shape))):
        mixing_matrix(make_record(), group_heads(4, 2), rows=torch.ones(shape))


# ----------------------------------------------------------------------------------------------------------- the alphas


@pytest.mark.parametrize("model_width", (1, 3, 16, 64, 300))
@pytest.mark.parametrize("mask", ("none", "causal", "padding_left"))
def test_alpha_by_brute_force(model_width, mask):
    """No alpha of a fine grid leaves less of || A_p X_p + A_q X_q - (a A_p + (1 - a) A_q)(X_p + X_q) ||, E formed."""
    record = make_record(5, heads=2, queries=12, model_width=model_width, mask=mask, dtype=torch.float64)
    alpha = mixing_matrix(record, ((0, 1),))[:, 0, 0].double()
    first, second = oracle.maps(record).unbind(1)
    x_p, x_q = oracle.circuits(record).unbind(1)

    def left(a):
        merged = a * first + (1 - a) * second
        return (first @ x_p + second @ x_q - merged @ (x_p + x_q)).square().sum((-1, -2))

    grid = torch.linspace(0, 1, 2001, dtype=torch.double)
    on_grid = torch.stack([left(a) for a in grid])
    best = grid[on_grid.argmin(0)]
    fitted = (first - second).abs().sum((-1, -2)) > 0  # a sample that is all padding has nothing to fit
    assert ((alpha - best).abs() <= 0.5 / 2000 + 1e-6)[fitted].all()
    assert (alpha[~fitted] == 0.5).all()
    own = left(alpha[:, None, None])
    assert (own <= on_grid.amin(0) + 1e-9 * (1 + own)).all()
    assert torch.allclose(oracle.residual(record, [0, 1], torch.stack((alpha, 1 - alpha), -1)), own)


def far_pair(seed=6):
    """Two heads whose free alpha is far outside [0, 1]: the second one's circuit is minus half the first one's."""
    record = make_record(seed, heads=2, queries=10, dtype=torch.float64)
    value = record.value.clone()
    value[:, 1] = value[:, 0]
    weight = record.output_weight.clone()
    weight[1] = -0.5 * weight[0]
    return changed(record, value=value, output_weight=weight)


@pytest.mark.parametrize("swap", (False, True))
@pytest.mark.parametrize("weights", ("least_squares", "joint", "values"))
def test_alpha_is_clipped(weights, swap):
    # X_q = -X_p / 2, so Y = X_p / 2 and the free alpha is <X_p, Y> / <Y, Y> = 2.
    record = far_pair()
    if swap:
        record = changed(
            record,
            **{name: getattr(record, name).flip(1) for name in ("query", "key", "value")},
            output_weight=record.output_weight.flip(0),
        )
    mix = mixing_matrix(record, ((0, 1),), weights=weights)
    assert torch.allclose(mix.float(), torch.tensor([0.0, 1.0] if swap else [1.0, 0.0]), atol=1e-6)
    assert (mix >= 0).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_identical_heads_share_evenly(dtype):
    # Delta = 0: any alpha is as good; one half, and no 0/0.
    record = make_record(7, heads=2, dtype=dtype)
    record = changed(record, query=record.query[:, [0, 0]], key=record.key[:, [0, 0]])
    assert (mixing_matrix(record, ((0, 1),)) == 0.5).all()
    zero = changed(record, value=torch.zeros_like(record.value))
    for weights in ("least_squares", "values"):
        assert (mixing_matrix(zero, ((0, 1),), weights=weights) == 0.5).all()
    assert torch.allclose(mixing_matrix(zero, ((0, 1),), weights="joint").sum(-1), torch.ones((), dtype=dtype))


@every_weights
def test_rows_without_any_valid_query_still_give_a_mixture(weights):
    rows = torch.tensor([[True] * 7, [False] * 7])
    mix = mixing_matrix(make_record(8), group_heads(4, 1), weights=weights, rows=rows)
    assert mix.isfinite().all() and (mix >= 0).all()
    assert torch.allclose(mix.sum(-1), torch.ones((), dtype=mix.dtype), atol=1e-6)
    if weights in ("least_squares", "mean"):
        assert torch.allclose(mix[1], torch.full((1, 4), 0.25))


def test_a_merged_head_carries_both_circuits():
    """The second round works with Y = X_p + X_q; with the mean of the two, or X_p alone, these weights are others."""
    record = make_record(9, heads=4, queries=15, dtype=torch.float64)
    assert torch.allclose(
        mixing_matrix(record, ((0, 1, 2, 3),)).double()[:, 0], oracle.rounds(record, [0, 1, 2, 3]), atol=1e-6
    )


@pytest.mark.parametrize("count", (2, 3, 5, 7, 12))
def test_joint_is_optimal(count):
    """Against an exact search where that is feasible, and by the duality gap for any size."""
    for seed in range(4):
        record = make_record(seed, heads=count, queries=20, dtype=torch.float64)
        group = list(range(count))
        weights = mixing_matrix(record, (tuple(group),), weights="joint")[:, 0]
        energy = oracle.energy(record, group)
        assert (oracle.optimality_gap(record, group, weights) <= 1e-5 * energy).all()
        if count <= 5:
            best = oracle.residual(record, group, oracle.joint(record, group))
            left = oracle.residual(record, group, weights)
            assert ((left - best).abs() <= 1e-6 * energy).all()


def test_the_oracles_two_proofs_of_optimality_agree():
    for seed in range(5):
        record = make_record(seed, heads=5, queries=20, dtype=torch.float64)
        group = list(range(5))
        energy = oracle.energy(record, group)
        assert (oracle.optimality_gap(record, group, oracle.joint(record, group)) <= 1e-9 * energy).all()
        assert (oracle.optimality_gap(record, group, oracle.mean(record, group)) > 1e-4 * energy).all()


@settings(max_examples=40)
@given(drawn=teachers())
def test_better_solvers_leave_less(drawn):
    record, rows = drawn
    count = record.query.shape[1]
    for groups in {group_heads(count, 1), group_heads(count, (count + 1) // 2)}:
        left = {
            weights: squeezing_residual(
                record, groups, mixing_matrix(record, groups, weights=weights, rows=rows), rows=rows
            )
            for weights in WEIGHTS
        }
        slack = 1e-5 * torch.stack([scale_of_values(record, group, rows) for group in groups], -1) + 1e-12
        for weights in WEIGHTS:
            assert (left["joint"] <= left[weights] + slack).all(), f"joint leaves more than {weights}"
        pairs = torch.tensor([len(group) <= 2 for group in groups])
        for weights in ("mean", "select", "values"):
            assert (left["least_squares"] <= left[weights] + slack)[:, pairs].all(), f"rounds above {weights}"
        assert torch.allclose(left["least_squares"][:, pairs], left["joint"][:, pairs], atol=float(slack.max()))


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("weights", ("least_squares", "joint", "select"))
@pytest.mark.parametrize("dtype, atol", ((torch.float64, 1e-5), (torch.float32, 2e-3)))
def test_a_value_bias_changes_nothing(weights, dtype, atol):
    record = make_record(10, heads=4, kv_heads=2, queries=15, mask="causal", dtype=dtype)
    bias = 3 * torch.randn(1, 2, 1, 8, generator=generator(1)).to(dtype)
    moved = changed(record, value=record.value + bias)
    groups = group_heads(4, 2)
    plain = mixing_matrix(record, groups, weights=weights)
    assert torch.allclose(mixing_matrix(moved, groups, weights=weights), plain, atol=atol)
    assert not torch.allclose(plain, mixing_matrix(record, groups, weights="mean"), atol=0.01), "the test has no teeth"


@every_weights
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("left, right", ((4, 0), (0, 4), (3, 2), (0, 150)))
def test_padding_changes_nothing(weights, causal, left, right):
    record = changed(make_record(11, heads=5, queries=9, dtype=torch.float64), is_causal=causal)
    groups = group_heads(5, 2)
    wide, rows = padded(record, left, right), padded_rows(record, left, right)
    for valid in (rows, rows.bool(), rows.long()):
        assert torch.allclose(
            mixing_matrix(wide, groups, weights=weights, rows=valid),
            mixing_matrix(record, groups, weights=weights),
            atol=1e-6,
        )


@pytest.mark.parametrize("weights", ("least_squares", "joint", "select"))
def test_only_valid_rows_count(weights):
    """Rows left out may hold anything, and leaving them out is not the same as keeping them."""
    record = make_record(12, heads=4, queries=20, dtype=torch.float64)
    rows = make_rows("bool", generator(2), 2, 20)
    query = torch.where(rows[:, None, :, None], record.query, 10 * record.query.flip(-1))
    groups = group_heads(4, 1)
    some = mixing_matrix(record, groups, weights=weights, rows=rows)
    other = mixing_matrix(changed(record, query=query), groups, weights=weights, rows=rows)
    assert torch.allclose(some, other, atol=1e-6)
    if weights != "select":
        assert not torch.allclose(some, mixing_matrix(record, groups, weights=weights), atol=1e-4)


@every_weights
def test_neither_autocast_nor_inference_mode_moves_the_weights(weights):
    record, groups = make_record(18, heads=6, kv_heads=3), group_heads(6, 2)
    plain = mixing_matrix(record, groups, weights=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixing_matrix(record, groups, weights=weights), plain)
    with torch.inference_mode():
        parts = ("query", "key", "value", "output_weight")
        frozen = changed(record, **{name: getattr(record, name) * 1 for name in parts})
        inside = mixing_matrix(frozen, groups, weights=weights)
    assert torch.allclose(inside, plain, atol=1e-6)
    assert torch.allclose(mixing_matrix(frozen, groups, weights=weights), plain, atol=1e-6)


def test_changed_output_weights_are_noticed():
    """The narrow stand-in of the output weights is kept between calls; an update in place must not be missed."""
    record, groups = make_record(19), group_heads(4, 2)
    before = mixing_matrix(record, groups)
    record.output_weight.mul_(torch.tensor([1.0, 4.0, 1.0, 0.2])[:, None, None])
    expected = oracle.mixing_matrix(record, groups)
    assert torch.allclose(mixing_matrix(record, groups).double(), expected, atol=1e-4)
    assert not torch.allclose(before.double(), expected, atol=1e-2), "the test has no teeth"


@every_weights
def test_samples_do_not_see_each_other(weights):
    record = make_record(13, batch=3, heads=4, queries=9, dtype=torch.float64)
    groups = group_heads(4, 2)
    whole = mixing_matrix(record, groups, weights=weights)
    for i in range(3):
        one = changed(record, **{name: getattr(record, name)[i : i + 1] for name in ("query", "key", "value")})
        assert torch.allclose(mixing_matrix(one, groups, weights=weights), whole[i : i + 1], atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("missing", ("value", "output_weight"))
@pytest.mark.parametrize("weights", ("least_squares", "joint", "values", "select"))
def test_missing_parts_are_named_with_the_way_out(missing, weights):
    record = changed(make_record(14), **{missing: None})
    with pytest.raises(ValueError) as caught:
        mixing_matrix(record, group_heads(4, 2), weights=weights)
    what = "value" if missing == "value" else "output projection"
    assert all(word in str(caught.value) for word in (what, record.name, "weights='mean'"))


@pytest.mark.parametrize("missing", ("value", "output_weight"))
def test_mean_needs_neither_values_nor_output_weights(missing):
    record = changed(make_record(15), **{missing: None})
    expected = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]).expand(2, 2, 4)
    assert torch.equal(mixing_matrix(record, group_heads(4, 2), weights="mean"), expected)


# -------------------------------------------------------------------------------------------------------------- similar


@every_weights
@pytest.mark.parametrize("count, students, masked", ((4, 2, False), (5, 3, True), (6, 2, False)))
def test_calibrated_groups_equal_a_plain_greedy_search(weights, count, students, masked):
    # Two calibration batches of a model of two layers.
    batches = [[make_record(20 + 10 * b + layer, heads=count, queries=12) for layer in range(2)] for b in range(2)]
    rows = [make_rows("bool", generator(b), 2, 12) for b in range(2)] if masked else None
    found = calibrate_groups(batches, students, weights=weights, rows=rows)
    assert len(found) == 2
    for layer, groups in enumerate(found):
        expected = oracle.similar_groups([batch[layer] for batch in batches], students, weights, rows)
        assert tuple(tuple(group) for group in groups) == expected


def planted(seed, pairs=((0, 4), (1, 3), (2, 5))):
    """Six heads; the two of a pair attend almost alike, and no pair is adjacent."""
    record = make_record(seed, heads=6, queries=16, width=8, score_scale=3.0)
    query, key = record.query.clone(), record.key.clone()
    for first, second in pairs:
        noise = 0.01 * torch.randn(2, *query.shape[2:], generator=generator(seed + second))
        query[:, second], key[:, second] = query[:, first] + noise, key[:, first]
    return changed(record, query=query, key=key)


@pytest.mark.parametrize("weights", ("least_squares", "joint", "mean"))
def test_calibration_finds_planted_pairs(weights):
    found = calibrate_groups([[planted(40)], [planted(50)]], 3, weights=weights)
    assert [tuple(map(tuple, groups)) for groups in found] == [((0, 4), (1, 3), (2, 5))]


def test_calibrated_groups_leave_less_than_adjacent_ones():
    held_out = planted(60)
    (groups,) = calibrate_groups([[planted(40)]], 3)

    def left(groups):
        return squeezing_residual(held_out, groups, mixing_matrix(held_out, groups)).sum()

    assert left(groups) < 0.01 * left(group_heads(6, 3))


@pytest.mark.parametrize("students", (4, 6))
def test_calibration_with_as_many_or_more_student_heads(students):
    (groups,) = calibrate_groups([[make_record(16)]], students)
    assert tuple(map(tuple, groups)) == group_heads(4, students)


def test_calibration_needs_a_batch():
    with pytest.raises(ValueError):
        calibrate_groups([], 2)


@pytest.mark.parametrize("students", (0, -1))
def test_calibration_refuses_impossible_head_counts(students):
    with pytest.raises(ValueError, match=str(students)):
        calibrate_groups([[make_record(17)]], students)


@pytest.mark.parametrize(
    ("shapes", "message"),
    (
        (([4, 4], [4, 4], [4, 6]), r"teacher_recordings\[2\] has 6 heads in layer 1 \('attention'\).*\[0\] has 4"),
        (([4, 6], [4, 4], [4, 4]), r"teacher_recordings\[0\] has 6 heads in layer 1 \('attention'\).*\[1\] has 4"),
        (([4, 4], [4], [4, 4]), r"teacher_recordings\[1\] holds 1 layers, where teacher_recordings\[0\] has 2"),
    ),
)
def test_calibration_names_the_recording_of_other_layers(shapes, message):
    with pytest.raises(ValueError, match=message):
        calibrate_groups([[make_record(heads=heads) for heads in shape] for shape in shapes], 2)


# ------------------------------------------------------------------------------------------------- residual's mistakes


@pytest.mark.parametrize(
    ("mix", "message"),
    (
        ("foo", "mix='foo' is unknown: expected one of least_squares, .* or a mixing matrix"),
        (
            torch.ones(2, 3, 4),
            r"mix has shape \(2, 3, 4\), expected \(B, S, T\) = \(2, 2, 4\) for 2 groups .*'attention'",
        ),
        (torch.ones(2, 2, 5), r"mix has shape \(2, 2, 5\), expected"),
        (torch.ones(1, 2, 4), r"mix has shape \(1, 2, 4\), expected"),
        (torch.ones(2, 4), r"mix has shape \(2, 4\), expected"),
        (None, "mix is None, expected"),
    ),
)
def test_residual_names_what_is_no_mix(mix, message):
    with pytest.raises(ValueError, match=message):
        squeezing_residual(make_record(), group_heads(4, 2), mix)


def test_residual_of_single_heads_refuses_unknown_weights():
    """Nothing is solved there, and still a misspelt mode must not pass."""
    with pytest.raises(ValueError, match="mix='foo'"):
        squeezing_residual(make_record(), group_heads(4, 4), "foo")
