"""What the core has to compute, written a second time: dense, in float64, from the definitions of the method alone.

Nothing here is shared with `squeezeheads`: a record is only read through its attributes. Every function forms what the
package avoids (all maps, the output width, every row at once), so an agreement between the two is evidence for both.
Everything is differentiable, so autograd on these functions gives the reference gradients.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

#: An additive mask entry at or below this forbids the key, as -inf does; above it, it is a part of the score.
MASKED = -1e4


# ------------------------------------------------------------------------------------------------------- attention maps


def changed(record, **changes):
    """The same record, or test case, with other parts."""
    if dataclasses.is_dataclass(record):
        return dataclasses.replace(record, **changes)
    parts = ("name", "query", "key", "value", "attention_mask", "is_causal", "scale", "output_weight")
    return type(record)(**{part: getattr(record, part) for part in parts} | changes)


def lift(record, grad: bool = False):
    """The same record in float64; with `grad`, its query, key and floating mask are leaves that ask for gradients."""

    def double(tensor, leaf):
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().clone().requires_grad_(grad and leaf)

    return changed(
        record,
        query=double(record.query, True),
        key=double(record.key, True),
        value=double(record.value, False),
        attention_mask=double(record.attention_mask, True),
        output_weight=double(record.output_weight, False),
    )


def per_query_head(record, tensor: Tensor) -> Tensor:
    """Key or value heads repeated: query head h uses key/value head h // (H // Hkv)."""
    heads = record.query.shape[1]
    shared = heads // tensor.shape[1]
    return tensor[:, [head // shared for head in range(heads)]]


def scale_of(record) -> float:
    return record.query.shape[-1] ** -0.5 if record.scale is None else record.scale


def allowed(record) -> Tensor:
    """(B, H, Q, K), true where the head's row may attend to the key."""
    batch, heads, queries, _ = record.query.shape
    keys = record.key.shape[2]
    may = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if record.is_causal:
        may &= torch.arange(keys)[None, :] <= torch.arange(queries)[:, None]
    mask = record.attention_mask
    if mask is not None:
        may = may & (mask if mask.dtype == torch.bool else mask > MASKED)
    return may


def scores(record) -> Tensor:
    """(B, H, Q, K), scale * q k + mask in float64; only meaningful where `allowed`."""
    key = per_query_head(record, record.key).double()
    score = scale_of(record) * torch.einsum("bhqd,bhkd->bhqk", record.query.double(), key)
    mask = record.attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
        score = score + torch.where(mask > MASKED, mask, torch.zeros_like(mask))
    return score


def log_softmax(score: Tensor, support: Tensor) -> Tensor:
    """Over the support only; 0 outside it and in rows that have none."""
    top = score.detach().masked_fill(~support, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    shifted = torch.where(support, score - top, torch.zeros_like(score))
    total = (shifted.exp() * support).sum(-1, keepdim=True)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(support, shifted - total.log(), torch.zeros_like(score))


def softmax(score: Tensor, support: Tensor) -> Tensor:
    return log_softmax(score, support).exp() * support


def maps(record, temperature: float = 1.0) -> Tensor:
    return softmax(scores(record) / temperature, allowed(record))


# ----------------------------------------------------------------------------------------------------------- divergence


def common_support(student, teacher, mix: Tensor) -> Tensor:
    """(B, S, Q, K): the student head may attend to the key, and so may a teacher head that serves it."""
    serving = torch.einsum("bst,btqk->bsqk", (mix > 0).double(), allowed(teacher).double())
    return allowed(student) & (serving > 0)


def squeezed_rows(student, teacher, mix: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's mixture renormalised on the common support, that support, and the teacher's mass on it."""
    support = common_support(student, teacher, mix)
    mixture = torch.einsum("bst,btqk->bsqk", mix.double(), maps(teacher, temperature)).detach() * support
    mass = mixture.sum(-1, keepdim=True)
    return mixture / torch.where(mass > 0, mass, torch.ones_like(mass)), support, mass.squeeze(-1)


def row_weights(student, rows: Tensor | None) -> Tensor:
    batch, _, queries, _ = student.query.shape
    return torch.ones(batch, queries, dtype=torch.double) if rows is None else rows.double()


def divergence(
    student, teacher, mix: Tensor, rows: Tensor | None = None, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """KL(P || Q) in nats per valid row and head."""
    target, support, _ = squeezed_rows(student, teacher, mix, temperature)
    log_student = log_softmax(scores(student) / temperature, support)
    kl = (torch.special.xlogy(target, target) - target * log_student).sum(-1)
    weight = row_weights(student, rows)[:, None, :]
    valid = support.any(-1) & (weight > 0)
    if reduction == "none":
        return torch.where(valid, kl, torch.zeros_like(kl))
    numerator = torch.where(valid, weight * kl, torch.zeros_like(kl)).sum()
    if reduction == "sum":
        return numerator
    total = (weight * valid).sum()
    return numerator / total if total > 0 else numerator * 0.0


# -------------------------------------------------------------------------------------------------------- error budgets


def score_magnitude(record, temperature: float = 1.0) -> float:
    """Largest scale * sum |q| |k| + |mask|: a score computed with precision eps is wrong by about eps times it."""
    key = per_query_head(record, record.key).double().abs()
    size = abs(scale_of(record)) * torch.einsum("bhqd,bhkd->bhqk", record.query.double().abs(), key)
    mask = record.attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().double()
        size = size + torch.where(mask > MASKED, mask.abs(), torch.zeros_like(mask))
    size = size.detach()[allowed(record)]
    return float(size.max()) / temperature if size.numel() else 0.0


def gradient_magnitudes(student, teacher, mix: Tensor, incoming: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """The gradients with every term positive: (Q + P) for (Q - P), |k| for k. What rounding errors are relative to.

    `incoming` (B, S, Q) is the gradient of the loss with respect to each row's KL.
    """
    target, support, _ = squeezed_rows(student, teacher, mix, temperature)
    predicted = softmax(scores(student) / temperature, support).detach()
    per_score = (predicted + target) * incoming.abs()[..., None] / temperature
    scale = abs(scale_of(student))
    key = per_query_head(student, student.key).detach().double().abs()
    magnitudes = {"query": scale * per_score @ key}
    by_head = scale * per_score.transpose(-1, -2) @ student.query.detach().double().abs()
    batch, heads, keys, width = by_head.shape
    kv_heads = student.key.shape[1]
    magnitudes["key"] = by_head.reshape(batch, kv_heads, heads // kv_heads, keys, width).sum(2)
    if student.attention_mask is not None:
        magnitudes["attention_mask"] = per_score.sum_to_size(padded_shape(student.attention_mask)).reshape(
            student.attention_mask.shape
        )
    return magnitudes


def padded_shape(mask: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - mask.dim()) + tuple(mask.shape)


# ------------------------------------------------------------------------------------------------------------ squeezing


def circuits(record) -> Tensor:
    """X_i = V_i W_i, (B, H, K, E): the output width is formed."""
    return torch.einsum("bhkd,hde->bhke", per_query_head(record, record.value).double(), record.output_weight.double())


def valid_maps(record, rows: Tensor | None) -> Tensor:
    """Maps of the valid query rows; the others are zero and so leave every sum. A row of weight w counts w times."""
    attention = maps(record)
    if rows is not None:
        attention = attention * rows.double().sqrt()[:, None, :, None]
    return attention


def seen_keys(record, rows: Tensor | None) -> Tensor:
    """(B, K): keys that a valid row may attend to, through any head. The others must not move `values`."""
    may = allowed(record)
    if rows is not None:
        may = may & (rows > 0)[:, None, :, None]
    return may.any(2).any(1)


def residual(record, group, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """(B,): || sum_i A_i X_i - (sum_i w_i A_i) sum_l X_l ||^2, evaluated as it is written; weights (B, len(group))."""
    attention, circuit = valid_maps(record, rows)[:, group], circuits(record)[:, group]
    wanted = (attention @ circuit).sum(1)
    merged = torch.einsum("bi,biqk->bqk", weights.double(), attention)
    return (wanted - merged @ circuit.sum(1)).square().sum((-1, -2))


def energy(record, group, rows: Tensor | None = None) -> Tensor:
    """(B,): || sum_i A_i X_i ||^2."""
    return (valid_maps(record, rows)[:, group] @ circuits(record)[:, group]).sum(1).square().sum((-1, -2))


def conditioning(record, group, rows: Tensor | None = None) -> Tensor:
    """(B,): the least || (A_i - A_j) Y ||^2 over pairs, as a share of the largest || A_i Y ||^2; near 0, moot."""
    attention, total = valid_maps(record, rows)[:, group], circuits(record)[:, group].sum(1)
    out = (attention @ total[:, None]).flatten(2)
    apart = [(out[:, i] - out[:, j]).square().sum(-1) for i, j in itertools.combinations(range(len(group)), 2)]
    if not apart:
        return torch.ones(out.shape[0], dtype=torch.double)
    return torch.stack(apart).amin(0) / out.square().sum(-1).amax(-1).clamp_min(1e-300)


def pair_alpha(first_map, first_circuit, second_map, second_circuit) -> Tensor:
    """(B,): the least-squares weight of the first of two heads, clipped; one half where there is nothing to fit."""
    delta, both = first_map - second_map, first_circuit + second_circuit
    numerator = ((delta @ first_circuit) * (delta @ both)).sum((-1, -2))
    denominator = (delta @ both).square().sum((-1, -2))
    return _clipped_ratio(numerator, denominator)


def value_alpha(first_circuit, second_circuit) -> Tensor:
    """(B,): the same with attention dropped."""
    both = first_circuit + second_circuit
    return _clipped_ratio((first_circuit * both).sum((-1, -2)), both.square().sum((-1, -2)))


def _clipped_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.full_like(safe, 0.5)).clamp(0, 1)


def rounds(record, group, rows: Tensor | None = None, values: bool = False) -> Tensor:
    """(B, len(group)): adjacent pairs merged in rounds, an odd one kept; a merged head carries X_p + X_q on."""
    attention, circuit = valid_maps(record, rows)[:, group], circuits(record)[:, group]
    if values:
        circuit = circuit * seen_keys(record, rows)[:, None, :, None]
    batch = attention.shape[0]
    unit = torch.eye(len(group), dtype=torch.double)
    heads = [(attention[:, i], circuit[:, i], unit[i].expand(batch, -1)) for i in range(len(group))]
    while len(heads) > 1:
        merged = []
        for (map_p, x_p, w_p), (map_q, x_q, w_q) in zip(heads[0::2], heads[1::2], strict=False):
            alpha = value_alpha(x_p, x_q) if values else pair_alpha(map_p, x_p, map_q, x_q)
            a = alpha[:, None, None]
            merged.append((a * map_p + (1 - a) * map_q, x_p + x_q, alpha[:, None] * w_p + (1 - alpha[:, None]) * w_q))
        if len(heads) % 2:
            merged.append(heads[-1])
        heads = merged
    return heads[0][2]


def joint(record, group, rows: Tensor | None = None) -> Tensor:
    """(B, len(group)): the best convex weights, by trying every set of heads that may carry weight (at most 8 heads).

    On a fixed set only the equality sum w = 1 is left, solved by eliminating one weight on the explicit vectors; the
    optimum's own set is among those tried, so the best feasible answer is the optimum.
    """
    attention, circuit = valid_maps(record, rows)[:, group], circuits(record)[:, group]
    count = len(group)
    assert count <= 8, "2 ** count systems are solved"
    wanted = (attention @ circuit).sum(1).flatten(1)
    outputs = (attention @ circuit.sum(1)[:, None]).flatten(2)
    best = torch.zeros(attention.shape[0], count, dtype=torch.double)
    for sample in range(attention.shape[0]):
        lowest = torch.inf
        for size in range(1, count + 1):
            for chosen in itertools.combinations(range(count), size):
                columns, base = outputs[sample, chosen[:-1]].T, outputs[sample, chosen[-1]]
                weights = torch.zeros(count, dtype=torch.double)
                if size > 1:
                    free = torch.linalg.lstsq(
                        columns - base[:, None], (wanted[sample] - base)[:, None], driver="gelsd"
                    ).solution[:, 0]
                    if (free < 0).any() or free.sum() > 1:
                        continue
                    weights[list(chosen[:-1])] = free
                weights[chosen[-1]] = 1 - weights.sum()
                left = (wanted[sample] - weights @ outputs[sample]).square().sum()
                if left < lowest:
                    lowest, best[sample] = left, weights
    return best


def optimality_gap(record, group, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """(B,): an upper bound on residual(weights) - min residual over the simplex, any group size (Frank-Wolfe)."""
    attention, circuit = valid_maps(record, rows)[:, group], circuits(record)[:, group]
    wanted = (attention @ circuit).sum(1).flatten(1)
    outputs = (attention @ circuit.sum(1)[:, None]).flatten(2)
    left = torch.einsum("bi,bin->bn", weights.double(), outputs) - wanted
    slope = 2 * torch.einsum("bin,bn->bi", outputs, left)
    return (slope * weights.double()).sum(-1) - slope.amin(-1)


def select(record, group, rows: Tensor | None = None) -> Tensor:
    """(B, len(group)): all weight on the head that leaves the smallest residual."""
    batch, count = record.query.shape[0], len(group)
    unit = torch.eye(count, dtype=torch.double)
    left = torch.stack([residual(record, group, unit[i].expand(batch, -1), rows) for i in range(count)], -1)
    return unit[left.argmin(-1)]


def mean(record, group, rows: Tensor | None = None) -> Tensor:
    return torch.full((record.query.shape[0], len(group)), 1.0 / len(group), dtype=torch.double)


def group_weights(record, group, weights: str, rows: Tensor | None = None) -> Tensor:
    solvers = {
        "least_squares": rounds,
        "joint": joint,
        "values": lambda *a: rounds(*a, values=True),
        "mean": mean,
        "select": select,
    }
    return solvers[weights](record, list(group), rows)


def mixing_matrix(record, groups, weights: str = "least_squares", rows: Tensor | None = None) -> Tensor:
    """(B, S, T)."""
    mix = torch.zeros(record.query.shape[0], len(groups), record.query.shape[1], dtype=torch.double)
    for student_head, group in enumerate(groups):
        mix[:, student_head, list(group)] = group_weights(record, group, weights, rows)
    return mix


def similar_groups(records, student_heads: int, weights: str = "least_squares", rows=None):
    """Greedy groups of one layer over several batches: merge the two whose union raises the residual least."""
    rows = [None] * len(records) if rows is None else rows

    def cost(group):
        return sum(
            float(residual(record, list(group), group_weights(record, group, weights, valid), valid).sum())
            for record, valid in zip(records, rows, strict=True)
        )

    groups = [(head,) for head in range(records[0].query.shape[1])]
    while len(groups) > student_heads:
        first, second = min(
            itertools.combinations(groups, 2),
            key=lambda pair: cost(tuple(sorted(pair[0] + pair[1]))) - cost(pair[0]) - cost(pair[1]),
        )
        groups = [group for group in groups if group not in (first, second)] + [tuple(sorted(first + second))]
    return tuple(sorted(groups))
