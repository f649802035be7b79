"""With which weights the heads of a group are mixed: the mixing matrix, the one interface between squeezing and
loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.extras import needs_triton
from squeezeheads.squeezing.residuals import HeadGroups, check_groups, difference_grams, value_grams
from squeezeheads.squeezing.row_sample import sample_rows

WEIGHTS = ("least_squares", "joint", "values", "mean", "select")
MAP_WEIGHTS = ("least_squares", "joint", "select")
"""Those that are found from the teacher's maps."""
_IMPLEMENTATIONS = ("auto", "tiled", "triton")


@torch.no_grad()
def mixing_matrix(
    teacher_record: AttentionRecord,
    groups: Sequence[Sequence[int]],
    *,
    weights: str = "least_squares",
    rows: Tensor | None = None,
    alpha_rows: int | None = None,
    seed: int = 0,
    implementation: str = "auto",
) -> Tensor:
    """Convex weights that squeeze the teacher's ``T`` heads into ``S``: squeezed maps are ``mix @ maps``.

    Args:
        teacher_record: one teacher layer.
        groups: the teacher heads of each student head, from ``group_heads`` or ``calibrate_groups``.
        weights: how a group's weights are found, per sample (METHOD §3):

            * ``"least_squares"``: rounds of adjacent pairs, each with the clipped closed-form α of SHD;
            * ``"joint"``: the best convex weights for the whole group at once; the one solver that makes the host wait
              for a GPU, since it stops when it is done;
            * ``"values"``: rounds with α = ⟨X_p, Y⟩ / ‖Y‖², which leaves the maps out; cost linear in ``K``;
            * ``"mean"``: 1/k each, the constant merge;
            * ``"select"``: weight 1 on the head that leaves the smallest residual, the hard choice.
        rows: (B, Q) bool or weights: the query rows that count. Pass it for padded batches: padding must not move α.
        alpha_rows: find the weights of "least_squares", "joint" and "select" from so many of each sample's rows, drawn
            evenly, in place of all of them: less time for an α that varies a little with the draw. The other modes look
            at no map and don't change. Worth it for a small share: under a causal mask half of the rows take as long as
            all.
        seed: of that draw: each call with it draws the same places.
        implementation: of the pass over the maps that those modes need: ``"tiled"``; ``"triton"``, a fused kernel for
            CUDA that no GPU has run yet; ``"auto"`` is ``"tiled"``.

    Returns:
        (B, S, T) float32 (float64 for a float64 record), no gradient; rows are non-negative and sum to 1.

    Raises:
        ValueError: unknown ``weights``, groups that do not fit, values or output projection not known where needed,
            ``alpha_rows`` that is no number from 1, unknown ``implementation``; ``"triton"`` for float64 records.
        RuntimeError: ``"triton"`` without a CUDA device.
        ImportError: ``"triton"`` where Triton is not installed.

    Source: SHD, arXiv 2502.07436 (form of the merge); METHOD §3 (solutions, carry over rounds, joint answer).
    """
    check_weights(weights)
    check_alpha_rows(alpha_rows)
    if implementation not in _IMPLEMENTATIONS:
        expected = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is unknown: expected one of {expected}.")
    groups = check_groups(groups, teacher_record.num_heads, teacher_record.name)
    if alpha_rows is not None and weights in MAP_WEIGHTS and any(len(group) > 1 for group in groups):
        teacher_record, rows = sample_rows(teacher_record, rows, alpha_rows, seed)
    batch, device = teacher_record.query.shape[0], teacher_record.query.device
    dtype = torch.float64 if teacher_record.query.dtype == torch.float64 else torch.float32
    mix = torch.zeros(batch, len(groups), teacher_record.num_heads, dtype=dtype, device=device)
    for index, solved in enumerate(_solve(teacher_record, groups, weights, rows, implementation=implementation)):
        mix[:, index, list(groups[index])] = solved.to(dtype)
    return mix


