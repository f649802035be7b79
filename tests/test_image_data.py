"""Images by recipe: sources, splits, processors; each model in its own normalisation."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation.image_model import ImageModel
from squeezeheads.image_inputs.normalisation import Normalisation, normalisation_of
from squeezeheads.image_inputs.processing import own_processor
from squeezeheads.preflight import check_models
from squeezeheads.recipe import load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.tasks import ImageClassification, Pretrained
from squeezeheads.tasks.augmentation import Augmentation
from squeezeheads.tasks.images import ArrayImages, DataSetImages, Part, SplitPlan
from test_cli import recipe  # noqa: F401 (a fixture)
from tiny import classifier

NEW = Pretrained({"teacher": None})
FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(path: Path, array: np.ndarray, magic: bytes | None = None) -> None:
    head = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    data = head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, 6, 6)), np.arange(count) % 4


@pytest.fixture(params=["", ".gz"])
def idx_folder(request, tmp_path):
    for part, count in (("train", 40), ("t10k", 12)):
        pixels, labels = arrays(count, count)
        idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", labels)
    return tmp_path


def pictures(folder: Path, per_class: int = 6, classes=("cat", "dog"), size=(20, 14)) -> None:
    """Every image a colour of its own: red is its number, green its class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            colour = (10 * number, 100 * label, 50)
            Image.new("RGB", size, colour).save(folder / name / f"{number}.png")


def task(data, pretrained=NEW, **changes):
    options = {"validation_size": 4, "test_size": 4, **changes}
    made = ImageClassification(data=str(data), **options)
    return made, made.load_data(pretrained)


def test_digits_are_the_samples_and_splits_that_results_were_made_with():
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    rest, test = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=297, stratify=labels[rest], random_state=0)
    made = ImageClassification()
    splits = made.load_data(NEW)
    for part, indices in ((splits.train, train), (splits.validation, validation), (splits.test, test)):
        batch = made.collate(list(part))
        assert torch.equal(batch["pixel_values"], pixels[indices])
        assert batch["labels"].tolist() == labels[indices].tolist()
    assert made.data_config()["image_size"] == 8 and made.data_config()["num_channels"] == 1


def test_idx_files(idx_folder):
    made, splits = task(idx_folder)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 12)
    pixels, labels = arrays(12, 12)
    batch = made.collate(list(splits.test))
    expected = (torch.tensor(pixels[:, None], dtype=torch.float64) / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch["pixel_values"].double(), expected, rtol=0, atol=1e-6)
    assert batch["labels"].tolist() == labels.tolist()
    assert made.data_config()["id2label"] == {0: "0", 1: "1", 2: "2", 3: "3"}
    held = {(s.index) for s in splits.validation}
    assert not held & {s.index for s in splits.train} and len(held) == 4
    assert sorted(s.label for s in splits.validation) == [0, 1, 2, 3], "one of each class"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), "none for t10k-labels"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 20), "says 0 × 0 × 0"),
        (lambda f: idx(f / "train-images-idx3-ubyte", np.zeros((3, 2)), None), "no IDX file of bytes in 3"),
        (
            lambda f: (f / "t10k-images-idx3-ubyte").write_bytes((f / "t10k-images-idx3-ubyte").read_bytes()[:-1]),
            "12 × 6 × 6",
        ),
        (lambda f: idx(f / "train-labels-idx1-ubyte", np.zeros(39)), "40 images, .* 39 labels"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, harm, message):
    for part, count in (("train", 40), ("t10k", 12)):
        pixels, labels = arrays(count, count)
        idx(tmp_path / f"{part}-images-idx3-ubyte", pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    harm(tmp_path)
    with pytest.raises(RecipeError, match=message):
        task(tmp_path)


@pytest.mark.parametrize("place", [12, -6])
def test_damaged_gzip_is_named(tmp_path, place):
    """In the compressed data, and in its check sum."""
    for part, count in (("train", 40), ("t10k", 12)):
        pixels, labels = arrays(count, count)
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(RecipeError, match="t10k-images-idx3-ubyte.gz: cannot be read"):
        task(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not here: make assets-data")
def test_fashion_mnist():
    made, splits = task(FASHION, validation_size=5000, max_train=1000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1000, 5000, 10000)
    assert np.bincount([s.label for s in splits.train]).tolist() == [100] * 10
    assert made.collate([splits.test[0]])["pixel_values"].shape == (1, 1, 28, 28)


def test_image_folder_is_decoded_when_asked_for(tmp_path):
    pictures(tmp_path / "all", per_class=10)
    made, splits = task(tmp_path / "all", image_size=8)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 4, 4)
    batch = made.collate(list(splits.test))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    # Uniform colours: what is left of resizing is the colour, and green says the class.
    green = (batch["pixel_values"][:, 1] / 2 + 0.5) * 255
    torch.testing.assert_close(green.mean((1, 2)), 100.0 * batch["labels"], atol=1.0, rtol=0)
    assert [made.data_config()["id2label"][i] for i in (0, 1)] == ["cat", "dog"]
    for path in (tmp_path / "all").rglob("*.png"):
        path.write_bytes(b"no picture any more")
    with pytest.raises(RecipeError, match=r"all: image \d+ cannot be decoded"):
        [s for s in (*splits.train, *splits.test, *splits.validation)]


def test_folders_by_split(tmp_path):
    for split in ("train", "val"):
        pictures(tmp_path / split, per_class=8 if split == "train" else 3)
    _, splits = task(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 6, 4)
    _, splits = task(tmp_path, test_split="validation")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 4, 6)
    with pytest.raises(RecipeError, match="test_split='nowhere': the data brings train, validation"):
        task(tmp_path, test_split="nowhere")


