"""MDTv2: the published design written out a second time; masks, initial weights, saving, recording, learning."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from families import watching
from squeezeheads import attention_divergence, group_heads, mixing_matrix, record_attention
from squeezeheads.models import MDT_SIZES, MDTTransformer2DModel, draw_kept_tokens, draw_mask_ratio

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "in_channels": 3,
    "out_channels": 5,
    "num_layers": 7,
    "num_decoder_layers": 3,
    "sample_size": 6,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
TOKENS = 9
KEEP = torch.tensor([[7, 0, 3, 4, 2], [1, 8, 6, 3, 5]])  # its own tokens for each sample, in no order


def small(dtype=torch.float64, seed=0, **changes):
    """A model in eval mode of which no weight is 0 and no two are alike."""
    torch.manual_seed(seed)
    model = MDTTransformer2DModel(**SMALL | changes).eval()
    model = model.double() if dtype == torch.float64 else model  # diffusers' own .to(dtype) warns each time
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def inputs(dtype=torch.float64, batch=2, channels=3, seed=5):
    gen = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, channels, 6, 6, generator=gen, dtype=dtype),
        "timestep": torch.randint(1000, (batch,), generator=gen),
        "class_labels": torch.randint(11, (batch,), generator=gen),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


passes = pytest.mark.parametrize("keep", [None, KEEP], ids=["unmasked", "masked"])

# ------------------------------------------------------------------------------------------------ the published design


def written_out(weights, x, t, y, keep):
    """One sample (C, 6, 6) through SMALL, token by token and head by head, from the weights by name; keep: a set."""
    heads, width, patch, grid, half = 2, 12, 2, 3, 2

    def linear(name, v):
        return v @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(v):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def silu(v):
        return v / (1 + torch.exp(-v))

    def attention(name, v, places):
        q, k, u = (linear(f"{name}.to_{letter}", v) for letter in "qkv")
        table = weights[f"{name}.relative_position_bias"]
        out = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            rows = []
            for i, a in enumerate(places):
                scores = []
                for j, b in enumerate(places):
                    down, right = a // grid - b // grid, a % grid - b % grid
                    bias = table[h, (down + grid - 1) * (2 * grid - 1) + right + grid - 1]
                    scores.append(q[i, part] @ k[j, part] / math.sqrt(width / heads) + bias)
                weight = torch.exp(torch.stack(scores))
                rows.append((weight / weight.sum()) @ u[:, part])
            out.append(torch.stack(rows))
        return linear(f"{name}.to_out", torch.cat(out, -1))

    def block(name, v, places, skip=None):
        if skip is not None:
            v = linear(f"{name}.skip_proj", torch.cat([v, skip], -1))
        b1, s1, g1, b2, s2, g2 = linear(f"{name}.modulation", silu(c)).split(width)
        v = v + g1 * attention(f"{name}.attn", norm(v) * (1 + s1) + b1, places)
        inner = gelu(linear(f"{name}.ff.net.0.proj", norm(v) * (1 + s2) + b2))
        return v + g2 * linear(f"{name}.ff.net.2", inner)

    angles = [float(t) * 10000 ** (-i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    c = linear("timestep_embedder.linear_2", silu(linear("timestep_embedder.linear_1", waves)))
    c = c + weights["class_embedder.weight"][y]

    kernel, offset = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    pieces = [
        (kernel * x[:, patch * (n // grid) :, patch * (n % grid) :][:, :patch, :patch]).sum((1, 2, 3)) + offset
        for n in range(grid * grid)
    ]
    embedded = torch.stack(pieces) + weights["pos_embed"][0]

    everywhere = list(range(grid * grid))
    seen = everywhere if keep is None else sorted(keep)
    v, passed = embedded[seen], []
    for i in range(half):
        v = block(f"encoder_in_blocks.{i}", v, seen)
        passed.append(v)
    for i in range(half):
        v = block(f"encoder_out_blocks.{i}", v, seen, passed[half - 1 - i])
    if keep is not None:
        filled = torch.stack([v[seen.index(n)] if n in seen else weights["mask_token"][0, 0] for n in everywhere])
        filled = filled + weights["decoder_pos_embed"][0]
        guessed = block("side_block", filled, everywhere)
        v = torch.stack([filled[n] if n in seen else guessed[n] for n in everywhere])
    else:
        v = v + weights["decoder_pos_embed"][0]
    for i in range(3):
        v = block(f"decoder_blocks.{i}", v, everywhere, embedded)

    shift, scale = linear("modulation_out", silu(c)).split(width)
    v = linear("proj_out", norm(v) * (1 + scale) + shift)
    image = torch.zeros(5, 6, 6, dtype=torch.float64)
    for n in everywhere:
        for down in range(patch):
            for right in range(patch):
                part = v[n, (down * patch + right) * 5 :][:5]
                image[:, patch * (n // grid) + down, patch * (n % grid) + right] = part
    return image


@passes
def test_values_and_gradients_equal_the_design_written_out(keep):
    # Sinusoids of the timestep are made in float32, everything else in float64: small timesteps keep them exact.
    model, batch = small(), inputs() | {"timestep": torch.tensor([3, 40]), "class_labels": torch.tensor([2, 10])}
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack(
        [
            written_out(weights, x, t, y, None if keep is None else set(keep[i].tolist()))
            for i, (x, t, y) in enumerate(zip(*batch.values(), strict=True))
        ]
    )
    found = model(**batch, keep=keep).sample
    assert found.shape == (2, 5, 6, 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * direction).sum().backward()
    reached = gradients(model, (found * direction).sum())
    assert {name for name, w in weights.items() if w.grad is not None} == set(reached)
    untouched = {name for name in weights if name.startswith(("side_block.", "mask_token"))}
    assert set(weights) - set(reached) == (untouched if keep is None else set())
    for name, gradient in reached.items():
        torch.testing.assert_close(
            gradient, weights[name].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def closed_form(layers, width, heads, decoder_layers, grid=16, classes=1000, channels=4, out=8):
    """Parameters of the blocks and the ends; of the side-interpolater; of the projections of the skips."""
    matrices = 4 + 2 * 4 + 6  # attention, feed-forward, modulation
    biases = 4 + 4 + 1 + 6
    block = matrices * width**2 + biases * width + heads * (2 * grid - 1) ** 2
    ends = (4 * channels + 1) * width  # patches
    ends += (256 + 1) * width + (width + 1) * width  # timestep
    ends += (classes + 1) * width  # classes and none
    ends += 2 * grid**2 * width + width  # two sets of positions, mask token
    ends += (width + 1) * 2 * width + (width + 1) * 4 * out  # output
    skips = (layers - decoder_layers) // 2 + decoder_layers
    return layers * block + ends, block, skips * (2 * width + 1) * width


# Millions: what the published figures count (see docs/mdt.md), what sampling runs, all that is trained.
@pytest.mark.parametrize(
    ("name", "shape", "published", "millions"),
    [
        ("S/2", (12, 384, 6), 33, (33.13, 35.49, 38.16)),
        ("B/2", (12, 768, 12), 130, (130.85, 140.29, 150.93)),
        ("L/2", (24, 1024, 16), 458, (458.74, 488.11, 507.01)),
        ("XL/2", (28, 1152, 16), 675, (675.86, 718.34, 742.26)),
    ],
)
def test_parameter_counts(name, shape, published, millions):
    with torch.device("meta"):
        model = MDTTransformer2DModel(**MDT_SIZES[name], out_channels=8)
    assert model.device.type == "meta"
    count = {path: p.numel() for path, p in model.named_parameters()}
    side = sum(n for path, n in count.items() if path.startswith("side_block."))
    skips = sum(n for path, n in count.items() if ".skip_proj." in path)
    total = sum(count.values())
    assert (total - side - skips, side, skips) == closed_form(*shape, 4)
    assert tuple(round(n / 1e6, 2) for n in (total - side - skips, total - side, total)) == millions
    assert abs((total - side - skips) / 1e6 / published - 1) < 0.02
    batch = [torch.zeros(2, *rest, device="meta") for rest in ((4, 32, 32), (), ())]
    with torch.device("meta"):
        keep = torch.zeros(2, 150, dtype=torch.int64)
    sample = model(batch[0], batch[1], batch[2].long(), keep=keep).sample
    assert sample.shape == (2, 8, 32, 32) and sample.is_meta


@pytest.mark.parametrize("heads", [2, 4])
def test_without_position_bias_tokens_are_known_by_their_embeddings_alone(heads):
    model = small(num_attention_heads=heads, relative_position_bias=False)
    assert not [name for name, _ in model.named_parameters() if "relative" in name]
    with torch.no_grad():
        model.pos_embed.zero_()
        model.decoder_pos_embed.zero_()
    batch = inputs()
    flipped = {**batch, "hidden_states": batch["hidden_states"].unflatten(2, (3, 2)).flip(2).flatten(2, 3)}
    there = model(**flipped).sample.unflatten(2, (3, 2)).flip(2).flatten(2, 3)
    torch.testing.assert_close(there, model(**batch).sample)
    with_bias = small(num_attention_heads=heads)
    with torch.no_grad():
        with_bias.pos_embed.zero_()
        with_bias.decoder_pos_embed.zero_()
    there = with_bias(**flipped).sample.unflatten(2, (3, 2)).flip(2).flatten(2, 3)
    assert (there - with_bias(**batch).sample).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_masked_pass_that_keeps_everything_is_the_unmasked_pass(dtype):
    model, batch = small(dtype), inputs(dtype)
    expected = model(**batch).sample
    gradients_expected = gradients(model, expected.square().sum())
    for keep in (
        draw_kept_tokens(2, TOKENS, 0.0),
        torch.stack([torch.randperm(TOKENS), torch.randperm(TOKENS)]),
    ):
        found = model(**batch, keep=keep).sample
        assert torch.equal(found, expected)
        reached = gradients(model, found.square().sum())
        for name, gradient in reached.items():
            if name in gradients_expected:
                torch.testing.assert_close(gradient, gradients_expected[name], msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert name.startswith(("side_block.", "mask_token")) and not gradient.any()


def test_the_order_of_the_kept_tokens_means_nothing():
    model, batch = small(torch.float32), inputs(torch.float32)
    assert torch.equal(model(**batch, keep=KEEP).sample, model(**batch, keep=KEEP.flip(1)).sample)
    assert not torch.equal(model(**batch, keep=KEEP).sample, model(**batch, keep=KEEP.flip(0)).sample)


def test_the_encoder_sees_nothing_of_masked_tokens_and_the_decoder_does():
    """MDTv2's decoder takes in the embedded image whole; nothing else of a masked token gets past the encoder."""
    model, batch = small(), inputs()
    other = {**batch, "hidden_states": batch["hidden_states"].clone()}
    other["hidden_states"][0, :, 0:2, 2:4] += 1  # token 1, which sample 0 does not keep
    seen = []
    for each in (batch, other):
        with watching(model, "encoder_out_blocks.1") as encoded, watching(model, "side_block") as side:
            seen.append((model(**each, keep=KEEP).sample, encoded[0][3], side[0][3]))
    for mine, theirs in zip(seen[0][1:], seen[1][1:], strict=True):
        assert torch.equal(mine, theirs)
    assert encoded[0][3].shape == (2, 5, 12) and side[0][3].shape == (2, 9, 12)
    assert (seen[0][0] - seen[1][0])[0].abs().max() > 1e-3
    assert torch.equal(seen[0][0][1], seen[1][0][1])


