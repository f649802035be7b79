"""Some rows of a record in place of all: α from a sample of rows costs a fraction of an exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_rows, expand_to_four


def sample_rows(
    record: AttentionRecord, rows: Tensor | None, count: int, seed: int = 0
) -> tuple[AttentionRecord, Tensor | None]:
    """A record of ``count`` query rows of each sample, drawn evenly and without replacement from those that count, and
    their weights: sums over rows are estimated without bias, in the mean over seeds.

    Which of a sample's rows are drawn depends on ``seed`` and on how many of its rows count, on nothing else: neither
    on padding nor on the batch that it is in. A sample with fewer rows than ``count`` brings all of them.

    Args:
        record: (B, H, Q, D) queries.
        rows: (B, Q) bool or weights, or ``None`` for all; those above 0 count.
        count: rows to draw of each sample.
        seed: of the draw.

    Returns:
        A record with ``count`` query rows and the same keys and values, without gradient; and weights (B, ``count``):
        the rows' own, times the number of rows that count over the number that was drawn, 0 where none was left to
        draw. ``record`` and ``rows`` themselves where they hold no more rows than that.
    """
    weights = check_rows(rows, record)
    if count >= record.num_queries:
        return record, rows
    batch, device = record.query.shape[0], record.query.device
    if weights is None:
        weights = torch.ones(batch, record.num_queries, device=device)
    counted = weights > 0
    available = counted.sum(1, keepdim=True)
    lots = _lots(record.num_queries, seed).to(device)
    # A row's lot goes by its place among the rows that count.
    drawn = lots[(counted.cumsum(1) - 1).clamp_min(0)].masked_fill(~counted, -1.0).topk(count, dim=1)
    share = available / available.clamp(1, count)
    sampled = weights.gather(1, drawn.indices) * (drawn.values >= 0) * share
    places = drawn.indices
    query = record.query.detach()
    query = query.gather(2, places[:, None, :, None].expand(batch, query.shape[1], count, query.shape[3]))
    return (
        AttentionRecord(
            record.name, query, record.key, record.value, attention_mask=_mask_of(record, places), scale=record.scale,
            output_weight=record.output_weight,
        ),
        sampled,
    )  # fmt: skip


def _lots(count: int, seed: int) -> Tensor:
    """Numbers from 0 to 1, the first of them the same for every count."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


def _mask_of(record: AttentionRecord, places: Tensor) -> Tensor | None:
    """The mask of the rows at ``places`` (B, r), causality taken in."""
    mask = None if record.attention_mask is None else expand_to_four(record.attention_mask.detach())
    if mask is not None and mask.shape[2] > 1:
        mask = mask.expand(places.shape[0], -1, -1, -1)
        mask = mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if not record.is_causal:
        return mask
    past = (places[..., None] >= torch.arange(record.num_keys, device=places.device))[:, None]
    if mask is None:
        return past
    if mask.dtype == torch.bool:
        return mask & past
    return torch.where(past, mask, mask.new_tensor(-torch.inf))