def saved(folder: Path, **more) -> datasets.DatasetDict:
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"]), **more})
    rows = {"img": [Image.new("L", (9, 9), 10 * i) for i in range(20)], "fine": [i % 2 for i in range(20)]}
    rows |= {name: [0] * 20 for name in more}
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    data.save_to_disk(folder)
    return data


def test_saved_data_set_and_its_columns(tmp_path):
    saved(tmp_path / "one")
    made, splits = task(tmp_path / "one", channels=1, image_size=9)
    assert made.collate([splits.train[0]])["pixel_values"].shape == (1, 1, 9, 9)
    saved(tmp_path / "two", coarse=datasets.ClassLabel(names=["x"]))
    with pytest.raises(RecipeError, match="2 columns of type ClassLabel .* label_column"):
        task(tmp_path / "two")
    made, _ = task(tmp_path / "two", label_column="fine")
    assert made.data_config()["id2label"] == {0: "a", 1: "b"}
    with pytest.raises(RecipeError, match="image_column='picture'"):
        task(tmp_path / "two", image_column="picture")


def test_splits_that_number_classes_differently_are_named(tmp_path):
    """The test split would be measured by the training split's numbers."""
    splits = {}
    for name, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [Image.new("L", (8, 8), i) for i in range(12)], "label": [i % 2 for i in range(12)]}
        splits[name] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(
        RecipeError, match="split test has the classes dog, cat, split train cat, dog: expected the sam"
    ):
        task(tmp_path / "set")


def test_models_that_number_classes_differently_are_named(tmp_path):
    """By the same names in another order; other names tell nothing."""
    pictures(tmp_path / "all", per_class=10)
    made, _ = task(tmp_path / "all")
    config = made.new_config({"model_type": "vit", "num_attention_heads": 3, "hidden_size": 24, "patch_size": 2}, "s")
    assert config.id2label == {0: "cat", 1: "dog"}
    made.check_model(config, "student")
    config.id2label = {0: "n02084071", 1: "n02121808"}
    made.check_model(config, "teacher")
    config.id2label = {0: "dog", 1: "cat"}
    with pytest.raises(RecipeError, match="teacher numbers .* class 0 is 'dog' to it, and 'cat' in the data"):
        made.check_model(config, "teacher")


def test_hub_data_set(tmp_path, monkeypatch):
    data = saved(tmp_path / "one")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or data)
    _, splits = task("hub:someone/images:plain")
    assert asked == [("someone/images", "plain")] and len(splits.train) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "./not/there"}, "no such folder"),
        ({"data": "digits", "max_train": 3}, "max_train=3: cannot be held out of .* 10 classes"),
    ],
)
def test_sources_that_cannot_be_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        ImageClassification(**options).load_data(NEW)


