"""Image generation: the whole job in small for DiT and MDT, sampling, averaged weights, metrics by their formulas."""

from __future__ import annotations

import copy
import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from squeezeheads import PredictionMatching, SqueezedHeads, TaskLoss
from squeezeheads.cli import main
from squeezeheads.diffusion.callbacks import EMA_FILE, AveragedWeights, SampleGrids
from squeezeheads.diffusion.denoiser import Denoiser, DenoiserConfig, build_model
from squeezeheads.diffusion.pipeline import SAMPLERS, ClassConditionalPipeline, generate, make_sampler
from squeezeheads.diffusion.specs import DiffusionSpec, SamplingSpec
from squeezeheads.distillation import Distillation
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation.image_metrics import (
    class_accuracy,
    features_of,
    frechet_distance,
    measure_images,
    precision_and_recall,
)
from squeezeheads.evaluation.image_model import ImageModel
from squeezeheads.evaluation.inception import InceptionMetrics
from squeezeheads.models import MDTTransformer2DModel
from squeezeheads.preflight import check_models
from squeezeheads.recipe import load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.reports.sample_grid import sample_grid
from squeezeheads.tasks import ImageGeneration, Pretrained
from squeezeheads.trainer import SqueezeTrainer
from test_diffusion import batch, denoiser, mdt, trainer
from tiny import classifier, language_model, write_recipe

SMALL = {
    "task": {
        "image_generation": {
            "data": "digits",
            "diffusion": {"ema_decay": 0.9, "steps": 50, "beta_end": 0.2},
            "sampling": {"steps": 3, "images": 20, "grid_every": 2, "grid_columns": 2},
        }
    },
    "teacher": {
        "config": {
            "model_type": "dit",
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 2,
            "patch_size": 4,
        },
        "training": {"max_steps": 3, "batch_size": 16},
    },
    "student": {"config": {"num_attention_heads": 2, "num_layers": 1}},
    "objectives": {"task": {}, "prediction_matching": {}, "attention": {"calibration_batches": 1}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 3, "batch_size": 16, "log_every": 1, "save_every": 2},
    "seeds": [0],
}

# Changes to the small recipe.
MDT = {
    "teacher__config__model_type": "mdt",
    "teacher__config__num_layers": 4,
    "teacher__config__num_decoder_layers": 2,
    "student__config__num_layers": 4,
}


def write(folder: Path, **changes) -> str:
    """The small recipe with changes ``a__b=value``; its path."""
    tree = json.loads(json.dumps({**SMALL, "output": str(folder / "run")}))
    return str(write_recipe(folder / "recipe.yaml", tree, changes))


