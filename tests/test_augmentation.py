"""Augmentation: each change by an independent second look, labels that stay true to pixels, and repeatability."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from squeezeheads import LogitKD, SqueezedHeads, SqueezeTrainer, TaskLoss
from squeezeheads.cli import main
from squeezeheads.tasks import ImageClassification, Pretrained
from squeezeheads.tasks.augmentation import Augmentation, erase, mix, pad_crop, random_resized_crop, seeded, smoothed
from test_cli import recipe  # noqa: F401 (a fixture)
from test_trainer import arguments, losses
from tiny import classifier

ALL = {"crop": "pad", "padding": 1, "flip": 0.5, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


def numbered(count: int = 1, channels: int = 2, height: int = 9, width: int = 11) -> torch.Tensor:
    """Images whose pixels all differ."""
    shape = (count, channels, height, width)
    return torch.arange(1, 1 + int(np.prod(shape))).float().view(shape) / np.prod(shape)


def test_pad_crop_shifts_and_brings_in_zeros():
    image, seen = numbered()[0], set()
    for seed in range(200):
        torch.manual_seed(seed)
        found = pad_crop(image, 2)
        matches = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                shifted = torch.zeros_like(image)
                rows, columns = range(max(0, -dy), min(9, 9 - dy)), range(max(0, -dx), min(11, 11 - dx))
                for r in rows:
                    shifted[:, r, columns.start : columns.stop] = image[
                        :, r + dy, columns.start + dx : columns.stop + dx
                    ]
                if torch.equal(found, shifted):
                    matches.append((dy, dx))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25, "every shift comes up"


def test_resized_crop_is_a_part_of_the_image():
    """On a plane a bicubic crop is the plane's values there: its corners tell which part was taken."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([y, x]) / 64
    areas, aspects = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        part = random_resized_crop(image, 16, (0.2, 0.49), (0.5, 2.0))  # all of these fit
        assert part.shape == (2, 16, 16) and part.min() >= 0 and part.max() <= 1
        # Slopes in the middle, where no border plays in: source pixels a result pixel.
        h = float(part[0, 11, 8] - part[0, 4, 8]) * 64 / 7 * 16
        w = float(part[1, 8, 11] - part[1, 8, 4]) * 64 / 7 * 16
        areas.append(h * w / 64**2), aspects.append(w / h)
    assert 0.19 < min(areas) < 0.22 and 0.47 < max(areas) < 0.5 and abs(np.mean(areas) - 0.345) < 0.015
    assert 0.47 < min(aspects) < 0.55 and 1.8 < max(aspects) < 2.1 and abs(np.mean(np.log(aspects))) < 0.06


def test_whole_image_is_a_crop_too():
    image = numbered(1, 2, 8, 8)[0]
    assert torch.equal(random_resized_crop(image, 8, (1.0, 1.0), (1.0, 1.0)), image)