@torch.no_grad()
def squeezing_residual(
    teacher_record: AttentionRecord,
    groups: Sequence[Sequence[int]],
    mix: Tensor | str = "least_squares",
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """What squeezing loses: ``‖Σ_i A_i X_i − Σ_i w_i A_i Y‖²`` of each group, summed over counted query rows.

    Divide by ``attention_energy`` for a share of what the layer writes.

    Args:
        mix: a mixing matrix (B, S, T), or a weights mode, which costs no second pass.

    Returns:
        (B, S) float64.

    Raises:
        ValueError: unknown weights, a matrix of another shape, groups that do not fit, values or output projection not
            known.
    """
    groups = check_groups(groups, teacher_record.num_heads, teacher_record.name)
    expected = (teacher_record.query.shape[0], len(groups), teacher_record.num_heads)
    if isinstance(mix, str):
        check_weights(mix, "mix", " or a mixing matrix (B, S, T)")
    elif not isinstance(mix, Tensor) or tuple(mix.shape) != expected:
        found = f"has shape {tuple(mix.shape)}" if isinstance(mix, Tensor) else f"is {mix!r}"
        raise ValueError(
            f"mix {found}, expected (B, S, T) = {expected} for {len(groups)} groups of teacher "
            f"{teacher_record.name!r}: mixing_matrix(teacher_record, groups) makes it."
        )
    grams = difference_grams(teacher_record, groups, rows)
    if isinstance(mix, str):
        solved = _solve(teacher_record, groups, mix, rows, grams)
    else:
        solved = [mix[:, index, list(group)].double() for index, group in enumerate(groups)]
    return torch.stack([residual(gram, w) for gram, w in zip(grams, solved, strict=True)], dim=1)


def check_weights(weights: str, name: str = "weights", alternative: str = "") -> None:
    """Whether a weights mode is known.

    Raises:
        ValueError: it is not; names the argument, its value and the modes.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"{name}={weights!r} is unknown: expected one of {', '.join(WEIGHTS)}{alternative}.")


def check_alpha_rows(alpha_rows: int | None) -> None:
    """Whether so many rows can be drawn.

    Raises:
        ValueError: they cannot; names the value.
    """
    if alpha_rows is None:
        return
    if isinstance(alpha_rows, bool) or not isinstance(alpha_rows, int) or alpha_rows < 1:
        raise ValueError(
            f"alpha_rows={alpha_rows!r}: expected a whole number of at least 1, or None for an α from all rows."
        )


def _solve(
    record: AttentionRecord,
    groups: HeadGroups,
    weights: str,
    rows: Tensor | None,
    grams: list[Tensor] | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """Weights (B, k) float64 of each group."""
    batch, device = record.query.shape[0], record.query.device

    def ones(size: int) -> Tensor:
        return torch.full((batch, size), 1.0 / size, dtype=torch.float64, device=device)

    if weights == "mean" or all(len(group) == 1 for group in groups):
        return [ones(len(group)) for group in groups]
    if weights == "values":
        collected = value_grams(record, groups, rows)
        solver: Callable[[Tensor, int], Tensor] = _rounds_by_values
    else:
        collect = triton_grams() if implementation == "triton" else difference_grams
        collected = collect(record, groups, rows) if grams is None else grams
        solver = _SOLVERS[weights]
    # Groups of one size are solved together, as if they were samples of one batch.
    found = [ones(1)] * len(groups)
    for size in {len(group) for group in groups} - {1}:
        alike = [index for index, group in enumerate(groups) if len(group) == size]
        solved = solver(torch.cat([collected[index] for index in alike]), size).split(batch)
        for index, weight in zip(alike, solved, strict=True):
            found[index] = weight
    return found


def solve_gram(gram: Tensor, size: int, weights: str) -> Tensor:
    """Weights (B, k) float64 of one group of ``size`` heads, from the Gram matrix of its differences, by one of
    ``MAP_WEIGHTS``."""
    return _SOLVERS[weights](gram, size)


def triton_grams() -> Callable[..., list[Tensor]]:
    """The Gram pass as a kernel.

    Raises:
        ImportError: Triton is not installed.
    """
    with needs_triton():
        from squeezeheads.squeezing.triton_grams import triton_difference_grams
    return triton_difference_grams


def residual(gram: Tensor, weights: Tensor) -> Tensor:
    """(B,) residual of weights (B, k) by the quadratic form of ``.residuals``."""
    k = weights.shape[-1]
    coefficients = torch.eye(k, dtype=weights.dtype, device=weights.device) - weights[..., None]  # [i = l] − w_i
    c = coefficients[:, 1:].flatten(1)
    return torch.einsum("bi,bij,bj->b", c, gram, c).clamp_min(0)


# -- solvers: a Gram matrix (B, ·, ·) and k in, weights (B, k) out ---------------------------------------------------


def _merge_in_rounds(k: int, start: Tensor, alpha: Callable[[Tensor, Tensor, list[int], list[int]], Tensor]) -> Tensor:
    """Merge ``k`` heads in rounds of adjacent pairs, an odd one kept. ``alpha`` gives each merge its weight from the
    two sides' weights (B, k) and members; the merged head carries ``X_p + X_q`` on."""
    sides = [
        ([i], start.new_zeros(start.shape).index_fill_(1, torch.tensor(i, device=start.device), 1.0)) for i in range(k)
    ]
    while len(sides) > 1:
        merged = []
        for left, right in zip(sides[::2], sides[1::2], strict=False):
            a = alpha(left[1], right[1], left[0], right[0])[:, None]
            merged.append((left[0] + right[0], a * left[1] + (1 - a) * right[1]))
        sides = merged + sides[len(merged) * 2 :]
    return sides[0][1]


def _clipped(numerator: Tensor, denominator: Tensor) -> Tensor:
    """α in [0, 1]; ½ where the two heads cannot be told apart."""
    alpha = (numerator / denominator.where(denominator > 0, 1.0)).clamp(0, 1)
    return alpha.where(denominator > 0, 0.5)


def _rounds(gram: Tensor, k: int) -> Tensor:
    def alpha(left: Tensor, right: Tensor, in_left: list[int], in_right: list[int]) -> Tensor:
        difference = (left - right)[:, 1:]  # Δ = A_p − A_q in terms of the D_i
        member = torch.zeros(2, k, dtype=gram.dtype, device=gram.device)
        member[0, in_left] = 1  # X_p
        member[1, in_left + in_right] = 1  # Y
        of_left, of_both = (torch.einsum("bi,l->bil", difference, m).flatten(1) for m in member)
        onto_both = torch.einsum("bij,bj->bi", gram, of_both)
        return _clipped((of_left * onto_both).sum(-1), (of_both * onto_both).sum(-1))

    return _merge_in_rounds(k, gram.new_zeros(gram.shape[0], k), alpha)


def _rounds_by_values(gram: Tensor, k: int) -> Tensor:
    def alpha(left: Tensor, right: Tensor, in_left: list[int], in_right: list[int]) -> Tensor:
        both = in_left + in_right
        of_both = gram[:, :, both].sum(-1)
        return _clipped(of_both[:, in_left].sum(-1), of_both[:, both].sum(-1))

    return _merge_in_rounds(k, gram.new_zeros(gram.shape[0], k), alpha)


def _select(gram: Tensor, k: int) -> Tensor:
    corners = torch.eye(k, dtype=gram.dtype, device=gram.device)
    residuals = torch.stack([residual(gram, corner.expand(gram.shape[0], k)) for corner in corners], dim=1)
    return corners[residuals.argmin(1)]


def _joint(gram: Tensor, k: int) -> Tensor:
    """Least squares over the simplex, exactly, by a primal active-set method on all samples at once.

    Minimise ``wᵀ H w − 2 bᵀ w`` with H, b over all k weights (row and column 0 are 0: the reference head). Starting
    from the best single head, the head with the most negative reduced gradient joins the support, the
    equality-constrained optimum on the support is taken, and heads that would turn negative leave at the boundary. The
    objective never rises.
    """
    batch = gram.shape[0]
    blocks = gram.unflatten(2, (k - 1, k)).unflatten(1, (k - 1, k))  # (B, i, l, j, m)
    quadratic = gram.new_zeros(batch, k, k)
    quadratic[:, 1:, 1:] = blocks.sum((2, 4))  # ⟨D_i Y, D_j Y⟩
    linear = gram.new_zeros(batch, k)
    own = torch.arange(k - 1, device=gram.device)
    linear[:, 1:] = blocks[:, own, own + 1].sum(1).sum(-1)  # ⟨Σ_i D_i X_i, D_j Y⟩
    scale = quadratic.diagonal(dim1=1, dim2=2).amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    quadratic, linear = quadratic / scale[:, None, None], linear / scale[:, None]

    weights = _select(gram, k)
    support = weights > 0
    for _ in range(4 * k):
        weights, support = _settle(quadratic, linear, weights, support)
        gradient = torch.einsum("bij,bj->bi", quadratic, weights) - linear
        reduced = gradient - (gradient * weights).sum(-1, keepdim=True)
        entering = reduced.masked_fill(support, 0.0).argmin(-1)
        enters = reduced.masked_fill(support, 0.0).amin(-1) < -1e-12
        if not enters.any():
            break
        support = support | (torch.nn.functional.one_hot(entering, k).bool() & enters[:, None])
    return weights


def _settle(quadratic: Tensor, linear: Tensor, weights: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Move to the optimum on the support; where that leaves the simplex, stop at the boundary, drop the head,
    repeat."""
    batch, k = weights.shape
    for _ in range(k):
        inside = support.to(weights.dtype)
        system = weights.new_zeros(batch, k + 1, k + 1)
        # Heads outside the support get the equation w = 0, so that one shape serves all samples.
        system[:, :k, :k] = quadratic * inside[:, :, None] * inside[:, None] + torch.diag_embed(1 - inside)
        system[:, :k, k] = system[:, k, :k] = inside
        target = torch.cat([linear * inside, torch.ones_like(linear[:, :1])], dim=1)
        # Twin heads make the system singular; the pseudo-inverse then shares the weight between them.
        optimum = (torch.linalg.pinv(system, hermitian=True, rtol=1e-13) @ target[..., None])[:, :k, 0] * inside
        step = optimum - weights
        outside = support & (optimum < 0)
        lengths = (weights / (-step).where(outside, 1.0)).where(outside, torch.inf)
        length = lengths.amin(-1, keepdim=True).clamp(max=1.0)
        leaving = outside & (lengths <= length)
        weights = (weights + length * step).masked_fill(leaving, 0.0).clamp_min(0)
        weights = weights / weights.sum(-1, keepdim=True)
        support = support & ~leaving
        if not leaving.any():
            break
    return weights, support


_SOLVERS: dict[str, Callable[[Tensor, int], Tensor]] = {"least_squares": _rounds, "joint": _joint, "select": _select}
"""By the modes of ``MAP_WEIGHTS``."""
