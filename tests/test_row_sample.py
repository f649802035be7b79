"""α from a sample of rows: which rows are drawn, what they look like, and what the estimate is worth."""

import pytest
import torch

import oracle
from oracle import changed
from squeezeheads import group_heads, mixing_matrix, squeezed_attention_loss
from squeezeheads.objectives import SqueezedHeads
from squeezeheads.squeezing.residuals import difference_grams
from squeezeheads.squeezing.row_sample import sample_rows
from strategies import MASKS, generator, make_record, make_rows, padded, padded_rows

FROM_MAPS = ("least_squares", "joint", "select")
every_map_weights = pytest.mark.parametrize("weights", FROM_MAPS)


def places(record, sampled):
    """(B, r): which rows of the record the sampled ones are, by their queries."""
    same = (sampled.query[:, 0, :, None] == record.query[:, 0, None]).all(-1)
    assert (same.sum(-1) == 1).all(), "a row that the record does not have, or has twice"
    return same.long().argmax(-1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("rows", ("none", "bool", "float"))
def test_drawn_rows_are_rows_of_the_record(kind, rows):
    record = make_record(3, batch=3, heads=6, kv_heads=2, queries=23, keys=23, mask=kind)
    rows = make_rows(rows, generator(1), 3, 23)
    sampled, weights = sample_rows(record, rows, 9)
    where, drawn = places(record, sampled), weights > 0
    assert sampled.query.shape == (3, 6, 9, 8) and weights.shape == (3, 9)
    given = torch.ones(3, 23) if rows is None else rows.float()
    for sample in range(3):
        found = where[sample][drawn[sample]]
        available = int((given[sample] > 0).sum())
        assert len(set(found.tolist())) == len(found) == min(9, available), "drawn twice, or too few"
        share = available / min(9, available)
        assert torch.allclose(weights[sample][drawn[sample]], given[sample][found] * share)
        expected = oracle.maps(record)[sample][:, found]
        assert torch.allclose(oracle.maps(sampled)[sample][:, drawn[sample]], expected, atol=1e-12)
    assert sampled.value is record.value and sampled.key is record.key
    assert sampled.output_weight is record.output_weight


def test_more_rows_than_there_are_changes_nothing():
    record, rows = make_record(queries=7), torch.ones(2, 7)
    assert sample_rows(record, rows, 7) == (record, rows)


@pytest.mark.parametrize("mask", ("none", "causal", "causal_and_padding"))
def test_the_estimate_is_unbiased(mask):
    """The mean over seeds of the Gram matrix of the differences is the exact one, within five standard errors."""
    record = make_record(5, batch=1, heads=3, queries=11, mask=mask, dtype=torch.float64)
    rows = make_rows("float", generator(4), 1, 11)
    exact = difference_grams(record, ((0, 1, 2),), rows)[0]
    found = torch.stack([difference_grams(r, ((0, 1, 2),), w)[0] for r, w in draws(record, rows, 3, 1500)])
    error = found.std(0) / 1500**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert (found.std(0) > 0.05 * exact.abs().mean()).any(), "the test has no teeth: every draw is the same"


def draws(record, rows, count, seeds):
    return (sample_rows(record, rows, count, seed) for seed in range(seeds))


@every_map_weights
def test_all_rows_that_count_give_the_exact_weights(weights):
    record = make_record(6, heads=5, queries=30, mask="causal", dtype=torch.float64)
    rows = make_rows("float", generator(2), 2, 30)
    groups, enough = group_heads(5, 2), int((rows > 0).sum(1).max())
    assert enough < 30, "the test has no teeth"
    options = {"weights": weights, "rows": rows}
    exact = mixing_matrix(record, groups, **options)
    assert torch.allclose(mixing_matrix(record, groups, alpha_rows=enough, **options), exact, atol=1e-6)
    if weights != "select":
        assert not torch.allclose(mixing_matrix(record, groups, alpha_rows=5, **options), exact, atol=1e-4)


@every_map_weights
def test_the_draw_goes_by_its_seed_alone(weights):
    record, groups = make_record(7, heads=4, queries=40), group_heads(4, 1)
    first, again, other = (
        mixing_matrix(record, groups, weights=weights, alpha_rows=4, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    if weights != "select":
        assert not torch.allclose(first, other, atol=1e-4)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    mixing_matrix(record, groups, weights=weights, alpha_rows=4)
    assert torch.equal(torch.rand(3), expected), "the draw must not move the random numbers of the training"


def test_defaults_of_torch_do_not_move_the_draw():
    record = make_record(7, queries=40)
    plain = sample_rows(record, None, 4)[0].query
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(sample_rows(record, torch.ones(2, 40, device="cpu"), 4)[0].query, plain)
    finally:
        torch.set_default_dtype(torch.float32)


@every_map_weights
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("left, right", ((4, 0), (0, 4), (3, 50)))
def test_neither_padding_nor_the_batch_moves_the_draw(weights, causal, left, right):
    record = changed(make_record(11, batch=3, heads=5, queries=19, dtype=torch.float64), is_causal=causal)
    groups, options = group_heads(5, 2), {"weights": weights, "alpha_rows": 6}
    plain = mixing_matrix(record, groups, **options)
    wide, rows = padded(record, left, right), padded_rows(record, left, right)
    assert torch.allclose(mixing_matrix(wide, groups, rows=rows, **options), plain, atol=1e-6)
    parts = ("query", "key", "value")
    alone = [changed(record, **{name: getattr(record, name)[i : i + 1] for name in parts}) for i in range(3)]
    assert torch.allclose(torch.cat([mixing_matrix(one, groups, **options) for one in alone]), plain, atol=1e-6)


@pytest.mark.parametrize("weights", ("mean", "values"))
def test_weights_that_look_at_no_map_draw_nothing(weights):
    record, groups = make_record(8, heads=4, queries=40), group_heads(4, 2)
    plain = mixing_matrix(record, groups, weights=weights)
    assert torch.equal(mixing_matrix(record, groups, weights=weights, alpha_rows=3), plain)


def test_the_loss_takes_the_sampled_weights():
    teacher, student = make_record(9, heads=4, queries=40), make_record(10, heads=2, queries=40)
    student.query.requires_grad_()
    exact, sampled = (squeezed_attention_loss([student], [teacher], alpha_rows=rows) for rows in (None, 3))
    mix = oracle.mixing_matrix(sample_rows(teacher, None, 3)[0], group_heads(4, 2))
    expected = oracle.divergence(oracle.lift(student), oracle.lift(teacher), mix)
    assert sampled.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(sampled.item() - exact.item()) > 1e-4, "the test has no teeth"


@pytest.mark.parametrize("rows", (0, -3, 2.5, True))
def test_rows_that_cannot_be_drawn(rows):
    with pytest.raises(ValueError, match=f"alpha_rows={rows}: expected a whole number of at least 1"):
        mixing_matrix(make_record(), group_heads(4, 2), alpha_rows=rows)
    with pytest.raises(ValueError, match=f"alpha_rows={rows}: expected a whole number of at least 1"):
        SqueezedHeads(1.0, alpha_rows=rows)