@pytest.mark.parametrize(("batch", "tokens", "ratio", "kept"), [(3, 9, 0.4, 5), (1, 256, 0.3, 179), (2, 63, 0.0, 63)])
def test_kept_tokens_are_distinct_ascending_and_as_many_as_published(batch, tokens, ratio, kept):
    keep = draw_kept_tokens(batch, tokens, ratio, torch.Generator().manual_seed(3))
    assert keep.shape == (batch, kept) and keep.dtype == torch.int64
    assert 0 <= keep.min() and keep.max() < tokens and (keep.diff(dim=1) > 0).all()
    assert torch.equal(keep, draw_kept_tokens(batch, tokens, ratio, torch.Generator().manual_seed(3)))
    if ratio:
        assert not torch.equal(keep, draw_kept_tokens(batch, tokens, ratio, torch.Generator().manual_seed(4)))


def test_each_token_is_kept_equally_often_and_each_sample_draws_for_itself():
    keep = draw_kept_tokens(4000, 9, 0.5, torch.Generator().manual_seed(0))
    share = torch.zeros(4000, 9).scatter(1, keep, 1.0).mean(0)
    # Binomial: four standard deviations.
    assert (share - 4 / 9).abs().max() < 4 * math.sqrt(4 / 9 * 5 / 9 / 4000)
    assert len(torch.unique(keep, dim=0)) == math.comb(9, 4)


