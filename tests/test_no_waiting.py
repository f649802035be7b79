"""Nothing in a step asks the device for a number: on torch's meta device there are none to be had.

``.item()``, ``bool(tensor)``, ``nonzero`` and indexing by a mask, each of which makes a GPU's host wait, raise there.
What this cannot see is a copy from the host.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import masking_utils

from squeezeheads import (
    AttentionRecord,
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
    group_heads,
    mixing_matrix,
)
from tiny import classifier, image_batch, language_model, token_batch


@pytest.fixture(autouse=True)
def others_know_the_meta_device(monkeypatch):
    """What torch and transformers do to it, or ask of it, is none of ours."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def record(name, heads, key_value_heads, mask=None):
    def make(count):
        return torch.randn(2, count, 33, 8, device="meta", requires_grad=name == "student")

    weight = torch.randn(heads, 8, heads * 8, device="meta")
    parts = make(heads), make(key_value_heads), make(key_value_heads)
    return AttentionRecord(name, *parts, attention_mask=mask, is_causal=mask is None, output_weight=weight)


@pytest.mark.parametrize("alpha_rows", [None, 8])
@pytest.mark.parametrize("weights", ["mean", "values", "least_squares", "select"])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_loss(weights, alpha_rows, masked):
    mask = torch.zeros(2, 1, 33, 33, dtype=torch.bool, device="meta") if masked else None
    teacher, student = record("teacher", 6, 3, mask), record("student", 4, 2, mask)
    rows = torch.ones(2, 33, dtype=torch.bool, device="meta")
    mix = mixing_matrix(teacher, group_heads(6, 4), weights=weights, rows=rows, alpha_rows=alpha_rows)
    attention_divergence(student, teacher, mix, rows=rows).backward()
    assert student.query.grad.shape == student.query.shape


def test_joint_weights_wait():
    """Their solver stops when it is done, and asks. So it is said in ``mixing_matrix``."""
    with pytest.raises(RuntimeError, match="meta"):
        mixing_matrix(record("teacher", 6, 3), group_heads(6, 4), weights="joint")


def images():
    return classifier(6, width=48), classifier(3, seed=1), image_batch(4)


def tokens():
    batch = token_batch([9, 9, 9], 9)
    del batch["attention_mask"]
    return language_model(6, num_key_value_heads=3), language_model(4, seed=1), batch


@pytest.mark.parametrize("make", [images, tokens])
def test_a_step(make):
    teacher, student, batch = make()
    objectives = {
        "task": TaskLoss(),
        "logits": LogitKD(),
        "attention": SqueezedHeads(schedule="similar"),
        "relations": SqueezedRelations(),
        "features": HiddenStates(),
        "orthogonal": OrthogonalProjection(),
        "minilm": MiniLMRelations(relation_heads=2),
        "reverse": ReverseKL(),
        "between": JensenShannon(),
    }
    distillation = Distillation(teacher.eval(), objectives)
    distillation.prepare(student, [batch])
    distillation(student, batch).loss.backward()
    for model in (teacher, student, *(o.projector for o in objectives.values() if o.projector is not None)):
        model.to("meta")
    batch = {name: value.to("meta") for name, value in batch.items()}
    student.zero_grad()
    distillation(student, batch, counts=distillation.count(batch)).loss.backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "embed" in name)