@pytest.mark.parametrize("limit", [999, 995, 991, 990])
def test_a_limit_close_to_the_whole_leaves_out_no_class_twice(limit):
    """Fewer images are left out than there are classes: scikit-learn's stratified draw refuses that."""
    whole = ImageClassification(data="digits").load_data(NEW).train
    part, again = (ImageClassification(data="digits", max_train=limit).load_data(NEW).train for _ in range(2))
    kept, everything = part.part.indices, whole.part.indices
    assert len(set(kept)) == limit and set(kept) < set(everything)
    left_out = np.bincount(whole.part.images.labels[list(set(everything) - set(kept))])
    assert left_out.max() == 1, "spread over the classes"
    assert (kept == again.part.indices).all(), "the seed decides"


def test_a_limit_close_to_the_whole_takes_no_class_s_only_image():
    images = ArrayImages(np.array([0] * 12 + [1] + [2] * 12), ["a", "b", "c"], np.zeros((25, 8, 8), np.uint8))
    for seed in range(8):
        plan = SplitPlan(10, 10, None, seed, {"test": 23})
        part = plan.apply({"train": images, "validation": images, "test": images})["test"]
        assert len(part.indices) == 23 and 12 in part.indices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "imagenet"}, "got 'imagenet'"),
        ({"validation_size": 3}, "validation_size=3"),
        ({"channels": 2}, "channels=2"),
        ({"std": [0.0]}, "std="),
        ({"max_test": 0}, "max_test=0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassification(**options)


# -- processors ------------------------------------------------------------------------------------------------------


def pretrained(folder: Path, heads: int, mean: float | None, std: float = 0.25, seed: int = 0, **changes):
    """A tiny classifier of digits, with its own normalisation beside it, or without."""
    model = classifier(heads, seed=seed, patch_size=4, **changes)
    model.save_pretrained(folder)
    if mean is not None:
        ViTImageProcessor(
            size={"height": 8, "width": 8}, image_mean=[mean], image_std=[std], rescale_factor=1 / 16
        ).save_pretrained(folder)
    return model.eval()


def test_each_model_sees_the_same_pixels_in_its_own_normalisation(tmp_path):
    teacher = pretrained(tmp_path / "teacher", 6, mean=0.3)
    pretrained(tmp_path / "student", 3, mean=0.6, std=0.4)
    paths = Pretrained({"teacher": str(tmp_path / "teacher")}, str(tmp_path / "student"))
    made = ImageClassification()
    splits = made.load_data(paths)
    batch = made.collate([splits.test[i] for i in range(5)])
    images = load_digits().images
    unit = torch.stack([torch.tensor(images[splits.test[i].index] / 16) for i in range(5)])[:, None]
    torch.testing.assert_close(batch["pixel_values"].double(), (unit - 0.6) / 0.4, rtol=0, atol=1e-6)
    loaded = made.load(str(tmp_path / "teacher")).eval()
    with torch.no_grad():
        wanted = teacher(((unit - 0.3) / 0.25).float()).logits
        other = teacher(batch["pixel_values"]).logits
        for found in (loaded(pixel_values=batch["pixel_values"]).logits, loaded(batch["pixel_values"]).logits):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (other - wanted).abs().max() > 0.01, "without the conversion it would see other images"
    loaded.save_pretrained(tmp_path / "again")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(plain(((unit - 0.3) / 0.25).float()).logits, wanted)


@pytest.mark.parametrize(("mean", "std"), [(0.6, 0.25), (0.3, 0.5)])
def test_a_difference_of_mean_or_deviation_alone_is_one(tmp_path, mean, std):
    teacher = pretrained(tmp_path / "teacher", 6, mean=mean, std=std)
    pretrained(tmp_path / "student", 3, mean=0.3)
    made = ImageClassification()
    made.load_data(Pretrained({"teacher": str(tmp_path / "teacher")}, str(tmp_path / "student")))
    unit = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        found = made.load(str(tmp_path / "teacher")).eval()((unit - 0.3) / 0.25).logits
        torch.testing.assert_close(found, teacher((unit - mean) / std).logits, rtol=1e-4, atol=1e-5)


def test_equal_normalisations_change_nothing(tmp_path):
    pretrained(tmp_path / "teacher", 6, mean=0.3)
    made = ImageClassification()
    made.load_data(Pretrained({"teacher": str(tmp_path / "teacher")}))
    assert made.view.normalisation == Normalisation((0.3,), (0.25,)), "a new student takes its teacher's"
    assert not made.load(str(tmp_path / "teacher"))._forward_pre_hooks


def test_the_recipe_gives_what_no_model_says(tmp_path):
    pretrained(tmp_path / "teacher", 6, mean=0.3)
    pretrained(tmp_path / "student", 3, mean=None)
    paths = Pretrained({"teacher": str(tmp_path / "teacher")}, str(tmp_path / "student"))
    made = ImageClassification(mean=[0.1])
    made.load_data(paths)
    assert made.view.normalisation == Normalisation((0.1,), (0.25,))
    assert made.load(str(tmp_path / "teacher"))._forward_pre_hooks
    assert not made.load(str(tmp_path / "student"))._forward_pre_hooks
    pretrained(tmp_path / "own", 3, mean=0.6)
    with pytest.raises(RecipeError, match="mean: the pretrained student"):
        ImageClassification(mean=[0.1]).load_data(Pretrained({"teacher": None}, str(tmp_path / "own")))


def test_a_damaged_processor_is_no_missing_one(tmp_path):
    pretrained(tmp_path / "teacher", 6, mean=0.3)
    (tmp_path / "teacher" / "preprocessor_config.json").write_text("{")
    with pytest.raises(RecipeError, match="its image processor cannot be loaded"):
        ImageClassification().load_data(Pretrained({"teacher": str(tmp_path / "teacher")}))


def test_processor_that_crops_its_own_way(tmp_path):
    """The model's own geometry: what the processor makes of an image is what the batch holds."""
    classifier(3, num_channels=3, num_labels=2).save_pretrained(tmp_path / "student")
    ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]
    ).save_pretrained(tmp_path / "student")
    pictures(tmp_path / "all", per_class=10)
    for number, path in enumerate(sorted((tmp_path / "all").rglob("*.png"))):
        draw = np.random.default_rng(number)
        Image.fromarray(draw.integers(0, 256, (14, 20 + number, 3), dtype=np.uint8)).save(path)
    made, splits = task(tmp_path / "all", Pretrained({"teacher": None}, str(tmp_path / "student")))
    batch = made.collate(list(splits.test))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "student")
    files = sorted((tmp_path / "all").rglob("*.png"))
    expected = processor(images=[Image.open(files[s.index]) for s in splits.test], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-5)