def test_mask_ratios_are_uniform_between_the_published_bounds():
    gen = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_mask_ratio(gen) for _ in range(2000)])
    assert 0.3 <= drawn.min() < 0.301 and 0.499 < drawn.max() <= 0.5
    assert (drawn.quantile(torch.tensor([0.25, 0.5, 0.75])) - torch.tensor([0.35, 0.4, 0.45])).abs().max() < 0.01
    assert draw_mask_ratio(low=0.2, high=0.2) == 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_kept_tokens(2, 9, 1.0), r"ratio=1.0: the share of masked tokens lies in \[0, 1\)"),
        (lambda: draw_kept_tokens(2, 9, -0.1), r"ratio=-0.1"),
        (lambda: draw_kept_tokens(2, 9, 0.95), "ratio=0.95 masks all of 9 tokens"),
        (lambda: draw_mask_ratio(low=0.5, high=0.3), "low=0.5, high=0.3"),
        (lambda: draw_mask_ratio(high=1.0), "high=1.0"),
        (lambda: small(num_layers=8), "num_layers=8 with num_decoder_layers=3 leaves 5 layers for the encoder"),
        (lambda: small(num_layers=3), "leaves 0 layers"),
        (lambda: small(num_decoder_layers=-1), "num_decoder_layers=-1"),
        (lambda: small(attention_head_dim=5), "num_attention_heads · attention_head_dim = 10: .* multiple of 4"),
        (lambda: small(patch_size=4), "sample_size=6 is no multiple of patch_size=4"),
        (lambda: small()(**inputs(channels=4)), r"hidden_states has shape \(2, 4, 6, 6\), expected .* \(B, 3, 6, 6\)"),
        (lambda: small()(**inputs() | {"timestep": torch.tensor(3)}), r"timestep has shape \(\), .*: \(2,\)"),
        (lambda: small()(**inputs() | {"class_labels": torch.tensor([1])}), r"class_labels has shape \(1,\)"),
        (
            lambda: small()(**inputs() | {"class_labels": torch.tensor([1, 11])}),
            "class_labels holds 1 to 11, but this model has the classes 0 to 9, and 10 for no class",
        ),
        (lambda: small()(**inputs() | {"class_labels": torch.tensor([1, -1])}), "class_labels holds -1 to 1"),
        (lambda: small()(**inputs(), keep=KEEP[:1]), r"keep has shape \(1, 5\) .* draw_kept_tokens\(2, 9, ratio\)"),
        (lambda: small()(**inputs(), keep=KEEP[:, :0]), r"keep has shape \(2, 0\)"),
        (lambda: small()(**inputs(), keep=KEEP > 3), r"keep has shape \(2, 5\) and dtype torch.bool"),
        (lambda: small()(**inputs(), keep=KEEP + 1), "keep holds 1 to 9, but an image has the tokens 0 to 8"),
        (lambda: small()(**inputs(), keep=KEEP - 1), "keep holds -1 to 7"),
        (lambda: small()(**inputs(), keep=KEEP.index_fill(1, torch.tensor(1), 3)), "keep names a token twice"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ initial weights


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return MDTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_decoder_layers=2,
        sample_size=16,
        num_embeds_ada_norm=100,
    )


