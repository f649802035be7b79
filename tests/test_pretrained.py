"""A real pretrained teacher (SmolLM2-135M, see `make assets`): recording, and what grouping similar heads is worth."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from benchmarks import assets
from benchmarks.residuals import compare, first_tokens, record

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def smollm2():
    try:
        return assets.load_smollm2()
    except assets.AssetError as error:
        pytest.skip(str(error))


def test_maps_equal_eager_attention(smollm2):
    model, tokenizer = smollm2
    ids = first_tokens(tokenizer, "textwrap.py")[:, :100]
    recorded = record(model, input_ids=ids)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            eager = model(input_ids=ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    assert len(recorded) == len(eager) == 30
    for mine, theirs in zip(recorded, eager, strict=True):
        assert mine.num_heads == 9 and mine.output_weight.shape == (9, 64, 576)
        torch.testing.assert_close(mine.maps(), theirs, rtol=0, atol=1e-5)


def test_similar_heads_lose_less_than_half_of_adjacent_ones(smollm2, monkeypatch):
    model, tokenizer = smollm2
    monkeypatch.setattr("benchmarks.residuals.WEIGHTS", ("least_squares",))
    calibration, held_out = (
        [record(model, input_ids=first_tokens(tokenizer, text))] for text in ("argparse.py", "textwrap.py")
    )
    shares = {entry["schedule"]: entry["share"] for entry in compare(calibration, held_out, 6)}
    assert fmean(shares["progressive"]) >= 2 * fmean(shares["similar"])
    assert fmean(shares["balanced"]) > fmean(shares["similar"])