def cnn_of_the_hub(folder: Path, **options) -> ResNetForImageClassification:
    """As ResNet and RegNet lie on the hub: with ConvNeXT's image processor, whose size is one number."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder)
    options = {"size": {"shortest_edge": 16}, "crop_pct": 0.875, "image_mean": [0.2, 0.3, 0.4], **options}
    ConvNextImageProcessor(**options).save_pretrained(folder)
    return model


def test_a_cnn_of_the_hub_teaches(tmp_path):
    """Its processor resizes to 16 / 0.875 and keeps the middle; recipes can still change the size."""
    model = cnn_of_the_hub(tmp_path / "teacher")
    pictures(tmp_path / "all", per_class=10)
    paths = Pretrained({"teacher": str(tmp_path / "teacher")})
    made, splits = task(tmp_path / "all", paths)
    assert made.view.size == made.data_config()["image_size"] == 16
    batch = made.collate(list(splits.test))
    files = sorted((tmp_path / "all").rglob("*.png"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "teacher")
    expected = processor(images=[Image.open(files[s.index]) for s in splits.test], return_tensors="pt")["pixel_values"]
    assert expected.shape == (4, 3, 16, 16)
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            made.load(str(tmp_path / "teacher"), "eager")(expected).logits, model(expected).logits
        )
    assert task(tmp_path / "all", paths, image_size=8)[0].view.size == 8
    judge = ImageModel(str(tmp_path / "teacher"), classifies=True)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(judge(images), model((images - mean) / std).logits)


def test_a_processor_that_does_not_normalise(tmp_path):
    model = cnn_of_the_hub(tmp_path / "plain", do_normalize=False)
    assert normalisation_of(own_processor(str(tmp_path / "plain"))) == Normalisation((0.0,), (1.0,))
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        judged = ImageModel(str(tmp_path / "plain"), classifies=True)(images)
        torch.testing.assert_close(judged, model(images).logits)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (MobileViTImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}), "do_flip_channel"),
        (ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False), "do_rescale=False"),
        (
            EfficientNetImageProcessor(size={"height": 8, "width": 8}, rescale_offset=True, rescale_factor=1 / 127.5),
            "rescale_offset=True",
        ),
        (BitImageProcessor(size={"shortest_edge": 8}, do_center_crop=False), "8 × 12 and of 12 × 8.*expected squares"),
        (ViTImageProcessor(size={"height": 8, "width": 6}), "8 × 6 and of 8 × 6.*expected squares"),
    ],
)
def test_processors_that_do_something_else_are_refused(tmp_path, processor, message):
    """In silence a model would see other colours than it was trained on."""
    classifier(6, num_channels=3, num_labels=2).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    pictures(tmp_path / "all", per_class=10)
    with pytest.raises(RecipeError, match=message):
        task(tmp_path / "all", Pretrained({"teacher": str(tmp_path / "teacher")}))


@pytest.mark.slow
def test_a_run_saves_the_processor_beside_the_student(recipe, tmp_path):  # noqa: F811
    """A pretrained teacher and student with normalisations of their own, through the command line."""
    teacher = pretrained(tmp_path / "teacher", 6, mean=0.3)
    pretrained(tmp_path / "student", 3, mean=0.6, std=0.4, seed=2)
    path = recipe(teacher={"path": str(tmp_path / "teacher")}, student={"path": str(tmp_path / "student")}, seeds=[0])
    assert main(["distill", path]) == 0
    for folder in ("student", "students/distilled/seed-0"):
        processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / folder)
        assert processor.image_mean == (0.6,) and processor.rescale_factor == 1 / 16
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = results["teachers"]["teacher"]
    made = ImageClassification()
    splits = made.load_data(NEW)
    unit = torch.stack([torch.tensor(load_digits().images[s.index] / 16) for s in splits.test])[:, None]
    with torch.no_grad():
        logits = teacher(((unit - 0.3) / 0.25).float()).logits
    labels = torch.tensor([s.label for s in splits.test])
    assert measured["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item(), abs=1e-6)
    places = (logits.argsort(-1, descending=True) == labels[:, None]).float().argmax(-1)
    assert measured["top5"] == pytest.approx((places < 5).float().mean().item(), abs=1e-6)
    assert measured["images_per_second"] > 0


@pytest.mark.slow
def test_a_teacher_that_is_trained_further_keeps_its_processor(recipe, tmp_path):  # noqa: F811
    pretrained(tmp_path / "teacher", 6, mean=0.3)
    pretrained(tmp_path / "student", 3, mean=0.6, std=0.4)
    path = recipe(
        teacher={"path": str(tmp_path / "teacher"), "training": {"max_steps": 1, "batch_size": 8}},
        student={"path": str(tmp_path / "student")},
        seeds=[0],
    )
    assert main(["distill", path]) == 0
    assert AutoImageProcessor.from_pretrained(tmp_path / "run" / "teacher").image_mean == (0.3,)


def test_a_new_head_for_other_classes(recipe, tmp_path, capsys):  # noqa: F811
    pretrained(tmp_path / "teacher", 6, mean=None, num_labels=7)
    options = {
        "teacher": {"path": str(tmp_path / "teacher"), "training": {"max_steps": 1, "batch_size": 8}},
        "seeds": [0],
    }
    assert main(["distill", recipe(**options)]) == 2
    assert "new_head: true" in capsys.readouterr().err
    assert main(["distill", recipe(**options, task__image_classification__new_head=True)]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "teacher").config.num_labels == 10


@pytest.mark.parametrize("missing", ["other classes", "no head"])
def test_a_teacher_of_random_predictions_is_refused(recipe, tmp_path, capsys, missing):  # noqa: F811
    """A new classifier that nothing trains may teach attention, not predictions."""
    model = pretrained(tmp_path / "teacher", 6, mean=None, num_labels=7 if missing == "other classes" else 10)
    if missing == "no head":
        model.vit.save_pretrained(tmp_path / "teacher")
    options = {
        "teacher": {"path": str(tmp_path / "teacher")}, "seeds": [0], "baselines": {},
        "task__image_classification__new_head": missing == "other classes",
    }  # fmt: skip
    logits = {"objectives": {"task": {}, "logits": {}}}
    assert main(["distill", recipe(**options, **logits)]) == 2
    error = capsys.readouterr().err
    assert "teacher.path: classifier.weight, classifier.bias are not in it" in error and "objectives.logits" in error
    baselines = {"objectives": {"task": {}}, "baselines": {"KD": {"logits": {}}}}
    assert main(["distill", recipe(**{**options, **baselines})]) == 2
    assert "baselines.KD.logits learns from what it predicts" in capsys.readouterr().err
    attention = {"objectives": {"task": {}, "attention": {"calibration_batches": 1}}}
    check_models(*models_and_splits(load_recipe(recipe(**options, **attention))))


def models_and_splits(loaded):
    splits = loaded.chosen_task.load_data(Pretrained({name: t.path for name, t in loaded.named_teachers.items()}))
    return Models(loaded.chosen_task, loaded), loaded, splits


def test_channels_that_do_not_fit_are_named(recipe, tmp_path, capsys):  # noqa: F811
    pretrained(tmp_path / "teacher", 6, mean=None, num_channels=3)
    pretrained(tmp_path / "student", 3, mean=None)
    options = {"teacher": {"path": str(tmp_path / "teacher")}, "student": {"path": str(tmp_path / "student")}}
    assert main(["distill", recipe(**options)]) == 2
    assert "teacher takes images of 3 channels, the data is read with 1" in capsys.readouterr().err


def test_fingerprints_tell_files_and_labels_apart_and_decode_nothing(tmp_path):
    pictures(tmp_path / "data")
    made, splits = task(tmp_path / "data", augmentation=Augmentation(flip=0.5))
    before = [made.fingerprint(split) for split in (splits.train, splits.validation, splits.test)]
    assert len(set(before)) == 3
    again, others = task(tmp_path / "data")
    assert [again.fingerprint(split) for split in (others.train, others.validation, others.test)] == before
    chosen = splits.train.part.images.data  # files in an order that `datasets` chose
    victim = Path(chosen.data.column("image")[int(splits.train.part.indices[0])]["path"].as_py())
    victim.write_bytes(victim.read_bytes()[:-3])  # cut off: it could not be decoded
    assert made.fingerprint(splits.train) != before[0]
    assert [made.fingerprint(split) for split in (splits.validation, splits.test)] == before[1:]


def test_fingerprints_of_data_sets_go_by_the_row_that_is_shown(tmp_path):
    """Images within the data set's own files, rows in another order than they lie there."""
    rows = [Image.new("L", (8 + i, 8 + i), 10 * i) for i in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(12)]}, features=features)
    prints = {}
    for name, order in (("as it lies", range(12)), ("turned", range(11, -1, -1)), ("twice", range(11, -1, -1))):
        images = DataSetImages(np.array(order) % 2, ["a", "b"], data.select(order), "image", "here")
        prints[name] = Part(images, np.arange(4)).fingerprint()
    assert prints["turned"] == prints["twice"] != prints["as it lies"]
    turned = DataSetImages(np.arange(12)[::-1] % 2, ["a", "b"], data.select(range(11, -1, -1)), "image", "here")
    assert Part(turned, np.array([11, 10, 9, 8])).fingerprint() == prints["as it lies"]
    labels = DataSetImages(1 - np.arange(12) % 2, ["a", "b"], data, "image", "here")
    assert Part(labels, np.arange(4)).fingerprint() != prints["as it lies"]


def test_fingerprints_of_arrays(idx_folder):
    made, splits = task(idx_folder)
    first = made.fingerprint(splits.test)
    splits.test.part.images.pixels = splits.test.part.images.pixels.copy()
    assert made.fingerprint(splits.test) == first
    splits.test.part.images.pixels[3, 2, 1] ^= 1
    assert made.fingerprint(splits.test) != first
