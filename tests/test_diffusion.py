"""Diffusion: losses against textbook formulas, draws that are shared and repeat, denoisers as students and teachers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from squeezeheads import (
    Distillation,
    HiddenStates,
    OrthogonalProjection,
    PredictionMatching,
    SqueezedHeads,
    SqueezedRelations,
    SqueezeTrainer,
    TaskLoss,
    record_attention,
    squeezed_attention_loss,
)
from squeezeheads.diffusion.denoiser import Denoiser, DenoiserConfig, build_model, load_config, load_model
from squeezeheads.diffusion.draws import Noising, SeededImages, two_passes
from squeezeheads.diffusion.loss import DiffusionLoss

STEPS = 50


def betas(steps: int = STEPS) -> torch.Tensor:
    return torch.linspace(1e-3, 0.2, steps, dtype=torch.float64)


def noised(batch: int = 6, channels: int = 2, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(batch, channels, size, size, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    return {"noise": noise, "clean": clean, "timestep": torch.tensor([0, 1, 2, 20, 48, 49])[:batch]}


def denoiser(heads: int = 2, layers: int = 2, seed: int = 0, loss: DiffusionLoss | None = None, **changes) -> Denoiser:
    """A DiT for images (1, 8, 8) of 10 classes, 16 tokens, with a learned variance. Weights random everywhere: as DiT
    initialises it, it would predict 0."""
    torch.manual_seed(seed)
    options = {
        "num_attention_heads": heads, "attention_head_dim": 8, "in_channels": 1, "out_channels": 2, "sample_size": 8,
        "num_layers": layers, "patch_size": 2, "num_embeds_ada_norm": 10, **changes,
    }  # fmt: skip
    return Denoiser(DiTTransformer2DModel(**options), loss or DiffusionLoss(betas()))


def scheduler(steps: int = STEPS) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=steps, trained_betas=betas(steps).numpy())


def images(count: int = 24, seed: int = 0) -> SeededImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    return SeededImages(pixels, torch.randint(0, 10, (count,), generator=generator))


def noising(**changes) -> Noising:
    return Noising(scheduler(), 10, **{"label_drop": 0.3, **changes})


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    samples = images()
    return noising()([samples[i] for i in range(count)])


# -- losses ----------------------------------------------------------------------------------------------------------


def textbook_kl(prediction: torch.Tensor, noise, clean, timestep) -> torch.Tensor:
    """KL(q(x_{t−1} | x_t, x_0) ‖ N(μ(x_t, ε̂), σ²)) in bits per element, from Bayes' rule for Gaussians: the prior of
    x_{t−1} given x_0 times the likelihood of x_t given x_{t−1}, precision added to precision. t counts from 1."""
    channels = noise.shape[1]
    b = betas()
    result = []
    for sample, step in enumerate(timestep.tolist()):
        alpha, beta = 1 - b[step], b[step]
        kept = torch.prod(1 - b[: step + 1])
        kept_before = torch.prod(1 - b[:step]) if step else torch.tensor(1.0, dtype=torch.float64)

        def posterior(x_0, x_t, alpha=alpha, beta=beta, kept_before=kept_before):
            prior, likelihood = 1 / (1 - kept_before), alpha / beta
            precision = prior + likelihood
            mean = (prior * kept_before.sqrt() * x_0 + likelihood * x_t / alpha.sqrt()) / precision
            return mean, 1 / precision

        x_t = kept.sqrt() * clean[sample] + (1 - kept).sqrt() * noise[sample]
        guess, v = prediction[sample, :channels].detach(), prediction[sample, channels:]
        guess_x_0 = (x_t - (1 - kept).sqrt() * guess) / kept.sqrt()
        true_mean, true_variance = posterior(clean[sample], x_t)
        mean, _ = posterior(guess_x_0, x_t)
        share = 0.5 * (v + 1)
        variance = beta**share * true_variance ** (1 - share)
        true = torch.distributions.Normal(true_mean, true_variance.sqrt())
        model = torch.distributions.Normal(mean, variance.sqrt())
        result.append(torch.distributions.kl_divergence(true, model).mean() / math.log(2))
    return torch.stack(result)


def test_variational_term_is_the_textbooks_kl_with_its_gradient():
    given = noised()
    given = {key: value[1:] for key, value in given.items()}  # t > 0
    prediction = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, values = [], []
    for compute in (
        lambda p: textbook_kl(p, **given),
        lambda p: DiffusionLoss(betas()).variational_term(p[:, :2].detach(), p[:, 2:], *given.values()),
    ):
        p = prediction.clone().requires_grad_()
        value = compute(p)
        (grad,) = torch.autograd.grad(value.square().sum(), p)
        values.append(value), grads.append(grad)
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    assert (grads[0][:, :2] == 0).all() and (grads[0][:, 2:] != 0).all()


@pytest.mark.parametrize("levels", [17, 256])
def test_first_step_is_the_likelihood_of_the_level(levels):
    """Against the normal's distribution function; a perfect mean with a wide bin leaves 0 bits."""
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(0, levels, (4, 1, 5, 5), generator=generator)
    index[0, 0, 0] = torch.tensor([0, 0, levels - 1, levels - 1, 1])
    clean = index.double() / (levels - 1) * 2 - 1
    noise, guess = (torch.randn(clean.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    v = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    b = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
    x_t = (1 - b[0]).sqrt() * clean + b[0].sqrt() * noise
    mean = (x_t - b[0].sqrt() * guess) / (1 - b[0]).sqrt()
    second = b[1] * b[0] / (1 - (1 - b[0]) * (1 - b[1]))  # variance of the posterior at the second step
    half = 1 / (levels - 1)

    def expected(v: torch.Tensor) -> torch.Tensor:
        share = (v + 1) / 2
        normal = torch.distributions.Normal(mean, (b[0] ** share * second ** (1 - share)).sqrt())
        upper = torch.where(index == levels - 1, 1.0, normal.cdf(clean + half))
        lower = torch.where(index == 0, 0.0, normal.cdf(clean - half))
        return -(upper - lower).log2().flatten(1).mean(1)

    loss = DiffusionLoss(betas(), levels=levels)
    v.requires_grad_()
    value = loss.variational_term(guess, v, noise, clean, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(value, expected(v), rtol=1e-6, atol=1e-8)
    grad, oracle = (torch.autograd.grad(bits.sum(), v)[0] for bits in (value, expected(v)))
    torch.testing.assert_close(grad, oracle, rtol=1e-5, atol=1e-8)


def test_far_from_the_level_value_and_gradient_stay_finite():
    clean = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    loss = DiffusionLoss(torch.linspace(1e-4, 0.02, 1000))
    v = torch.full_like(clean, -1.0, requires_grad=True)
    value = loss.variational_term(torch.full_like(clean, 300.0), v, torch.zeros_like(clean), clean, torch.tensor([0]))
    value.sum().backward()
    assert value.isfinite().all() and value > 100 and v.grad.isfinite().all()
    assert v.grad[0, 0] == 0 and (v.grad[0, 1:] < 0).all(), "below the lowest level is as good as at it"


def test_parts_add_up_in_their_units():
    given = noised()
    prediction = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    squared = (prediction[:, :2] - given["noise"]).square().mean((1, 2, 3))
    bound = DiffusionLoss(betas()).variational_term(prediction[:, :2], prediction[:, 2:], *given.values())
    loss = DiffusionLoss(betas(), variational_weight=0.004)
    torch.testing.assert_close(loss(prediction, **given), squared + 0.004 * STEPS * bound)
    torch.testing.assert_close(loss(prediction[:, :2], **given), squared)
    torch.testing.assert_close(DiffusionLoss(betas(), variational_weight=0)(prediction, **given), squared)


def test_the_variational_term_trains_the_variance_alone():
    given = noised()
    prediction = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(DiffusionLoss(betas())(prediction, **given).sum(), prediction)
    expected = 2 * (prediction[:, :2] - given["noise"]) / (2 * 3 * 3)
    torch.testing.assert_close(grad[:, :2], expected.detach())
    assert (grad[:, 2:] != 0).all()


def test_min_snr_by_hand():
    """Two steps of β = ½: ᾱ = ½, ¼; SNR = 1, ⅓. With k = ½: weights ½ and 1."""
    loss = DiffusionLoss(torch.tensor([0.5, 0.5]), min_snr=0.5)
    noise = torch.zeros(2, 1, 2, 2)
    prediction = torch.tensor([2.0, 3.0])[:, None, None, None].expand(2, 1, 2, 2).clone().requires_grad_()
    value = loss(prediction, noise, noise, torch.tensor([0, 1]))
    torch.testing.assert_close(value, torch.tensor([2.0, 9.0]))
    (grad,) = torch.autograd.grad(value.sum(), prediction)
    torch.testing.assert_close(grad[:, 0, 0, 0], torch.tensor([0.5 * 2 * 2 / 4, 2 * 3 / 4]))


def test_min_snr_leaves_the_variational_term_alone():
    given = noised()
    prediction = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    plain, weighed = (DiffusionLoss(betas(), min_snr=k)(prediction, **given) for k in (None, 0.5))
    bare, bare_weighed = (DiffusionLoss(betas(), min_snr=k)(prediction[:, :2], **given) for k in (None, 0.5))
    torch.testing.assert_close(plain - weighed, bare - bare_weighed)
    assert (bare_weighed < bare).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variational_weight": -1.0}, "variational_weight=-1"),
        ({"min_snr": 0.0}, "min_snr=0"),
        ({"levels": 1}, "levels=1"),
        ({"betas": torch.tensor([0.1, 1.0])}, "betas"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(**{"betas": betas(), **options})


def test_a_prediction_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="predicts 3 channels for images of 2"):
        DiffusionLoss(betas())(torch.zeros(6, 3, 3, 3), **noised())


# -- denoisers -------------------------------------------------------------------------------------------------------


def test_prediction_is_the_inner_models_and_loss_that_of_the_batch():
    model, given = denoiser(), batch()
    model.eval()
    out = model(**given)
    plain = model.model(given["hidden_states"], timestep=given["timestep"], class_labels=given["class_labels"]).sample
    assert torch.equal(out.logits, plain)
    each = model.loss(plain, given["noise"], given["clean"], given["timestep"])
    torch.testing.assert_close(out.loss, each.mean())
    assert model(given["hidden_states"], given["timestep"], given["class_labels"]).loss is None


def test_labels_are_dropped_outside_alone():
    """In training diffusers' own embedding would drop a tenth of them, other ones in each block."""
    model, given = denoiser(), batch(24)
    model.train()
    assert torch.equal(model(**given).logits, model(**given).logits)


def test_hidden_states_are_the_tokens_after_each_block():
    model, given = denoiser(layers=3), batch()
    out = model(**given, output_hidden_states=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(6, 16, 16)] * 4
    assert torch.equal(out.hidden_states[0], model.model.pos_embed(given["hidden_states"]))
    block = model.model.transformer_blocks[2]
    after = block(out.hidden_states[2], timestep=given["timestep"], class_labels=given["class_labels"])
    assert torch.equal(out.hidden_states[3], after)
    assert not any(m._forward_hooks for m in model.modules())
    assert model(**given).hidden_states is None


def test_saved_model_is_diffusers_own(tmp_path):
    model, given = denoiser().eval(), batch()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    opened = DiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=True)
    plain = opened(given["hidden_states"], timestep=given["timestep"], class_labels=given["class_labels"]).sample
    assert torch.equal(plain, model(**given).logits)
    config, _ = load_config(str(tmp_path))
    assert config == model.config and config.model_type == "dit" and config.options["num_layers"] == 2
    assert torch.equal(Denoiser(load_model(str(tmp_path))).eval()(**given).logits, model(**given).logits)


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel, expected one of DiTTransformer2DModel, MDT"):
        load_config(str(tmp_path))
    with pytest.raises(TypeError, match="Linear is no denoiser"):
        Denoiser(nn.Linear(2, 2))


def test_a_new_dit_starts_as_the_source_says():
    torch.manual_seed(0)
    options = denoiser().config.options
    model = Denoiser(build_model(DenoiserConfig("dit", options)))
    out = model(**batch(), output_hidden_states=True)
    assert (out.logits == 0).all(), "the prediction starts at 0"
    assert all(torch.equal(state, out.hidden_states[0]) for state in out.hidden_states), "blocks start as identity"
    assert model.model.transformer_blocks[0].attn1.to_q.weight.std() > 0.1


# -- draws -----------------------------------------------------------------------------------------------------------


def test_draws_belong_to_samples_and_epochs():
    """Whatever batch a sample is in, it has the same draws; another epoch and another seed give others."""
    samples, collate = images(), noising()
    whole = collate([samples[i] for i in range(6)])
    parts = [collate([samples[i] for i in part]) for part in ((0, 1), (2,), (3, 4, 5))]
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value), key
    samples.set_epoch(1)
    later = collate([samples[i] for i in range(6)])
    other = collate([images().seeded(7)[i] for i in range(6)])
    for draws in (later, other):
        assert torch.equal(draws["clean"], whole["clean"])
        assert not torch.equal(draws["noise"], whole["noise"]) and not torch.equal(draws["timestep"], whole["timestep"])


def test_noisy_images_are_made_of_what_the_batch_says():
    given = batch(24)
    kept = torch.cumprod(1 - betas(), 0)[given["timestep"]].float()[:, None, None, None]
    torch.testing.assert_close(
        given["hidden_states"], kept.sqrt() * given["clean"] + (1 - kept).sqrt() * given["noise"]
    )
    assert given["timestep"].min() >= 0 and given["timestep"].max() < STEPS


def test_labels_are_dropped_at_the_rate_that_was_asked_for():
    samples = images(1000)
    for rate in (0.0, 0.25, 1.0):
        labels = noising(label_drop=rate)([samples[i] for i in range(1000)])["class_labels"]
        assert ((labels == 10).float().mean() - rate).abs() < 0.05
        assert torch.equal(labels[labels != 10], samples.labels[labels != 10])


def test_masked_pass_has_other_noise_and_the_same_step_and_label():
    samples = images()
    drawn = [noising(tokens=16)([samples[i] for i in range(s, s + 4)]) for s in range(20)]
    counts = {given["keep"].shape[1] for given in drawn}
    assert counts <= {8, 9, 10, 11} and len(counts) > 1, "shares of 0.3 to 0.5 are masked"
    given = drawn[0]
    full, masked = two_passes(given)
    assert set(full) == {"timestep", "class_labels", "clean", "hidden_states", "noise"}
    assert set(masked) == {*full, "keep"}
    for key in ("timestep", "class_labels", "clean"):
        assert full[key] is masked[key]
    assert not torch.equal(full["noise"], masked["noise"])
    kept = torch.cumprod(1 - betas(), 0)[masked["timestep"]].float()[:, None, None, None]
    made = kept.sqrt() * masked["clean"] + (1 - kept).sqrt() * masked["noise"]
    torch.testing.assert_close(masked["hidden_states"], made)
    keep = masked["keep"]
    assert (keep[:, 1:] > keep[:, :-1]).all() and keep.max() < 16 and not torch.equal(keep[0], keep[1])
    assert len(two_passes(noising()([samples[0]]))) == 1


# -- distillation ----------------------------------------------------------------------------------------------------


def objectives() -> dict:
    return {
        "task": TaskLoss(0.5),
        "matching": PredictionMatching(0.5),
        "attention": SqueezedHeads(calibration_batches=1),
        "relations": SqueezedRelations(calibration_batches=1),
    }


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """Were noise, step or label drawn anew for either, it would."""
    model = denoiser(heads=4)
    compared = {name: objectives()[name] for name in ("task", "matching", "attention")}
    out = Distillation(copy.deepcopy(model), compared)(model.train(), batch())
    assert abs(out.terms["attention"]) < 1e-6
    assert out.terms["matching"] == 0 and out.terms["task"] > 0


def test_recorded_maps_are_those_of_the_eager_formula():
    model, given = denoiser(heads=4).eval(), batch()
    seen = {}
    attention = model.model.transformer_blocks[1].attn1
    handle = attention.register_forward_pre_hook(lambda m, args, kw: seen.update(x=args[0]), with_kwargs=True)
    with record_attention(model) as recording:
        model(**given)
    handle.remove()
    assert recording.names == [f"model.transformer_blocks.{i}.attn1" for i in range(2)]
    query, key = (layer(seen["x"]).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k))
    eager = (query @ key.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(recording[1].maps(), eager)
    heads = attention.to_out[0].weight.T.view(4, 8, 32)
    torch.testing.assert_close(recording[1].output_weight, heads, rtol=1e-4, atol=1e-5)


def test_squeezed_loss_and_gradients_are_the_dense_ones():
    """Teacher of 4 heads, student of 2, in float64: tiled against reference."""
    given = {key: v.double() if v.is_floating_point() else v for key, v in batch().items()}
    teacher, student = denoiser(4, seed=1).double(), denoiser(2).double()
    results = []
    for implementation in ("reference", "tiled"):
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(**given)
        with record_attention(student) as learned:
            student(**given)
        loss = squeezed_attention_loss(learned, taught, schedule="progressive", implementation=implementation)
        student.zero_grad()
        loss.backward()
        grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        results.append((loss.detach(), grads))
    torch.testing.assert_close(*(value for value, _ in results), rtol=1e-9, atol=1e-12)
    for a, b in zip(*(grads for _, grads in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_matching_is_the_mean_squared_difference_of_the_noise():
    student, teacher, given = denoiser(2).train(), denoiser(4, seed=1), batch()
    for variance, channels in ((False, 1), (True, 2)):
        out = Distillation(teacher, {"matching": PredictionMatching(variance=variance)})(student, given)
        mine, theirs = (m(**given).logits[:, :channels] for m in (student, teacher))
        difference = mine - theirs.detach()
        torch.testing.assert_close(out.loss, (difference**2).sum() / difference.numel())
        student.zero_grad()
        (expected,) = torch.autograd.grad((difference**2).mean(), student.model.proj_out_2.weight)
        out.loss.backward()
        torch.testing.assert_close(student.model.proj_out_2.weight.grad, expected)


def test_matching_takes_the_mean_of_several_teachers():
    student, given = denoiser(2), batch()
    teachers = {"a": denoiser(4, seed=1), "b": denoiser(2, seed=2)}
    out = Distillation(teachers, {"matching": PredictionMatching()})(student, given)
    mean = sum(t(**given).logits[:, :1] for t in teachers.values()) / 2
    torch.testing.assert_close(out.terms["matching"], (student(**given).logits[:, :1] - mean).square().mean().detach())


def test_matching_names_what_cannot_be_compared():
    other = denoiser(2, out_channels=1)
    objective = {"matching": PredictionMatching(variance=True)}
    with pytest.raises(ValueError, match=r"student predicts \(6, 2, 8, 8\), the teacher \(6, 1, 8, 8\)"):
        Distillation(other, objective)(denoiser(2), batch())
    assert Distillation(other, {"matching": PredictionMatching()})(denoiser(2), batch()).loss.isfinite()


@pytest.mark.parametrize("kind", [HiddenStates, OrthogonalProjection])
def test_features_of_a_denoiser_are_compared(kind):
    student, teacher, given = denoiser(2), denoiser(4, seed=1), batch()
    objective = kind(layers=[[1, 1]], normalisation="none")
    distillation = Distillation(teacher, {"features": objective})
    distillation.prepare(student, [given])
    out = distillation(student, given)
    mine, theirs = (m(**given, output_hidden_states=True).hidden_states[2] for m in (student, teacher))
    (projected,) = objective.projector([mine])
    torch.testing.assert_close(out.terms["features"], (projected - theirs).square().mean().detach())
    out.loss.backward()
    assert student.model.transformer_blocks[1].ff.net[2].weight.grad.abs().sum() > 0


# -- MDT: two passes ------------------------------------------------------------------------------------------------


def mdt(heads: int = 2, layers: int = 4, seed: int = 0) -> Denoiser:
    """As ``denoiser``: 2 layers of the encoder, the others the decoder's. Modulations are random too, or nothing would
    reach the output."""
    options = {
        "num_attention_heads": heads, "attention_head_dim": 8, "in_channels": 1, "out_channels": 2, "sample_size": 8,
        "num_layers": layers, "num_decoder_layers": layers - 2, "patch_size": 2, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = build_model(DenoiserConfig("mdt", options))
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            nn.init.normal_(parameter, std=0.2)
    return Denoiser(model, DiffusionLoss(betas()))


def masked_passes(count: int = 6) -> list[dict]:
    samples = images()
    return two_passes(noising(tokens=16)([samples[i] for i in range(count)]))


def test_an_mdt_that_is_its_teacher_has_nothing_to_learn_in_either_pass():
    model = mdt(heads=4)
    compared = {name: objectives()[name] for name in ("task", "matching", "attention")}
    distillation = Distillation(copy.deepcopy(model), compared)
    full, masked = (distillation(model.train(), given) for given in masked_passes())
    for out in (full, masked):
        # Not exactly 0: the kernel takes a bias that wants a gradient another way than one that does not.
        assert abs(out.terms["attention"]) < 1e-6 and out.terms["matching"] < 1e-10
    assert full.terms["task"] != masked.terms["task"]


def test_layers_are_the_planned_ones_in_the_masked_pass_too():
    """It runs one layer more, before the decoder: positions there are others than in the plan."""
    student, teacher = mdt(2), mdt(4, seed=1)
    full, masked = masked_passes()
    objective = SqueezedHeads(schedule="progressive")
    distillation = Distillation(teacher, {"attention": objective})
    distillation.prepare(student, [full])
    assert [p.student_layer.split(".")[1] for p in objective.plan] == [
        "encoder_in_blocks", "encoder_out_blocks", "decoder_blocks", "decoder_blocks",
    ]  # fmt: skip
    for given, kept in ((full, 16), (masked, masked["keep"].shape[1])):
        out = distillation(student, given)
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(**given)
        with record_attention(student) as learned:
            student(**given)
        assert len(learned) == (4 if given is full else 5) and learned[0].num_queries == kept
        parts = [
            squeezed_attention_loss([mine], [theirs], schedule="progressive", implementation="reference")
            for mine, theirs in zip(learned, taught, strict=True)
            if "side_block" not in mine.name
        ]
        torch.testing.assert_close(out.terms["attention"], torch.stack(parts).mean().detach(), rtol=1e-5, atol=1e-7)


def test_gradients_of_both_passes_are_the_dense_ones():
    student, teacher = mdt(2).double(), mdt(4, seed=1).double()
    for given in masked_passes():
        given = {key: v.double() if v.is_floating_point() else v for key, v in given.items()}
        grads = []
        for implementation in ("reference", "tiled"):
            with torch.no_grad(), record_attention(teacher) as taught:
                teacher(**given)
            with record_attention(student) as learned:
                student(**given)
            student.zero_grad()
            squeezed_attention_loss(learned, taught, schedule="progressive", implementation=implementation).backward()
            grads.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        assert any("relative_position_bias" in name for name in grads[0])
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-12, msg=name)


def test_features_of_mdt_are_compared_in_both_passes():
    student, teacher = mdt(2), mdt(4, seed=1)
    passes = masked_passes()
    distillation = Distillation(teacher, {"features": HiddenStates()})
    distillation.prepare(student, passes[:1])
    for given in passes:
        assert distillation(student, given).loss > 0
        states = student(**given, output_hidden_states=True).hidden_states
        kept = given["keep"].shape[1] if "keep" in given else 16
        assert [state.shape[1] for state in states] == [16, kept, kept, 16, 16]


def test_mdt_trains_in_two_passes_however_a_batch_is_cut(tmp_path):
    """With one share of masked tokens for all: it is drawn for each part of a batch."""
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path / str(size), collate=noising(tokens=16, mask_ratio=(0.4, 0.4)), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_steps=3, models=(mdt(2), mdt(4, layers=6, seed=1)),
            layers=[[0, 0], [1, 1], [2, 3], [3, 5]],
        )  # fmt: skip
        run.train()
        runs.append(logged(run))
    for whole, parts in zip(*runs, strict=True):
        assert parts == pytest.approx(whole, rel=2e-4, abs=1e-6)


# -- trainer ---------------------------------------------------------------------------------------------------------


def trainer(
    folder: Path,
    collate: Noising | None = None,
    callbacks=None,
    passes=two_passes,
    models=None,
    layers=None,
    objectives_used=None,
    train_dataset=None,
    **changes,
) -> SqueezeTrainer:
    """``layers``: pairs in place of uniform ones, with groups that do not depend on calibration batches."""
    student, teacher = models or (denoiser(2), denoiser(4, layers=3, seed=1))
    compared = objectives()
    if layers is not None:
        compared |= {
            "attention": SqueezedHeads(schedule="progressive", layers=layers),
            "relations": SqueezedRelations(schedule="progressive", layers=layers),
        }
    if objectives_used is not None:
        compared = {name: compared[name] for name in objectives_used}
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "seed": 3, "data_seed": 3, "remove_unused_columns": False, "max_grad_norm": 0.0, **changes,
    }  # fmt: skip
    return SqueezeTrainer(
        model=student,
        teacher=teacher,
        args=TrainingArguments(**options),
        objectives=compared,
        passes=passes,
        train_dataset=images(20) if train_dataset is None else train_dataset,
        data_collator=collate or noising(),
        callbacks=callbacks,
    )


def logged(run: SqueezeTrainer) -> list[dict]:
    keys = ("loss", "grad_norm", *objectives())
    return [{key: entry[key] for key in keys} for entry in run.state.log_history if "loss" in entry]


def twice(given):
    """Two passes that differ, without a model that can mask."""
    second = {**given, "timestep": given["timestep"] // 2}
    return [given, second]


def test_the_loss_is_the_sum_over_passes_and_terms_are_means(tmp_path):
    run = trainer(tmp_path, passes=twice, max_steps=1)
    run.train()
    (entry,) = logged(run)
    total = 0.5 * entry["task"] + 0.5 * entry["matching"] + entry["attention"] + entry["relations"]
    assert entry["loss"] == pytest.approx(2 * total, rel=1e-5)
    fresh = trainer(tmp_path, passes=twice)
    fresh.prepare()
    given = next(iter(fresh.get_train_dataloader()))
    terms = [fresh.distillation(fresh.model, part).terms for part in twice(given)]
    assert terms[0]["task"] != terms[1]["task"]
    for name in objectives():
        assert entry[name] == pytest.approx(float(terms[0][name] + terms[1][name]) / 2, rel=1e-5)


def test_passes_and_accumulation_change_nothing(tmp_path):
    """A batch of 8 and four of 2, one pass and two; the last batch of an epoch is smaller (20 images)."""
    for passes in (two_passes, twice):
        runs = []
        for size, steps in ((8, 1), (2, 4)):
            run = trainer(
                tmp_path / str(size), passes=passes, per_device_train_batch_size=size,
                gradient_accumulation_steps=steps, max_steps=5, layers="uniform",
            )  # fmt: skip
            run.train()
            runs.append(logged(run))
        for whole, parts in zip(*runs, strict=True):
            assert parts == pytest.approx(whole, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_run_draws_what_an_undisturbed_one_does(tmp_path, stop):
    """Stopped in the first epoch of 3 steps, at its end, and in the second."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == stop:
                control.should_training_stop = True

    whole = trainer(tmp_path / "whole", max_steps=7)
    whole.train()
    saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": stop}
    trainer(tmp_path / "stopped", callbacks=[Stop()], **saving).train()
    resumed = trainer(tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert len({entry["task"] for entry in logged(whole)}) == 7
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_workers_that_outlive_an_epoch_draw_anew():
    images = SeededImages(torch.zeros(4, 1, 8, 8), torch.arange(4))
    loader = DataLoader(
        images, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=Noising(scheduler(), 10)
    )
    noises = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        noises.append(next(iter(loader))["noise"])
    assert not torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_epochs_draw_anew(tmp_path):
    """Three epochs of one batch: the same images, other noise."""
    seen = []

    class Watch(Noising):
        def __call__(self, samples):
            given = super().__call__(samples)
            seen.append(given)
            return given

    run = trainer(tmp_path, collate=Watch(scheduler(), 10), max_steps=3, per_device_train_batch_size=20)
    run.prepare()
    seen.clear()
    run.train()
    order = [given["clean"].flatten(1).sum(1).argsort() for given in seen]
    noises = [given["noise"][o].sum() for given, o in zip(seen, order, strict=True)]
    assert len(noises) == 3 and len({round(float(n), 4) for n in noises}) == 3
    assert all(torch.equal(given["clean"][o], seen[0]["clean"][order[0]]) for given, o in zip(seen, order, strict=True))