def test_erasing_leaves_all_but_a_rectangle():
    image, shares, aspects = torch.full((3, 32, 32), 7.0), [], []
    for seed in range(300):
        torch.manual_seed(seed)
        changed = (erase(image) != 7).all(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed.sum() == len(rows) * len(columns) and rows.max() - rows.min() + 1 == len(rows)
        shares.append(changed.float().mean().item())
        aspects.append(len(columns) / len(rows))
    assert (image == 7).all(), "the original stays"
    assert 0.25 < min(aspects) < 0.4 and 2.5 < max(aspects) < 4 and abs(np.mean(np.log(aspects))) < 0.1
    assert 0.01 < min(shares) < 0.04 and 0.28 < max(shares) < 0.37
    torch.manual_seed(1)
    noise = torch.cat([e[e != 7] for e in (erase(image) for _ in range(50))])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_smoothing():
    found = smoothed(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_say_what_is_in_the_mixed_image(mixup, cutmix):
    """Image i is all i: what a mixed image holds of each can be read off its pixels."""
    count, kinds, shares = 5, set(), []
    pixels = torch.arange(float(count))[:, None, None, None].expand(count, 1, 12, 12).clone()
    for seed in range(120):
        torch.manual_seed(seed)
        mixed, targets = mix(pixels, torch.eye(count), mixup, cutmix)
        torch.testing.assert_close(targets.sum(-1), torch.ones(count))
        # The mean over pixels is the mean of the images by their shares, however they were put together.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(float(count)), atol=1e-4, rtol=0)
        assert all(set(row.nonzero().flatten().tolist()) <= {i, count - 1 - i} for i, row in enumerate(targets))
        whole = all(len(image.unique()) <= 2 and set(image.unique().tolist()) <= set(range(count)) for image in mixed)
        kinds.add("cutmix" if whole else "mixup")
        shares.append(targets[0, 0].item())
    assert kinds == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
    assert np.std(shares) > 0.15, "λ differs from batch to batch"


def test_how_images_are_mixed_is_drawn_as_deit_draws_it():
    """λ from Beta(α, α), whose variance is 1 / (8 α + 4); with both, each has equal chances."""
    pixels, targets = torch.zeros(2, 1, 2, 2), torch.eye(2)
    pixels[1] = 1
    for alpha in (0.1, 0.8, 8.0):
        torch.manual_seed(0)
        shares = [mix(pixels, targets, alpha, 0.0)[1][0, 0].item() for _ in range(2000)]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
        assert np.var(shares) == pytest.approx(1 / (8 * alpha + 4), rel=0.1)
    torch.manual_seed(0)
    cut = [set(mix(pixels, targets, 8.0, 8.0)[0].unique().tolist()) <= {0.0, 1.0} for _ in range(1000)]
    assert np.mean(cut) == pytest.approx(0.5, abs=0.05)


def test_no_mixing_is_no_change():
    pixels, targets = numbered(4), torch.eye(4)
    assert mix(pixels, targets, 0.0, 0.0) == (pixels, targets)


def task(**augmentation) -> tuple[ImageClassification, list]:
    made = ImageClassification(augmentation=Augmentation(**augmentation))
    return made, made.load_data(Pretrained({"teacher": None}))


def test_a_batch_is_changed_by_what_is_in_it_alone():
    made, splits = task(**ALL)
    some = [splits.train[i] for i in range(8)]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = made.collate(some)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all(), "training's own random numbers go on as they were"
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = made.collate(some)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = made.collate([*some[1:], some[0]])
    assert not torch.equal(other["pixel_values"].roll(1, 0), first["pixel_values"]), "another order, other changes"
    assert set(first) == {"pixel_values", "label_probabilities"}
    assert first["label_probabilities"].shape == (8, 10)


def test_a_batch_is_changed_anew_in_each_epoch():
    """A batch of one image is the same batch in every epoch. Held-out images are never changed."""
    made, splits = task(**ALL)
    seen = []
    for epoch in (0, 1, 0):
        splits.train.set_epoch(epoch)
        splits.test.set_epoch(epoch)
        seen.append((made.collate([splits.train[3]])["pixel_values"], made.collate([splits.test[3]])["pixel_values"]))
    assert not torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_accelerators_random_numbers_go_on_too(monkeypatch):
    """Dropout there must not depend on which images are in a batch."""
    calls = []
    for device in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(device, "manual_seed_all" if device is not torch.mps else "manual_seed", calls.append)
    with seeded(0, 0, [1]):
        torch.rand(1)
    assert not calls


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch(tmp_path, persistent):
    """Those too that live on from epoch to epoch; a run with workers sees what one without sees."""

    class Watching(SqueezeTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen[-1].append(inputs["pixel_values"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    seen = []
    for workers in (0, 2):
        seen.append([])
        made, splits = task(erasing=1.0)
        splits.train.part.indices = splits.train.part.indices[:2]
        options = {"max_steps": 6, "per_device_train_batch_size": 1, "dataloader_num_workers": workers}
        Watching(
            model=classifier(3),
            args=arguments(
                tmp_path / str(workers), dataloader_persistent_workers=persistent and workers > 0, **options
            ),
            objectives={"task": TaskLoss()},
            train_dataset=splits.train,
            data_collator=made.collate,
        ).train()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    different = [not torch.equal(a, b) for i, a in enumerate(seen[1]) for b in seen[1][:i]]
    assert len(different) == 15 and all(different), "2 images in 3 epochs"


def test_held_out_images_are_never_changed():
    made, splits = task(**ALL)
    plain, same = task()
    for part, other in ((splits.validation, same.validation), (splits.test, same.test)):
        found, expected = made.collate(list(part)), plain.collate(list(other))
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_noise_comes_in_after_normalisation():
    """Standard normal as the model sees it, whatever its normalisation."""
    made, splits = task(erasing=1.0)
    plain, same = task()
    few = range(200)
    found, kept = made.collate([splits.train[i] for i in few]), plain.collate([same.train[i] for i in few])
    noise = found["pixel_values"][found["pixel_values"] != kept["pixel_values"]]
    assert len(noise) > 1000 and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_crop_of_all_and_labels_that_are_smoothed():
    """Through the task: the image as it is read, whatever its white, and the labels as they were asked for."""
    made, splits = task(crop="resized", crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], label_smoothing=0.2)
    plain, same = task()
    found, kept = made.collate([splits.train[i] for i in range(9)]), plain.collate([same.train[i] for i in range(9)])
    torch.testing.assert_close(found["pixel_values"], kept["pixel_values"])
    expected = 0.8 * torch.nn.functional.one_hot(kept["labels"], 10) + 0.02
    torch.testing.assert_close(found["label_probabilities"], expected)


def test_flip_alone():
    assert all(torch.equal(Augmentation(flip=1.0).geometry(i, 9), i.flip(-1)) for i in numbered(20))
    made, splits = task(flip=0.5)
    plain, same = task()
    found = made.collate([splits.train[i] for i in range(64)])
    kept = plain.collate([same.train[i] for i in range(64)])
    flipped = [
        torch.equal(a, b.flip(-1)) and not torch.equal(a, b)
        for a, b in zip(found["pixel_values"], kept["pixel_values"], strict=True)
    ]
    either = [
        torch.equal(a, b) or f for a, b, f in zip(found["pixel_values"], kept["pixel_values"], flipped, strict=True)
    ]
    assert all(either) and 16 < sum(flipped) < 48
    assert torch.equal(found["labels"], kept["labels"])


def test_seeded_restores_after_an_error():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), seeded(0, 0, [1]):
        torch.rand(5)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_resumed_run_sees_the_images_of_an_undisturbed_one(tmp_path):
    """Augmentation, mixed labels, dropout: losses and weights to the last bit."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                control.should_training_stop = True

    def trainer(folder, callbacks=None, **changes):
        made, splits = task(**ALL)
        return SqueezeTrainer(
            model=classifier(3, hidden_dropout_prob=0.1),
            teacher=classifier(6, layers=4, seed=1),
            args=arguments(folder, max_steps=6, **changes),
            objectives={
                "task": TaskLoss(0.5),
                "logits": LogitKD(0.5),
                "attention": SqueezedHeads(calibration_batches=2),
            },
            train_dataset=splits.train,
            data_collator=made.collate,
            callbacks=callbacks,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "stopped", [Stop()], **saving).train()
    resumed = trainer(tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_with_all_that_torch_alone_can_do(recipe):  # noqa: F811
    assert (
        main(["distill", recipe(task__image_classification__augmentation={**ALL, "crop": "resized"}, seeds=[0])]) == 0
    )


def test_rand_augment_is_given_what_is_seen(monkeypatch):
    """Bytes, brighter than white is white, and the same back."""
    monkeypatch.setattr(Augmentation, "rand_augmenter", lambda self, fill: lambda picture: picture.rotate(180))
    image = torch.tensor([0.0, 0.25, 1.0, 1.1875]).view(1, 2, 2).expand(3, 2, 2)
    (found,) = Augmentation(rand_augment="rand-m9").rand_augmented([image], 0.5)
    torch.testing.assert_close(found, image.clamp(0, 1).flip(1, 2), rtol=0, atol=0.5 / 255)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is here")
def test_missing_timm_is_named_before_anything(recipe, tmp_path, capsys):  # noqa: F811
    change = {"task__image_classification__augmentation": {"rand_augment": "rand-m9-mstd0.5-inc1"}}
    assert main(["distill", recipe(**change)]) == 2
    assert "rand_augment works on images of 3 channels" in capsys.readouterr().err
    change["task__image_classification__channels"] = 3
    assert main(["distill", recipe(**change)]) == 2
    error = capsys.readouterr().err
    assert "augmentation.rand_augment='rand-m9-mstd0.5-inc1' is timm's" in error and "squeezeheads[timm]" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip=1.5"),
        ({"erasing": -0.1}, "erasing=-0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"cutmix": float("inf")}, "cutmix=inf"),
        ({"padding": 0}, "padding=0"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale="),
        ({"crop_scale": [0.5, 1.1]}, "crop_scale="),
        ({"crop_ratio": [2.0, 1.0]}, "crop_ratio="),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