def test_initial_linear_layers_are_xavier_without_bias_and_modulations_are_zero(fresh):
    zero = ("modulation.", "modulation_out.", "proj_out.")
    for path, module in fresh.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        assert module.bias is not None and not module.bias.any(), path
        if f"{path}.".endswith(zero):
            assert not module.weight.any(), path
        elif not path.startswith("timestep_embedder."):
            fan_out, fan_in = module.weight.shape
            if path.endswith((".to_q", ".to_k", ".to_v")):
                fan_out *= 3
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.99 * bound < module.weight.abs().max() <= bound, path
            assert abs(module.weight.std() / (bound / math.sqrt(3)) - 1) < 0.02, path
    patches = fresh.patch_embed.proj
    bound = math.sqrt(6 / (4 * 4 + 128))
    assert not patches.bias.any() and 0.98 * bound < patches.weight.abs().max() <= bound


def test_initial_embeddings_and_position_biases(fresh):
    for name in (
        "timestep_embedder.linear_1.weight",
        "timestep_embedder.linear_2.weight",
        "class_embedder.weight",
        "mask_token",
    ):
        tensor = fresh.get_parameter(name)
        assert abs(tensor.std().item() / 0.02 - 1) < (0.2 if name == "mask_token" else 0.02), name
        assert abs(tensor.mean().item()) < (0.008 if name == "mask_token" else 0.001), name
    assert fresh.class_embedder.weight.shape[0] == 101
    for path, parameter in fresh.named_parameters():
        if path.endswith("relative_position_bias"):
            assert parameter.shape == (4, 15 * 15) and abs(parameter.std().item() / 0.02 - 1) < 0.1

    expected = torch.zeros(64, 128, dtype=torch.float64)
    for token in range(64):
        for i in range(32):
            wave = 10000 ** (-i / 32)
            for part, position in enumerate((token % 8, token // 8)):  # columns first, as in DiT
                expected[token, 64 * part + i] = math.sin(position * wave)
                expected[token, 64 * part + 32 + i] = math.cos(position * wave)
    for embedding in (fresh.pos_embed, fresh.decoder_pos_embed):
        assert embedding.requires_grad
        torch.testing.assert_close(embedding[0].double(), expected, rtol=0, atol=1e-5)


def test_at_the_start_every_layer_hands_its_tokens_on_and_the_output_is_zero(fresh):
    gen = torch.Generator().manual_seed(0)
    tokens, skip = torch.randn(2, 5, 128, generator=gen), torch.randn(2, 5, 128, generator=gen)
    condition, offsets = torch.randn(2, 128, generator=gen), fresh.offset_index[:5, :5]
    assert torch.equal(fresh.side_block(tokens, condition, offsets), tokens)
    block = fresh.decoder_blocks[0]
    assert torch.equal(block(tokens, condition, offsets, skip), block.skip_proj(torch.cat([tokens, skip], -1)))
    x = torch.randn(2, 4, 16, 16, generator=gen)
    assert not fresh(x, torch.tensor([1, 2]), torch.tensor([3, 100])).sample.any()


# ---------------------------------------------------------------------------------------------- as diffusers has it


@passes
def test_saved_and_loaded_it_puts_out_the_same(keep, tmp_path):
    model, batch = small(torch.float32, norm_eps=1e-4, mlp_ratio=3.0), inputs(torch.float32)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MDTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training and dict(loaded.config).items() >= (SMALL | {"norm_eps": 1e-4, "mlp_ratio": 3.0}).items()
    assert torch.equal(loaded.offset_index, model.offset_index)
    assert torch.equal(loaded(**batch, keep=keep).sample, model(**batch, keep=keep).sample)
    assert torch.equal(loaded(**batch, keep=keep, return_dict=False)[0], model(**batch, keep=keep).sample)

    half = MDTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    rounded = half(**batch | {"hidden_states": batch["hidden_states"].bfloat16()}, keep=keep).sample
    assert rounded.dtype == torch.bfloat16
    exact = model(**batch, keep=keep).sample
    assert (rounded - exact).square().mean() < 0.05**2 * exact.square().mean()


def test_training_mode_draws_nothing():
    model, batch = small(torch.float32).train(), inputs(torch.float32)
    state = torch.random.get_rng_state()
    out = model(**batch, keep=KEEP).sample
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(out, model.eval()(**batch, keep=KEEP).sample)


def test_out_channels_default_to_those_that_come_in():
    model = small(out_channels=None)
    assert model.config.out_channels == model.out_channels == 3
    assert model(**inputs()).sample.shape == (2, 3, 6, 6)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_it_stands_in_a_dit_pipeline_that_saves_and_loads(guidance, out_channels, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, sample_size=6)
    model = small(torch.float32, in_channels=4, out_channels=out_channels, num_embeds_ada_norm=1000)
    pipeline = DiTPipeline(model, vae.eval(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "squeezeheads.models.mdt",
        "MDTTransformer2DModel",
    ]
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = []
    for each in (pipeline, loaded):
        gen = torch.Generator().manual_seed(0)
        settings = {"guidance_scale": guidance, "num_inference_steps": 3, "output_type": "pt"}
        with watching(each.transformer, "class_embedder") as calls:
            images.append(each([3, 7], generator=gen, **settings).images)
        assert calls[0][1][0].tolist() == [3, 7] + [1000, 1000] * (guidance > 1)
    assert images[0].shape == (2, 3, 6, 6) and torch.equal(*images)


@passes
def test_gradient_checkpointing_gives_the_same_gradients_and_records_once(keep):
    model, batch = small().train(), inputs()
    results = []
    for enabled in (False, True):
        if enabled:
            model.enable_gradient_checkpointing()
        with watching(model, ".to_q") as calls:
            with record_attention(model) as recording:
                out = model(**batch, keep=keep).sample
            loss = out.square().mean() + sum(rec.maps().square().sum() for rec in recording)
            results.append((recording.names, gradients(model, loss), out.detach()))
        assert len(calls) == len(recording) * (2 if enabled else 1)
    assert results[1][0] == results[0][0]
    torch.testing.assert_close(results[1][1:], results[0][1:])


# -------------------------------------------------------------------------------------------------------- recording


def test_layers_are_recorded_in_the_order_in_which_they_run_with_their_output_projections():
    model, batch = small(torch.float32), inputs(torch.float32)
    unmasked = ["encoder_in_blocks.0", "encoder_in_blocks.1", "encoder_out_blocks.0", "encoder_out_blocks.1"]
    decoder = [f"decoder_blocks.{i}" for i in range(3)]
    for keep, names, tokens in (
        (None, unmasked + decoder, [9] * 7),
        (KEEP, [*unmasked, "side_block", *decoder], [5] * 4 + [9] * 4),
    ):
        with torch.no_grad(), record_attention(model) as recording:
            model(**batch, keep=keep)
        assert recording.names == [f"{name}.attn" for name in names]
        assert [rec.num_queries for rec in recording] == tokens
        for rec in recording:
            weight = model.get_submodule(rec.name).to_out.weight.T.reshape(2, 6, 12)
            torch.testing.assert_close(rec.output_weight, weight)


@passes
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_squeezed_heads_of_teacher_and_student_equal_the_dense_reference(keep, heads):
    teacher = small(seed=1, num_attention_heads=3, attention_head_dim=4)
    student = small(num_attention_heads=heads, attention_head_dim=12 // heads).train()
    with torch.no_grad(), record_attention(teacher) as taught:
        teacher(**inputs(), keep=keep)
    results = []
    for implementation in ("reference", "tiled"):
        with record_attention(student) as learned:
            student(**inputs(), keep=keep)
        terms = [
            attention_divergence(
                mine, theirs, mixing_matrix(theirs, group_heads(3, heads)), implementation=implementation
            )
            for mine, theirs in zip(learned, taught, strict=True)
        ]
        results.append((sum(terms).detach(), gradients(student, sum(terms))))
    torch.testing.assert_close(results[1], results[0])
    total, found = results[0]
    assert total > 0.01
    # The last layer's maps depend on all that runs before them, and on its own position bias.
    assert found["decoder_blocks.2.attn.relative_position_bias"].abs().max() > 1e-6
    assert (keep is None) == ("mask_token" not in found)


@passes
def test_a_student_that_is_its_teacher_has_nothing_to_learn(keep):
    model, batch = small(), inputs()
    with torch.no_grad(), record_attention(model) as taught:
        model(**batch, keep=keep)
    with record_attention(model) as learned:
        model(**batch, keep=keep)
    for mine, theirs in zip(learned, taught, strict=True):
        mix = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
        assert attention_divergence(mine, theirs, mix).abs() < 1e-12


# --------------------------------------------------------------------------------------------------------- learning


LABELS = torch.arange(16)


def velocity_error(model, scheduler, images, generator, keep):
    """Mean square, over images that repeat the sixteen in order, at timesteps and with noise of their own."""
    noise = torch.randn(images.shape, generator=generator)
    timestep = torch.randint(1000, (len(images),), generator=generator)
    noisy = scheduler.add_noise(images, noise, timestep)
    velocity = model(noisy, timestep, LABELS.repeat(len(images) // 16), keep=keep).sample
    return F.mse_loss(velocity, scheduler.get_velocity(images, noise, timestep))


@pytest.mark.slow
def test_it_overfits_sixteen_images_and_samples_each_by_its_label():
    images = torch.tensor(load_digits().images[:16, None] / 8 - 1, dtype=torch.float32)
    generator, steps = torch.Generator().manual_seed(0), 200
    torch.manual_seed(0)
    model = MDTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        num_layers=3,
        num_decoder_layers=1,
        sample_size=8,
        num_embeds_ada_norm=16,
    ).train()
    # Velocity and not noise: it can be learned in seconds at every timestep.
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    losses = []
    for _ in range(steps):
        keep = draw_kept_tokens(32, 16, draw_mask_ratio(generator), generator)
        errors = [velocity_error(model, scheduler, images.repeat(2, 1, 1, 1), generator, each) for each in (None, keep)]
        optimizer.zero_grad()
        sum(errors).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append([error.item() for error in errors])
    assert min(losses[0]) > 0.5
    assert torch.tensor(losses[-10:]).mean(0).max() < 0.1

    model.eval()
    with torch.no_grad():
        sample = torch.randn(images.shape, generator=generator)
        scheduler.set_timesteps(50)
        for timestep in scheduler.timesteps:
            velocity = model(sample, timestep.expand(16), LABELS).sample
            sample = scheduler.step(velocity, timestep, sample).prev_sample
    distances = (sample[:, None] - images[None]).square().mean((2, 3, 4))
    assert torch.equal(distances.argmin(1), LABELS)
    assert distances.diag().mean() < 0.1 * distances.mean()


# -------------------------------------------------------------------------------------------------------- packaging


def test_without_diffusers_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import squeezeheads\n"
        "try:\n    import squeezeheads.models\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'diffusers'" in done.stdout and "squeezeheads[diffusion]" in done.stdout, done.stderr