@pytest.fixture(scope="module", params=["dit", "mdt"])
def finished(request, tmp_path_factory):
    """The small recipe, carried out once with each kind of model."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {}
    if request.param == "mdt":
        changes = {**MDT, "task__image_generation__diffusion__min_snr": 5.0}
    path = write(folder, **changes)
    assert main(["distill", path]) == 0
    return path, folder / "run", request.param


def test_distill_leaves_table_grids_and_plain_students(finished):
    _, output, kind = finished
    results = json.loads((output / "results.json").read_text())
    assert results["metrics"] == ["noise_error", "frechet_distance", "precision", "recall"]
    for name, (run,) in results["students"].items():
        assert 0.5 < run["noise_error"] < 1.5 and run["frechet_distance"] > 0 and run["attention"] > 0
        assert run["validation"].keys() == {"noise_error", "loss"}
        for entry in run["losses"]:
            passes = 2 if kind == "mdt" else 1
            total = entry["task"]
            if name == "distilled":
                total += entry["prediction_matching"] + entry["attention"]
            assert entry["loss"] == pytest.approx(passes * total, rel=1e-4)
    for training in ("teachers/teacher", "students/no-teacher/seed-0", "students/distilled/seed-0"):
        grids = sorted((output / "figures" / "training" / training).iterdir())
        assert [grid.name for grid in grids] == ["step-000002.png", "step-000003.png"]
        assert Image.open(grids[0]).size == (4 * (2 * 9 + 1), 4 * (10 * 9 + 1))
    assert (output / "figures" / "layer-0.png").is_file()
    opened = {"dit": DiTTransformer2DModel, "mdt": MDTTransformer2DModel}[kind].from_pretrained(output / "student")
    assert (opened.config.num_attention_heads, opened.config.out_channels, opened.config.sample_size) == (2, 2, 8)
    names = {p.name for p in (output / "student").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "scheduler"}
    schedule = DDPMScheduler.from_pretrained(output / "student", subfolder="scheduler")
    assert schedule.config.num_train_timesteps == 50 and schedule.config.clip_sample
    assert not list(output.rglob("*.bin")) and not list(output.rglob("*.pt")), "no pickle is left"


def test_evaluate_prints_what_the_run_measured(finished, capsys):
    path, output, _ = finished
    (run,) = json.loads((output / "results.json").read_text())["students"]["distilled"]
    assert main(["evaluate", path]) == 0
    metrics = json.loads(capsys.readouterr().out)
    for name in ("noise_error", "frechet_distance", "precision", "recall"):
        assert metrics[name] == pytest.approx(run[name], rel=1e-6)
    assert metrics["attention"] == pytest.approx(run["attention"], rel=1e-5)


@pytest.mark.slow
def test_students_of_a_seed_see_the_same_images_noise_and_steps(finished, tmp_path):
    """With the teacher's terms weighed 0, the distilled student is the one without a teacher, bit for bit."""
    path, output, _ = finished
    tree = yaml.safe_load(Path(path).read_text())
    tree["objectives"] = {"task": {}, "prediction_matching": {"weight": 0.0}, "attention": {"weight": 0.0}}
    tree["output"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 0
    name = "seed-0/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / "run" / "students" / arm / name) for arm in ("no-teacher", "distilled"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = load_file(output / "students" / "distilled" / name)
    assert any(not torch.equal(a[key], other[key]) for key in a), "or nothing was distilled"


def test_the_noise_error_is_the_mean_over_the_split(finished):
    path, output, _ = finished
    task = load_recipe(path).chosen_task
    splits = task.load_data(Pretrained({"teacher": None}))
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [1000, 297, 500]
    student = task.load(str(output / "student"))
    values = [task.score(student, splits.test, size) for size in (500, 64)]
    assert values[0] == pytest.approx(values[1], rel=1e-5), "however it is cut"
    given = task.collate([splits.test[i] for i in range(500)])
    assert given["class_labels"].max() < 10, "no label is dropped"
    with torch.no_grad():
        out = student.eval()(**given).logits[:, :1]
    assert values[0]["noise_error"] == pytest.approx((out - given["noise"]).square().mean().item(), rel=1e-5)


MISTAKES = {
    "unknown kind": ({"teacher__config__model_type": "vit"}, "teacher.config.model_type='vit' is unknown"),
    "unknown option": ({"student__config__num_heads": 2}, "student.config.num_heads is no option of DiT"),
    "head count of 0": ({"student__config__num_attention_heads": 0}, "student.config.num_attention_heads=0"),
    "patch that does not divide": ({"teacher__config__patch_size": 3}, "sample_size=8 is no multiple of patch_size=3"),
    "other tokens": ({"student__config__patch_size": 2}, "16 queries × 16 keys against 4 × 4"),
    "other classes": ({"student__config__num_embeds_ada_norm": 5}, "num_embeds_ada_norm=5, the data 10"),
    "other channels": ({"student__config__out_channels": 3}, "out_channels=3"),
    "eager": ({"student__attn_implementation": "eager"}, "run on sdpa"),
    "label drop": ({"task__image_generation__diffusion__label_drop": 1.5}, "label_drop=1.5"),
    "mask ratio": ({"task__image_generation__diffusion__mask_ratio": [0.5, 0.3]}, "mask_ratio=[0.5, 0.3]"),
    "decay": ({"task__image_generation__diffusion__ema_decay": 1.0}, "ema_decay=1.0"),
    "snr": ({"task__image_generation__diffusion__min_snr": -1.0}, "min_snr=-1.0"),
    "betas": ({"task__image_generation__diffusion__beta_end": 2.0}, "beta_end=2.0"),
    "more steps than the schedule has": (
        {"task__image_generation__sampling__steps": 100},
        "sampling.steps=100: expected at most 50 for the sampler ddim where diffusion.steps=50",
    ),
    "two images": ({"task__image_generation__sampling__images": 2}, "images=2: expected at least 4"),
    "more images than the test split": (
        {"task__image_generation__sampling__images": 501},
        "sampling.images=501: they are compared with as many of the test split, which has 500",
    ),
    "sampler": ({"task__image_generation__sampling__sampler": "euler"}, "euler"),
    "no such teacher": ({"teacher": {"path": "nowhere/at/all"}}, "nowhere/at/all"),
    "odd encoder": (
        {
            "teacher__config__model_type": "mdt",
            "teacher__config__num_layers": 3,
            "teacher__config__num_decoder_layers": 2,
        },
        "leaves 1 layers for the encoder",
    ),
    "guidance of a new teacher": (
        {"task__image_generation__diffusion__label_drop": 0.0, "task__image_generation__sampling__guidance": 2.0},
        "teacher.config makes a new model, and sampling.guidance=2.0 asks",
    ),
    "logits of diffusion": ({"objectives": {"logits": {}}}, "objectives.logits compares distributions over classes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_distill_refuses_before_training(tmp_path, capsys, mistake):
    changes, message = MISTAKES[mistake]
    assert main(["distill", write(tmp_path, **changes)]) == 2
    answer = capsys.readouterr().err
    assert message in answer
    assert not (tmp_path / "run").exists(), "something was done first"


def test_layers_that_see_other_tokens_in_the_masked_pass_are_refused(tmp_path, capsys):
    """Uniform pairs of 4 and 8 layers put a decoder layer of the student on an encoder layer of the teacher."""
    changes = {
        "teacher__config__model_type": "mdt",
        "teacher__config__num_layers": 8,
        "teacher__config__num_decoder_layers": 2,
        "student__config__num_layers": 4,
        "teacher__config__patch_size": 2,
    }
    assert main(["distill", write(tmp_path, **changes)]) == 2
    assert "decoder_blocks.0" in capsys.readouterr().err


def tried(path: str) -> None:
    recipe = load_recipe(path)
    task = recipe.chosen_task
    splits = task.load_data(Pretrained({"teacher": None}))
    check_models(Models(task, recipe), recipe, splits)


def test_both_passes_are_tried_with_gradients_and_checkpointed_layers(tmp_path, monkeypatch):
    seen = []

    class Watched(Distillation):
        def __call__(self, student, inputs, **options):
            out = super().__call__(student, inputs, **options)
            seen.append(
                ("keep" in inputs, out.loss.requires_grad, student.training, student.model.gradient_checkpointing)
            )
            return out

    monkeypatch.setattr("squeezeheads.preflight.Distillation", Watched)
    tried(write(tmp_path, **MDT, training__arguments={"gradient_checkpointing": True}))
    assert seen == [(False, True, True, True), (True, True, True, True)] * 2, "two sets of objectives"


@pytest.mark.slow
def test_a_training_with_checkpointed_layers_is_the_same(tmp_path):
    losses = []
    for name, arguments in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        folder = tmp_path / name
        folder.mkdir()
        path = write(folder, **MDT, training__arguments=arguments, task__image_generation__sampling__images=0)
        assert main(["distill", path]) == 0
        runs = json.loads((folder / "run" / "results.json").read_text())["students"]["distilled"]
        losses.append([entry["loss"] for entry in runs[0]["losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointing_that_diffusers_lacks_is_refused():
    with pytest.raises(ValueError, match="every_n_layers=2"):
        denoiser().activation_checkpointing_enable(every_n_layers=2)


def test_a_denoiser_that_comes_back_otherwise_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path)
    save = Denoiser.save_pretrained

    def spoilt(self, folder):
        save(self, folder)
        file = Path(folder) / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["proj_out_2.bias"] += 1
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(Denoiser, "save_pretrained", spoilt)
    with pytest.raises(RecipeError, match=r"student: Denoiser does not come back as it was saved: .*proj_out_2.bias"):
        tried(path)


def test_fingerprints_draw_and_decode_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a sample was asked for")

    prints = []
    for size in (8, 8, 16):
        task = ImageGeneration(data="digits", image_size=size)
        splits = task.load_data(Pretrained({"teacher": None}))
        with monkeypatch.context() as patch:
            patch.setattr("squeezeheads.diffusion.draws.SeededImages.__getitem__", refuse)
            prints.append([task.fingerprint(split) for split in (splits.train, splits.validation, splits.test)])
    assert prints[0] == prints[1] == prints[2] and len(set(prints[0])) == 3
    task = ImageGeneration(data="digits", split_seed=1)
    splits = task.load_data(Pretrained({"teacher": None}))
    assert task.fingerprint(splits.test) not in prints[0]


def test_a_teacher_of_another_noise_schedule_is_refused(tmp_path, capsys):
    """Its folder says so: of a plain model, and of a pipeline with any sampler."""
    model = denoiser(sample_size=8).model
    plain, whole = tmp_path / "plain", tmp_path / "pipeline"
    model.save_pretrained(plain)
    changes = {"teacher": {"path": str(plain)}, "baselines": {}}
    task = load_recipe(write(tmp_path, **changes)).chosen_task  # 50 steps, linear to 0.2
    assert task.pretrained_config(str(plain), "teacher.path").model_type == "dit", "nothing says how it was trained"
    same = DDPMScheduler(num_train_timesteps=50, beta_start=1e-4, beta_end=0.2)
    ClassConditionalPipeline(model, make_sampler("dpm", same, True, pixels=True)).save_pretrained(whole)
    task.pretrained_config(str(whole), "teacher.path")
    for other, folder, words in (
        (
            DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2"),
            plain,
            "50 steps, squaredcos_cap_v2;",
        ),
        (DDIMScheduler(), whole, "1000 steps, linear from 0.0001 to 0.02;"),
        (DDIMScheduler(50, trained_betas=[0.01] * 50), whole, "50 steps of its own;"),
    ):
        other.save_pretrained(folder / "scheduler")
        with pytest.raises(RecipeError) as caught:
            task.pretrained_config(str(folder), "teacher.path")
        assert f"teacher.path='{folder}' was trained with another noise schedule, {words}" in str(caught.value)
        assert "the recipe's is 50 steps, linear from 0.0001 to 0.2. Set steps" in str(caught.value)
    DDIMScheduler(50, beta_end=0.2, prediction_type="v_prediction").save_pretrained(plain / "scheduler")
    assert main(["distill", write(tmp_path, **changes)]) == 2
    assert "predicts v_prediction" in capsys.readouterr().err
    (plain / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(RecipeError, match="its noise schedule cannot be read"):
        task.check_companions(str(plain), "the model")


def test_guidance_needs_dropped_labels_where_a_model_is_new(tmp_path):
    """A pretrained one has perhaps learned elsewhere what it predicts for no class; its new student has not."""
    denoiser(sample_size=8).model.save_pretrained(tmp_path / "plain")
    task = ImageGeneration(diffusion=DiffusionSpec(label_drop=0.0), sampling=SamplingSpec(guidance=0.0))
    task.load_data(Pretrained({"teacher": str(tmp_path / "plain")}))
    base = task.pretrained_config(str(tmp_path / "plain"), "teacher.path")
    with pytest.raises(RecipeError, match=r"student.config makes .*guidance=0.0 .*label_drop=0.0 .*guidance of its"):
        task.new_config({"num_layers": 1}, "student.config", base)
    task.sampling.guidance = 1.0
    assert task.new_config({"num_layers": 1}, "student.config", base).options["num_layers"] == 1


def test_new_denoisers_have_the_type_asked_for(tmp_path):
    task = ImageGeneration(data="digits")
    task.load_data(Pretrained({"teacher": None}))
    config = task.new_config(SMALL["teacher"]["config"], "teacher.config")
    assert {p.dtype for p in task.build(config, "sdpa", "bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype='int8'"):
        task.build(config, "sdpa", "int8")


# -- sampling --------------------------------------------------------------------------------------------------------


def noising() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=50, beta_start=1e-3, beta_end=0.2)


@pytest.mark.parametrize("make", [denoiser, mdt])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pipeline_saves_and_loads(tmp_path, make, sampler):
    pipeline = ClassConditionalPipeline(make().model, make_sampler(sampler, noising(), True, pixels=True))
    options = {"guidance": 2.0, "steps": 4, "seed": 3}
    labels = torch.tensor([1, 7, 7])
    images = generate(pipeline, labels, batch_size=3, **options)
    assert images.shape == (3, 1, 8, 8) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    assert not torch.equal(images[1], images[2]), "each has noise of its own"
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    opened = ClassConditionalPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert opened.vae is None and type(opened.scheduler) is type(pipeline.scheduler)
    torch.testing.assert_close(generate(opened, labels, batch_size=2, **options), images, rtol=1e-4, atol=1e-5)


def test_sampling_draws_on_no_global_generator():
    pipeline = ClassConditionalPipeline(denoiser().model, make_sampler("ddpm", noising(), True, pixels=True))
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    generate(pipeline, torch.tensor([1]), guidance=1.0, steps=3, seed=0, batch_size=1)
    assert torch.equal(torch.rand(2), expected)


def test_guidance_is_that_of_the_formula():
    """One step of DDIM by hand, from the noise that the generator gives."""
    model = denoiser().eval()
    scheduler = make_sampler("ddim", noising(), True, pixels=False)
    pipeline = ClassConditionalPipeline(model.model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3], 2.5, 1, torch.Generator().manual_seed(5), "pt").images
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    step = scheduler.timesteps[:1]
    with torch.no_grad():
        by_label = [model(start, step, torch.tensor([label])).logits[:, :1] for label in (3, 10)]
    noise = by_label[1] + 2.5 * (by_label[0] - by_label[1])
    kept = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50), 0)[int(step)]
    clean = (start - (1 - kept).sqrt() * noise) / kept.sqrt()
    torch.testing.assert_close(images, (clean / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_guidance_leaves_the_variance_of_the_class(monkeypatch):
    """As DiT has it: the noise is guided, the learned variance is that of the pass with the class."""
    model = denoiser().eval()
    pipeline = ClassConditionalPipeline(model.model, make_sampler("ddpm", noising(), True, pixels=True))
    pipeline.set_progress_bar_config(disable=True)
    seen, step_of = [], pipeline.scheduler.step

    def step(predicted, *args, **kwargs):
        seen.append(predicted)
        return step_of(predicted, *args, **kwargs)

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    pipeline([3], 2.5, 1, torch.Generator().manual_seed(5), "pt")
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        given, none = (
            model(start, pipeline.scheduler.timesteps[:1], torch.tensor([label])).logits for label in (3, 10)
        )
    assert seen[0].shape == (1, 2, 8, 8) and (given - none).abs().max() > 1e-3
    torch.testing.assert_close(seen[0][:, 1:], given[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][:, :1], (none + 2.5 * (given - none))[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_where_ddim_clips_the_noise_is_what_the_clipped_image_leaves(bounds):
    """Each step by hand: the sample is the clipped image and noise at the level of its step, nothing else."""
    model = denoiser().model.eval()
    scheduler = DDIMScheduler.from_config(noising().config, **bounds, sample_max_value=1.0)
    pipeline = ClassConditionalPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    handle = model.register_forward_hook(lambda _, args, output: calls.append((args[0][:2], output.sample[:, :1])))
    images = pipeline([3, 8], 4.0, 5, torch.Generator().manual_seed(5), "pt").images
    handle.remove()
    kept = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50), 0)
    levels = [*kept[scheduler.timesteps], torch.tensor(1.0)]
    samples = [sample for sample, _ in calls] + [images * 2 - 1]
    clipped = 0.0
    for i, (sample, noises) in enumerate(calls):
        noise = noises[2:] + 4 * (noises[:2] - noises[2:])
        clean = (sample - (1 - levels[i]).sqrt() * noise) / levels[i].sqrt()
        clipped += (clean.abs() > 1).float().mean().item() / len(calls)
        clean = clean.clamp(-1, 1)
        left = (sample - levels[i].sqrt() * clean) / (1 - levels[i]).sqrt()
        after = levels[i + 1].sqrt() * clean + (1 - levels[i + 1]).sqrt() * left
        torch.testing.assert_close(samples[i + 1], after, rtol=1e-3, atol=1e-4)
    assert clipped > 0.1


def test_latents_are_decoded_as_dit_pipeline_does():
    """The same images as diffusers' own pipeline gives, where that fits: 1,000 classes and an autoencoder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8,
        scaling_factor=0.5,
    ).eval()  # fmt: skip
    model = denoiser(in_channels=4, out_channels=8, num_embeds_ada_norm=1000).model.eval()
    scheduler = DDIMScheduler.from_config(noising().config, clip_sample=False)
    images = []
    for kind in (DiTPipeline, ClassConditionalPipeline):
        pipeline = kind(transformer=model, vae=vae, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        out = pipeline([5, 900], guidance_scale=3.0, generator=generator, num_inference_steps=3, output_type="pt")
        images.append(out.images)
    assert images[0].shape == (2, 3, 8, 8)
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-5)


def test_a_teacher_in_bfloat16_is_measured_teaches_and_generates():
    """Of a small model: close to what it does in float32. Steps are taken in float32, through the autoencoder too."""
    task = ImageGeneration(diffusion=DiffusionSpec(steps=50, beta_end=0.2), sampling=SamplingSpec(steps=4, images=0))
    splits = task.load_data(Pretrained({"teacher": None}))
    config = DenoiserConfig("dit", denoiser().config.options)
    exact, rounded = (task.build(config, "sdpa", dtype) for dtype in ("float32", "bfloat16"))
    exact.model.load_state_dict(denoiser().model.state_dict())
    rounded.model.load_state_dict(exact.model.state_dict())
    assert rounded.dtype == torch.bfloat16
    errors = [task.measure(model, splits.test, 100)["noise_error"] for model in (exact, rounded)]
    assert errors[1] != errors[0] and errors[1] == pytest.approx(errors[0], rel=0.02)
    student = task.build(config, "sdpa")
    inputs = task.collate([splits.train[i] for i in range(4)])
    out = Distillation(rounded, {"task": TaskLoss(), "matching": PredictionMatching(), "attention": SqueezedHeads()})(
        student, inputs
    )
    out.loss.backward()
    assert out.loss.isfinite() and out.loss.dtype == torch.float32
    images = [task.generate(model, torch.arange(8)) for model in (exact, rounded)]
    assert images[1].dtype == torch.float32
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=0.1)

    class Half(nn.Module):
        """Half the noise that it is given, exactly, in bfloat16."""

        dtype, device = torch.bfloat16, torch.device("cpu")
        config = rounded.model.config

        def forward(self, noisy, timestep, class_labels):
            assert noisy.dtype == torch.bfloat16
            return SimpleNamespace(sample=noisy / 2)

    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=4)
    scheduler = make_sampler("ddim", noising(), False, pixels=False)
    pipeline = ClassConditionalPipeline(denoiser().model, scheduler, vae.eval())
    pipeline.transformer = Half()
    kept = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50), 0)
    state = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline([3], 1.0, 25, torch.Generator().manual_seed(5), "pt").images
    for step in range(48, -1, -2):
        noise = (state.bfloat16() / 2).float()
        clean = (state - (1 - kept[step]).sqrt() * noise) / kept[step].sqrt()
        before = kept[step - 2] if step else torch.ones(())
        state = before.sqrt() * clean + (1 - before).sqrt() * noise
    with torch.no_grad():
        expected = (vae.decode(state / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_pipeline_names_classes_that_there_are_not():
    pipeline = ClassConditionalPipeline(denoiser().model, make_sampler("ddim", noising(), True, pixels=True))
    with pytest.raises(ValueError, match="from 0 to 9"):
        pipeline([10])
    with pytest.raises(ValueError, match="output_type='jpg'"):
        pipeline([1], output_type="jpg")


def test_grid_shows_each_image_at_its_place(tmp_path):
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 2) / 5
    sample_grid(images, 3, tmp_path / "a" / "grid.png", smallest=2)
    pixels = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert pixels.shape == (2 * 3 + 1, 3 * 3 + 1)
    assert [pixels[1 + 3 * (i // 3), 1 + 3 * (i % 3)] for i in range(5)] == [0, 51, 102, 153, 204]
    assert pixels[0, 0] == 255
    with pytest.raises(ValueError, match="1 or 3"):
        sample_grid(torch.zeros(1, 2, 4, 4), 1, tmp_path / "b.png")


# -- averaged weights ------------------------------------------------------------------------------------------------


class Copies(TrainerCallback):
    """The weights after each step."""

    def __init__(self, model):
        self.model, self.after = model, []

    def on_step_end(self, *_, **__):
        self.after.append([p.detach().clone() for p in self.model.parameters()])


def averaged_run(folder: Path, stop: int | None = None, **changes):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == stop:
                control.should_training_stop = True

    models = (denoiser(2), denoiser(4, seed=1))
    average, copies = AveragedWeights(models[0], 0.5), Copies(models[0])
    return trainer(folder, models=models, callbacks=[average, copies, Stop()], **changes), average, copies


def test_the_average_takes_the_weights_place_at_the_end(tmp_path):
    run, _, copies = averaged_run(tmp_path, learning_rate=0.1, max_steps=4)
    run.train()
    average = copies.after[0]  # diffusers' decay: 0 at the first step, then (1 + n) / (10 + n) up to its full value
    for step, weights in enumerate(copies.after[1:], start=1):
        decay = min((1 + step) / (10 + step), 0.5)
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for parameter, expected in zip(run.model.parameters(), average, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(p, last) for p, last in zip(run.model.parameters(), copies.after[-1], strict=True))


def test_a_resumed_run_goes_on_with_its_average(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    whole, *_ = averaged_run(tmp_path / "whole", max_steps=6, learning_rate=0.05)
    whole.train()
    averaged_run(tmp_path / "cut", stop=4, **saving)[0].train()
    assert (tmp_path / "cut" / "checkpoint-4" / EMA_FILE).is_file()
    resumed, *_ = averaged_run(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_average_is_refused(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    averaged_run(tmp_path, stop=2, **saving)[0].train()
    (tmp_path / "checkpoint-2" / EMA_FILE).unlink()
    with pytest.raises(RuntimeError, match="without averaged weights"):
        averaged_run(tmp_path, **saving)[0].train(resume_from_checkpoint=True)


def test_grids_are_drawn_with_the_average_and_leave_the_weights(tmp_path):
    run, average, copies = averaged_run(tmp_path, learning_rate=0.1, max_steps=3)
    seen = []

    def draw(file):
        seen.append((file.name, next(run.model.parameters()).detach().clone()))

    run.add_callback(SampleGrids(draw, tmp_path, 2, average))
    run.train()
    assert [name for name, _ in seen] == ["step-000002.png", "step-000003.png"]
    assert not torch.equal(seen[0][1], copies.after[1][0])
    torch.testing.assert_close(seen[0][1], 2 / 11 * copies.after[0][0] + 9 / 11 * copies.after[1][0])
    assert torch.equal(seen[1][1], next(run.model.parameters()))


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)),
        0.5 + rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)),
    )
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    moved = torch.tensor(a) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    assert frechet_distance(torch.tensor(a), moved) == pytest.approx(4, rel=1e-6)
    # More features than images: covariances without full rank.
    few = torch.tensor(rng.normal(size=(4, 10)))
    assert 0 <= frechet_distance(few, few + 1) == pytest.approx(10, rel=1e-6)
    with pytest.raises(ValueError, match="6 features, generated ones 5"):
        frechet_distance(torch.tensor(a), torch.tensor(b)[:, :5])


def test_precision_and_recall_by_brute_force():
    """Two clusters of real images; the generated ones cover one of them, and a place where nothing is."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(30, 2, generator=generator) + torch.tensor([0.0, 20.0]).repeat(15)[:, None]
    made = torch.randn(20, 2, generator=generator) + torch.tensor([0.0, 60.0]).repeat(10)[:, None]

    def share(points, manifold):
        inside = 0
        for point in points.tolist():
            covered = False
            for i, centre in enumerate(manifold.tolist()):
                others = [m for j, m in enumerate(manifold.tolist()) if j != i]
                reach = sorted(((m[0] - centre[0]) ** 2 + (m[1] - centre[1]) ** 2) ** 0.5 for m in others)[2]
                covered |= ((point[0] - centre[0]) ** 2 + (point[1] - centre[1]) ** 2) ** 0.5 <= reach
            inside += covered
        return inside / len(points)

    precision, recall = precision_and_recall(real, made)
    assert (precision, recall) == pytest.approx((share(made, real), share(real, made)))
    assert 0 < precision <= 0.5 and 0 < recall <= 0.5
    assert precision_and_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="at least 4"):
        precision_and_recall(real[:3], made)


def test_class_accuracy_is_the_share_of_the_classes_asked_for():
    """A "classifier" that looks at the first pixel."""

    class Pixel(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot((images[:, 0, 0, 0] * 3).round().long(), 4).float()

    images = torch.tensor([0, 1, 2, 3, 3]).view(5, 1, 1, 1).expand(5, 1, 2, 2) / 3
    assert class_accuracy(Pixel(), images, torch.tensor([0, 1, 2, 3, 0]), 2) == pytest.approx(0.8)


def test_image_models_are_given_images_as_they_were_trained_on(tmp_path):
    model = classifier(3).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(4, 1, 8, 8)
    judge = ImageModel(str(tmp_path), classifies=True)
    assert judge.classes == 10
    torch.testing.assert_close(judge(images), model(images * 2 - 1).logits)
    features = features_of(ImageModel(str(tmp_path), classifies=False), images, 3)
    torch.testing.assert_close(features, model.vit(images * 2 - 1).last_hidden_state.mean(1).detach())
    assert judge(torch.rand(2, 1, 16, 16)).shape == (2, 10), "another size is brought to the model's"
    with pytest.raises(RecipeError, match="nowhere"):
        ImageModel(str(tmp_path / "nowhere"), classifies=True)


def test_image_models_follow_their_image_processor(tmp_path):
    model = classifier(3, num_channels=3, image_size=12).eval()
    model.save_pretrained(tmp_path)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7], "size": {"height": 12, "width": 12},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    images = torch.rand(2, 1, 12, 12)
    mean, deviation = (torch.tensor(processor[k])[:, None, None] for k in ("image_mean", "image_std"))
    expected = model((images.expand(-1, 3, -1, -1) - mean) / deviation).logits
    torch.testing.assert_close(ImageModel(str(tmp_path), classifies=True)(images), expected)


def test_fid_without_its_network_is_an_error_that_says_what_to_do():
    pytest.importorskip("torchmetrics")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(RecipeError, match="torch-fidelity"):
            InceptionMetrics()


def inception_metrics(real: torch.Tensor, generated: torch.Tensor, size: int) -> dict[str, float]:
    return measure_images(real.split(size), generated.split(size), inception=InceptionMetrics())


class Inception(nn.Module):
    """What torchmetrics and sFID take of an Inception network: bytes in, features out, a block with a 1 × 1 branch."""

    num_features = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)
        self.seen = []

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen.append(images)
        found = self.Mixed_6d.branch1x1(images.float() / 255)
        return torch.cat([found.mean((2, 3))[:, :4], found.amax((2, 3))[:, :1]], 1)


def test_inception_metrics_by_their_definitions(monkeypatch):
    """With a network of our own in Inception's place."""
    fid, inception = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.inception")
    network, judge = Inception(), Inception()
    monkeypatch.setattr(fid, "FrechetInceptionDistance", partial(fid.FrechetInceptionDistance, network))
    monkeypatch.setattr(inception, "InceptionScore", partial(inception.InceptionScore, judge))
    generator = torch.Generator().manual_seed(1)
    levels = torch.arange(256).repeat(4)[torch.randperm(1024, generator=generator)].reshape(16, 1, 8, 8)
    # As a split gives them: from bytes to −1 … 1, and back.
    real = (levels.float() * (2 / 255) - 1) / 2 + 0.5
    made = torch.rand(14, 1, 8, 8, generator=generator)
    torch.manual_seed(4)
    expected_draw = torch.rand(2)
    torch.manual_seed(4)
    found = inception_metrics(real, made, 5)
    assert torch.equal(torch.rand(2), expected_draw), "draws on no global generator"
    assert found == inception_metrics(real, made, 5) and set(found) == {"fid", "sfid", "inception_score"}
    seen = torch.cat(network.seen[:7])
    assert torch.equal(seen[:16], levels.expand(-1, 3, -1, -1)), "the levels that the images were read with"
    assert torch.equal(seen[16:], (made * 255).round().expand(-1, 3, -1, -1))
    with torch.no_grad():
        maps = network.Mixed_6d.branch1x1(seen.float() / 255)[:, :7].reshape(30, 7 * 64)
        features = network(seen)
    assert found["sfid"] == pytest.approx(frechet_distance(maps[:16], maps[16:]), rel=1e-4)
    assert found["fid"] == pytest.approx(frechet_distance(features[:16], features[16:]), rel=1e-3)
    with torch.no_grad():
        logits = judge((made * 255).round().byte().expand(-1, 3, -1, -1))
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    parts = logits[order].double().softmax(1).chunk(10)
    surprise = [(part * (part.log() - part.mean(0).log())).sum(1).mean().exp() for part in parts]
    assert found["inception_score"] == pytest.approx(float(torch.stack(surprise).mean()), rel=1e-5)
    assert not network.Mixed_6d.branch1x1._forward_hooks


def test_the_real_inception_network_has_the_layer(monkeypatch):
    """torch-fidelity's network with random weights, where it is installed."""
    network = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(network, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
    widths = []
    monkeypatch.setattr(
        "squeezeheads.evaluation.inception.frechet_distance",
        lambda a, b: widths.append((a.shape, b.shape)) or 1.0,
    )
    torch.manual_seed(0)
    found = inception_metrics(torch.rand(3, 1, 32, 32), torch.rand(2, 1, 32, 32), 2)
    assert widths == [((3, 7 * 17 * 17), (2, 7 * 17 * 17))] and found["sfid"] == 1.0


def test_a_classifier_judges_generated_images(tmp_path):
    classifier(3).save_pretrained(tmp_path / "judge")
    judged = {"features": str(tmp_path / "judge"), "images": 20, "steps": 2}
    changes = {f"task__image_generation__sampling__{k}": v for k, v in judged.items()}
    path = write(tmp_path, task__image_generation__classifier=str(tmp_path / "judge"), **changes)
    task = load_recipe(path).chosen_task
    splits = task.load_data(Pretrained({"teacher": None}))
    model = task.build(DenoiserConfig("dit", denoiser().config.options), "sdpa")
    metrics = task.measure(model, splits.test, 10)
    assert task.columns[-1] == "class_accuracy" and set(task.columns) <= set(metrics)
    assert 0 <= metrics["class_accuracy"] <= 1
    labels = torch.arange(20) % 10
    images = task.generate(model, labels)
    # The first two of each class.
    places = [i for label in range(10) for i in (splits.test.labels[splits.test.chosen] == label).nonzero()[:2, 0]]
    real = torch.stack([splits.test[int(i)]["clean"] for i in places]) / 2 + 0.5
    module = ImageModel(str(tmp_path / "judge"), classifies=False)
    expected = frechet_distance(features_of(module, real, 20), features_of(module, images, 20))
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def refused(task: ImageGeneration) -> str:
    """What ``load_data`` says."""
    with pytest.raises(RecipeError) as caught:
        task.load_data(Pretrained({"teacher": None}))
    return str(caught.value)


def test_judges_that_do_not_fit_are_refused_with_the_data(tmp_path):
    """Not when the teacher's training is over."""
    names = {number: str((number + 1) % 10) for number in range(10)}
    classifier(3, id2label=names, num_labels=10).save_pretrained(tmp_path / "order")
    classifier(3, num_labels=4).save_pretrained(tmp_path / "four")
    classifier(3, num_channels=2).save_pretrained(tmp_path / "channels")
    language_model(2).save_pretrained(tmp_path / "text")
    classifier(3).vit.save_pretrained(tmp_path / "headless")
    headless = str(tmp_path / "headless")
    assert "headless: classifier.bias and 1 more weights are not in the file" in refused(
        ImageGeneration(classifier=headless)
    )
    order, four = str(tmp_path / "order"), str(tmp_path / "four")
    assert "class 0 is '1' to it, and '0' in the data" in refused(ImageGeneration(classifier=order))
    assert f"classifier={four!r} tells 4 classes apart, the data has 10" in refused(ImageGeneration(classifier=four))
    assert "classifier: nowhere: cannot be loaded" in refused(ImageGeneration(classifier="nowhere"))
    assert "sampling.features: nowhere: cannot be loaded" in refused(
        ImageGeneration(sampling=SamplingSpec(features="nowhere"))
    )
    for name in ("channels", "text"):
        path = str(tmp_path / name)
        assert f"sampling.features={path!r} cannot judge images of 1 × 8 × 8" in refused(
            ImageGeneration(sampling=SamplingSpec(features=path))
        )
    ignored = ImageGeneration(classifier="nowhere", sampling=SamplingSpec(features="nowhere", images=0))
    ignored.load_data(Pretrained({"teacher": None}))


def test_missing_inception_is_refused_with_the_data(monkeypatch):
    def missing():
        raise ModuleNotFoundError("no torch-fidelity.")

    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(fid, "FrechetInceptionDistance", missing)
    assert "no torch-fidelity. Install" in refused(ImageGeneration(sampling=SamplingSpec(inception=True)))
    ImageGeneration(sampling=SamplingSpec(inception=True, images=0)).load_data(Pretrained({"teacher": None}))


def small_dit(task: ImageGeneration) -> Denoiser:
    config = {"model_type": "dit", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4}
    return task.build(task.new_config(config, "student"), "sdpa")


def own_inception(monkeypatch) -> None:
    """Networks of our own in Inception's place."""
    fid, inception = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.inception")
    monkeypatch.setattr(fid, "FrechetInceptionDistance", partial(fid.FrechetInceptionDistance, Inception()))
    monkeypatch.setattr(inception, "InceptionScore", partial(inception.InceptionScore, Inception()))


def test_what_judges_images_is_on_the_model_s_device(tmp_path, monkeypatch):
    """On one without memory, as there is no other here."""
    own_inception(monkeypatch)
    classifier(3).save_pretrained(tmp_path)
    sampling = SamplingSpec(features=str(tmp_path), inception=True, images=20, steps=1)
    task = ImageGeneration(classifier=str(tmp_path), sampling=sampling)
    splits = task.load_data(Pretrained({"teacher": None}))
    model = small_dit(task)
    seen = []
    monkeypatch.setattr("squeezeheads.evaluation.image_metrics.measure_images", lambda *_, **k: seen.append(k) or {})
    monkeypatch.setattr(ImageGeneration, "score", lambda *_: {})
    for device in ("cpu", "meta"):
        task.measure(model.to(device), splits.test, 10)
        judges = [seen[-1]["features"], seen[-1]["classifier"], seen[-1]["inception"].fid, seen[-1]["inception"].score]
        assert [{p.device.type for p in judge.parameters()} for judge in judges] == [{device}] * 4
        assert seen[-1]["inception"].fid.real_features_sum.device.type == device


def test_without_features_large_images_are_measured_batch_by_batch(monkeypatch):
    """No more images than a batch are asked for before they are measured; none are kept."""
    own_inception(monkeypatch)
    sampling = SamplingSpec(features=None, inception=True, images=20, steps=1, batch_size=8)
    task = ImageGeneration(sampling=sampling)
    splits = task.load_data(Pretrained({"teacher": None}))
    assert task.columns == ("noise_error", "fid", "sfid", "inception_score")
    alive, most = [], []
    update = InceptionMetrics.update

    def watched(self, images, *, real):
        alive.append(weakref.ref(images))
        most.append(sum(ref() is not None for ref in alive))
        assert len(images) <= 8
        update(self, images, real=real)

    monkeypatch.setattr(InceptionMetrics, "update", watched)
    metrics = task.measure(small_dit(task), splits.test, 10)
    assert set(task.columns) <= set(metrics) and "frechet_distance" not in metrics
    assert len(most) == 6 and max(most) <= 2, "the one that is measured, and the one before it"


@pytest.mark.parametrize(("given", "meant"), [("null", None), ("models/dino", "models/dino")])
def test_features_may_be_null_in_a_file_and_on_the_command_line(tmp_path, given, meant):
    key = "task__image_generation__sampling__features"
    assert load_recipe(write(tmp_path, **{key: meant})).chosen_task.sampling.features == meant
    override = f"--{key.replace('__', '.')}"
    for options in ([override, given], [f"{override}={given}"]):
        assert load_recipe(write(tmp_path), options).chosen_task.sampling.features == meant


def test_nothing_is_generated_where_nothing_judges(monkeypatch):
    task = ImageGeneration(sampling=SamplingSpec(features=None))
    splits = task.load_data(Pretrained({"teacher": None}))
    monkeypatch.setattr(ImageGeneration, "pipeline", None)
    assert set(task.measure(small_dit(task), splits.test, 100)) == {"noise_error", "loss"}
    assert task.columns == ("noise_error",)


def test_metrics_in_batches_are_those_of_the_whole(tmp_path):
    classifier(3).save_pretrained(tmp_path)
    judge, features = ImageModel(str(tmp_path), classifies=True), ImageModel(str(tmp_path), classifies=False)
    real, made = torch.rand(30, 1, 8, 8), torch.rand(25, 1, 8, 8)
    labels = torch.arange(25) % 10
    found = measure_images(real.split(7), made.split(7), features=features, classifier=judge, labels=labels)
    a, b = features_of(features, real, 7), features_of(features, made, 7)
    precision, recall = precision_and_recall(a, b)
    assert found == {
        "frechet_distance": frechet_distance(a, b), "precision": precision, "recall": recall,
        "class_accuracy": class_accuracy(judge, made, labels, 7),
    }  # fmt: skip
    again = measure_images((), made.split(7), features=features, real_features=a)
    assert again == {key: found[key] for key in ("frechet_distance", "precision", "recall")}
    with pytest.raises(ValueError, match="needs the labels"):
        measure_images((), made.split(7), classifier=judge)


def test_dpm_takes_fewer_steps_than_the_schedule():
    """diffusers' times repeat otherwise, and images are not numbers."""
    with pytest.raises(ValueError, match="sampling.steps=50: expected at most 49 for the sampler dpm"):
        ImageGeneration(diffusion=DiffusionSpec(steps=50), sampling=SamplingSpec(sampler="dpm", steps=50))
    ImageGeneration(diffusion=DiffusionSpec(steps=50), sampling=SamplingSpec(sampler="ddpm", steps=50))
    for steps, finite in ((49, True), (50, False)):
        pipeline = ClassConditionalPipeline(denoiser().model, make_sampler("dpm", noising(), True, pixels=True))
        images = generate(pipeline, torch.tensor([1]), guidance=1.0, steps=steps, seed=0, batch_size=1)
        assert bool(images.isfinite().all()) == finite


def measured(monkeypatch) -> list[torch.Tensor]:
    """Whose features are looked at, batch by batch."""
    seen = []
    monkeypatch.setattr(
        "squeezeheads.evaluation.image_metrics._features",
        lambda module, images: seen.append(images) or torch.randn(len(images), 3),
    )
    return seen


def test_by_default_as_many_images_are_generated_as_the_test_split_has(monkeypatch):
    task = ImageGeneration(test_size=30, sampling=SamplingSpec(steps=1))
    splits = task.load_data(Pretrained({"teacher": None}))
    seen = measured(monkeypatch)
    assert task.measure(small_dit(task), splits.test, 8).keys() >= set(task.columns)
    assert [len(images) for images in seen] == [30, 30]


def test_a_test_split_of_a_few_images_measures_none(tmp_path):
    for split, count in (("train", 40), ("test", 1)):
        for name in ("black", "grey", "white"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), number).save(tmp_path / split / name / f"{number:02}.png")
    task = ImageGeneration(data=str(tmp_path), image_size=8, validation_size=12)
    with pytest.raises(RecipeError, match=r"the test split has 3 images, .* at least 4: set sampling.images to 0"):
        task.load_data(Pretrained({"teacher": None}))
    task.sampling.images = 0
    assert len(task.load_data(Pretrained({"teacher": None})).test) == 3 and task.columns == ("noise_error",)


def test_generated_images_are_compared_with_all_classes(tmp_path, monkeypatch):
    """A folder of images lies sorted by class: half of the test split must not be half of its classes."""
    for split, count in (("train", 12), ("test", 12)):
        for label, name in enumerate(("black", "grey", "white")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 100 * label + number).save(tmp_path / "data" / split / name / f"{number:02}.png")
    sampling = SamplingSpec(images=6, steps=1)
    task = ImageGeneration(
        data=str(tmp_path / "data"), image_size=8, validation_size=12, test_size=36, sampling=sampling
    )
    splits = task.load_data(Pretrained({"teacher": None}))
    seen = measured(monkeypatch)
    task.measure(small_dit(task), splits.test, 8)
    levels = (seen[0][:, 0, 0, 0] * 255).round().int().tolist()
    assert levels == [0, 100, 200, 1, 101, 201] and len(seen[1]) == 6


def test_a_short_training_beats_noise(tmp_path):
    """The noise error falls well below that of predicting nothing (1), which an untrained DiT does."""
    task = ImageGeneration()
    splits = task.load_data(Pretrained({"teacher": None}))
    config = task.new_config(
        {"model_type": "dit", "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "patch_size": 2},
        "teacher.config",
    )
    torch.manual_seed(0)
    model: Denoiser = task.build(config, "sdpa")
    assert task.score(model, splits.validation, 100)["noise_error"] == pytest.approx(1, abs=0.05)
    data = task.training_data(splits.train, model, seed=0)
    run = trainer(
        tmp_path, models=(model, copy.deepcopy(model)), collate=data.collate, learning_rate=3e-3, max_steps=60,
        per_device_train_batch_size=32, objectives_used=("task",), train_dataset=data.samples,
    )  # fmt: skip
    run.train()
    assert task.score(model, splits.validation, 100)["noise_error"] < 0.5


def test_new_models_of_both_kinds_start_at_the_source_s_initialisation():
    for kind, more in (("dit", {}), ("mdt", {"num_decoder_layers": 2})):
        options = {**denoiser(layers=4).config.options, **more}
        keep = {k: options[k] for k in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
                                        "num_layers", "sample_size", "patch_size", "num_embeds_ada_norm")}  # fmt: skip
        model = Denoiser(build_model(DenoiserConfig(kind, {**keep, **more})))
        assert (model(**batch()).logits == 0).all()


@pytest.mark.slow
def test_an_mdt_that_trained_shortly_on_digits_draws_what_it_is_asked_for(tmp_path):
    """1.5 minutes of one core. At a third of the rate, or of the steps, labels are hardly heard yet."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.data, digits.target)
    labels = torch.arange(200) % 10

    def accuracy(images):
        return float((judge.predict(16 * images.flatten(1).numpy()) == labels.numpy()).mean())

    task = ImageGeneration(
        diffusion=DiffusionSpec(schedule="squaredcos_cap_v2", learned_variance=False),
        sampling=SamplingSpec(steps=30, guidance=2.0, images=200),
    )
    splits = task.load_data(Pretrained({"teacher": None}))
    shape = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "num_decoder_layers": 2}
    torch.manual_seed(0)
    model = task.build(task.new_config({"model_type": "mdt", "patch_size": 2, **shape}, "student.config"), "sdpa")
    before = accuracy(task.generate(model, labels))
    data = task.training_data(splits.train, model, seed=0)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=900, per_device_train_batch_size=64, learning_rate=4e-3, warmup_steps=50,
        weight_decay=0.0, report_to="none", save_strategy="no", use_cpu=True, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    SqueezeTrainer(
        model=model, args=args, objectives={"task": TaskLoss()}, train_dataset=data.samples, data_collator=data.collate,
        passes=data.passes, callbacks=data.callbacks,
    ).train()  # fmt: skip
    noise = accuracy(torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert max(before, noise) < 0.2
    assert accuracy(task.generate(model, labels)) > 0.6
