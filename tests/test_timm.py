"""timm's models as teacher and student, in an environment where timm is (``make test-timm``)."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperConfig, set_seed

from squeezeheads import Distillation, SqueezedHeads, record_attention
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.tasks import ImageClassification, Pretrained
from squeezeheads.tasks.augmentation import Augmentation
from squeezeheads.token_layout import known_layout
from test_cli import recipe  # noqa: F401 (a fixture)
from test_token_layout import dense_loss
from tiny import classifier, image_batch

pytestmark = pytest.mark.timm
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
    pytest.skip(f"timm cannot be imported ({error}): make test-timm", allow_module_level=True)

SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2}


def wrapped(architecture: str, heads: int, seed: int = 0, **changes):
    set_seed(seed)
    arguments = {**SIZES, "num_heads": heads, **changes}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=10)
    return AutoModelForImageClassification.from_config(config, attn_implementation="sdpa").eval()


LAYOUTS = {
    "deit_tiny_patch16_224": ("class",),
    "deit_tiny_distilled_patch16_224": ("class", "distillation"),
    "vit_base_patch14_reg4_dinov2": ("class", *["register"] * 4),
    "vit_little_patch16_reg4_gap_256": ("register",) * 4,
    "vit_small_patch16_dinov3": ("class", *["register"] * 4),
}


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_recorded_maps_are_the_eager_ones(architecture):
    model, pixels = wrapped(architecture, 6), image_batch(3)["pixel_values"]
    with torch.no_grad(), record_attention(model) as recorded:
        fused = model(pixel_values=pixels).logits
    assert known_layout(model) == LAYOUTS[architecture]
    assert recorded[0].num_keys == 16 + len(LAYOUTS[architecture])
    attentions = [m for m in model.modules() if hasattr(m, "fused_attn")]
    assert len(attentions) == len(recorded) == 2
    eager = []
    for module in attentions:
        module.fused_attn = False
        module.attn_drop.register_forward_pre_hook(lambda _, args: eager.append(args[0]))
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, fused, rtol=1e-4, atol=1e-5)
    for record, maps in zip(recorded, eager, strict=True):
        torch.testing.assert_close(record.maps(), maps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["deit_tiny_distilled_patch16_224", "vit_base_patch14_reg4_dinov2"])
def test_loss_and_gradients_equal_the_dense_definition(architecture):
    """A timm teacher and a timm student with other special tokens; and one of transformers."""
    teacher = wrapped(architecture, 6, seed=1).double()
    extra = len(LAYOUTS[architecture])
    theirs = [0, *range(extra, extra + 16)]
    for student in (wrapped("deit_tiny_patch16_224", 3).double(), classifier(3).eval().double()):
        pixels = image_batch(3)["pixel_values"].double()
        objective = SqueezedHeads(schedule="progressive")
        out = Distillation(teacher, {"attention": objective})(student, {"pixel_values": pixels})
        with record_attention(student) as learned:
            student(pixel_values=pixels)
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(pixel_values=pixels)
        assert taught[0].num_keys == 16 + extra and learned[0].num_keys == 17
        expected = torch.stack(
            [
                dense_loss(s, t, layer.groups, "least_squares", [*range(17)], theirs)
                for s, t, layer in zip(learned, taught, objective.plan, strict=True)
            ]
        ).mean()
        torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
        parameters = list(student.parameters())
        found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_a_run_leaves_a_student_that_timm_opens(recipe, tmp_path):  # noqa: F811
    arguments = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 6}
    teacher = {"model_type": "timm_wrapper", "architecture": "deit_tiny_distilled_patch16_224", "model_args": arguments}
    student = {"architecture": "deit_tiny_patch16_224", "model_args": {**arguments, "embed_dim": 12, "num_heads": 3}}
    path = recipe(
        teacher={"config": teacher, "training": {"max_steps": 2, "batch_size": 8}},
        student={"config": student},
        seeds=[0],
    )
    assert main(["distill", path]) == 0
    folder = tmp_path / "run" / "student"
    sizes = json.loads((folder / "config.json").read_text())["model_args"]
    assert sizes["img_size"] == 8 and sizes["in_chans"] == 1, "what the data fixes"
    opened = timm.create_model(
        "deit_tiny_patch16_224", num_classes=10, checkpoint_path=folder / "model.safetensors", **sizes
    ).eval()
    by_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = image_batch(3)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(opened(pixels), by_transformers(pixel_values=pixels).logits)
    assert AutoImageProcessor.from_pretrained(folder).image_mean == (0.5,)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["attention"][0]
    assert plan["tokens"] == {"student": ["class"], "teacher": ["class", "distillation"], "patches": 4}
    assert main(["distill", path]) == 0, "again: all is found to be done"


def test_a_checkpoint_with_timms_own_preparation(tmp_path):
    """As timm's hub folders are: the configuration says how images are prepared."""
    model = wrapped("deit_tiny_patch16_224", 6)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = {
        "input_size": [1, 8, 8], "mean": [0.3], "std": [0.2], "interpolation": "bicubic", "crop_pct": 1.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = ImageClassification()
    splits = task.load_data(Pretrained({"teacher": str(tmp_path)}))
    assert task.view.size == 8 and task.view.normalisation.mean == (0.3,)
    loaded = task.load(str(tmp_path)).eval()
    batch = task.collate([splits.test[0], splits.test[1]])
    with torch.no_grad():
        expected = model(pixel_values=batch["pixel_values"]).logits
        torch.testing.assert_close(loaded(pixel_values=batch["pixel_values"]).logits, expected)


def test_rand_augment_changes_colours_and_is_repeatable():
    task = ImageClassification(channels=3, augmentation=Augmentation(rand_augment="rand-m9-mstd0.5-inc1"))
    plain = ImageClassification(channels=3)
    samples = [task.load_data(Pretrained({"teacher": None})).train[i] for i in range(16)]
    plain.load_data(Pretrained({"teacher": None}))
    first, again = task.collate(samples)["pixel_values"], task.collate(samples)["pixel_values"]
    assert torch.equal(first, again) and first.shape == (16, 3, 8, 8)
    kept = plain.collate(samples)["pixel_values"]
    changed = [(a - b).abs().max() > 0.05 for a, b in zip(first, kept, strict=True)]
    assert sum(changed) > 8 and first.min() >= -1 and first.max() <= 1
    with pytest.raises(RecipeError, match="timm does not know it"):
        ImageClassification(channels=3, augmentation=Augmentation(rand_augment="cubism")).load_data(
            Pretrained({"teacher": None})
        )


def test_an_unknown_architecture_is_named(recipe, capsys):  # noqa: F811
    assert (
        main(["distill", recipe(teacher__config={"model_type": "timm_wrapper", "architecture": "vit_enormous"})]) == 2
    )
    assert "architecture='vit_enormous' is unknown to timm" in capsys.readouterr().err
