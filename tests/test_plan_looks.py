"""What a plan, and the checks before a run, look at beside the recipe: weights that must be there, the first object of
a file, labels, packages."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from squeezeheads import SqueezeTrainer, preflight
from squeezeheads import run as running
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation import harness, inception
from squeezeheads.planning import plan_recipe
from squeezeheads.preflight import check_packages
from squeezeheads.recipe import load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.tasks import Pretrained
from squeezeheads.tasks.image_headers import outline_images
from squeezeheads.tasks.images import read_images
from tiny import language_model, write_recipe

VIT = {
    "model_type": "vit", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "patch_size": 4,
}  # fmt: skip
IMAGES = {
    "task": {"image_classification": {"data": "digits"}},
    "teacher": {"config": VIT, "training": {"max_steps": 4, "batch_size": 16}},
    "student": {"config": {"hidden_size": 12, "num_attention_heads": 3}},
    "objectives": {"task": {"weight": 0.5}, "attention": {"schedule": "progressive"}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 3, "batch_size": 16},
}
TEXTS = {
    "task": {"language_modeling": {"train": ["stdlib"], "vocabulary_size": 300, "block_size": 24}},
    "teacher": {
        "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                   "num_attention_heads": 4},
        "training": {"max_steps": 2, "batch_size": 4},
    },
    "student": {"config": {"num_attention_heads": 2, "num_key_value_heads": 2}},
    "objectives": {"task": {}, "attention": {}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 2, "batch_size": 4},
}  # fmt: skip
DIT = {"model_type": "dit", "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
GENERATION = {
    "task": {"image_generation": {"data": "digits", "validation_size": 100, "test_size": 100}},
    "teacher": {"config": DIT, "training": {"max_steps": 4, "batch_size": 16}},
    "student": {"config": {"num_attention_heads": 2}},
    "objectives": {"task": {}, "attention": {}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 3, "batch_size": 16},
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe as a tree, with changes ``{"a__b": value}``."""

    def writer(tree: dict, name: str = "recipe.yaml", **changes) -> Path:
        copy = json.loads(json.dumps({**tree, "output": str(tmp_path / "run")}))
        return write_recipe(tmp_path / name, copy, changes)

    return writer


def messages(path: Path) -> list[str]:
    return [problem.message for problem in plan_recipe(path).problems]


def one(path: Path) -> str:
    (message,) = messages(path)
    return message


# -- how it is told --------------------------------------------------------------------------------------------------


def test_json_is_given_for_what_is_no_recipe_too(tmp_path, capsys):
    for path, said in ((tmp_path / "none.yaml", "no such recipe"), (tmp_path, "a folder. Expected a recipe")):
        assert main(["plan", str(path), "--json"]) == 2
        told = json.loads(capsys.readouterr().out)
        assert not told["go"] and said in told["problems"][0]["message"]
        assert main(["plan", str(path)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_problems_stand_in_the_order_of_their_lines(write):
    path = write(
        IMAGES, training__batch_size=-1, teacher__config__num_attention_heads=5, objectives__attention__decai="linear"
    )
    problems = plan_recipe(path, ["--objectives.attention.decay=no"]).problems
    lines = [int(p.place.rsplit(":", 1)[1]) for p in problems if p.place and p.place.startswith(str(path))]
    assert len(lines) >= 2 and lines == sorted(lines)


def test_a_recipe_without_baselines_is_told_what_it_lacks(write):
    said = "No baselines: the run cannot tell what distilling gained."
    assert said in plan_recipe(write(IMAGES, baselines={})).notes
    assert said not in plan_recipe(write(IMAGES)).notes


def test_the_unit_is_the_tasks(write):
    for tree, unit in ((GENERATION, "squared error per element"), (TEXTS, "nats per prediction")):
        plan = plan_recipe(write(tree))
        assert {o["unit"] for o in plan.objectives if o["name"] == "task"} == {unit}


def test_objectives_without_names_are_no_objectives():
    with pytest.raises(TypeError, match="objectives: a list, expected a mapping of names to objectives"):
        SqueezeTrainer(model=language_model(3), teacher=language_model(3), objectives=[])


# -- weights ---------------------------------------------------------------------------------------------------------


def teacher_of(path: Path, folder: Path) -> Path:
    """A folder as ``save_pretrained`` writes it, of the recipe's teacher."""
    recipe = load_recipe(path)
    task = recipe.chosen_task
    task.sketch_data(Pretrained({}))
    Models(task, recipe).new_teacher("teacher").save_pretrained(folder)
    return folder


def no_weights(folder: Path, stem: str) -> str:
    (folder / f"{stem}.safetensors").unlink()
    return f"has no weights: expected {stem}.safetensors"


def a_pickle(folder: Path, stem: str) -> str:
    (folder / f"{stem}.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return "only pytorch_model.bin, which is not opened: weights are read from safetensors alone"


def a_lost_shard(folder: Path, stem: str) -> str:
    (folder / f"{stem}.safetensors").unlink()
    names = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    save_file({}, folder / names["a"])
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return f"lacks {names['b']}, which {stem}.safetensors.index.json names"


def a_damaged_index(folder: Path, stem: str) -> str:
    (folder / f"{stem}.safetensors").unlink()
    (folder / f"{stem}.safetensors.index.json").write_text("[1]")
    return f"{stem}.safetensors.index.json is damaged"


@pytest.mark.parametrize(
    "damage",
    [no_weights, a_pickle, *(pytest.param(d, marks=pytest.mark.slow) for d in (a_lost_shard, a_damaged_index))],
)
@pytest.mark.parametrize(("tree", "stem"), [(IMAGES, "model"), (GENERATION, "diffusion_pytorch_model")])
def test_weights_that_are_not_there_are_missed_before_the_run(write, tmp_path, tree, stem, damage, capsys):
    folder = teacher_of(write(tree), tmp_path / "teacher")
    student = {**tree["teacher"]["config"], **tree["student"]["config"]}
    path = write(tree, teacher={"path": str(folder)}, student={"config": student})
    assert messages(path) == []
    said = damage(next(folder.rglob(f"{stem}.safetensors")).parent, stem)
    (problem,) = plan_recipe(path).problems
    assert problem.key == "teacher.path" and said in problem.message
    assert main(["distill", str(path)]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "a text"}', "line 2: no field 'text', only 'body'. Name"),
        ("[1]", "line 2: a JSON list. Expected one object a line."),
        ("{", "line 2: no valid JSON"),
        ("[" * 100_000, "line 2: no valid JSON"),
    ],
)
def test_the_first_object_of_a_file_is_looked_at(write, tmp_path, line, said):
    (tmp_path / "train.jsonl").write_text(f"\n{line}\n")
    path = write(TEXTS, task__language_modeling__train=[str(tmp_path / "train.jsonl")])
    (problem,) = plan_recipe(path).problems
    assert problem.key == "task.language_modeling.train" and said in problem.message
    (tmp_path / "train.jsonl").write_text('{"text": "a text"}\n' + f"{line}\n")
    assert messages(path) == [], "the others are read by the run"


def test_a_file_in_two_splits_is_found(write, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n")
    names = [str(tmp_path / "a.txt")]
    told = one(write(TEXTS, task__language_modeling__train=names, task__language_modeling__test=names))
    assert "a.txt" in told and "train" in told and "test" in told


def test_requests_are_looked_at(write, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "Who?"}\n')
    path = write(TEXTS, task={"instruction_tuning": {"train": [str(tmp_path / "train.jsonl")], "vocabulary_size": 300}})
    told = one(path)
    assert "train.jsonl, line 1" in told and "question" in told


def test_a_missing_teacher_does_not_make_the_student_wrong(write, tmp_path):
    """Its tokenizer is that teacher's, which nobody has seen."""
    config = {**TEXTS["teacher"]["config"], "vocab_size": 1234}
    (problem,) = plan_recipe(write(TEXTS, teacher={"path": "./nowhere"}, student={"config": config})).problems
    assert problem.key == "teacher.path"


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_the_harness_and_its_tasks_are_looked_for(write, monkeypatch, folder):
    if folder is None:
        monkeypatch.setattr(harness, "find_spec", lambda name: None)
    overrides = [f"--task.language_modeling.lm_eval_folder={folder}"] if folder else []
    path = write(TEXTS, task__language_modeling__lm_eval_tasks=["blimp"])
    (problem,) = plan_recipe(path, overrides).problems
    assert ("no such folder" if folder else "needs the package lm-eval") in problem.message


# -- images ----------------------------------------------------------------------------------------------------------


def picture(path: Path, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size, size), np.uint8)).save(path)


LAYOUTS = {
    "by class": ["cat/1.png", "cat/2.JPG", "dog/1.png"],
    "an empty class": ["cat/1.png", "cat/2.png", "dog/1.png", "fish/"],
    "a hidden folder": ["cat/1.png", "cat/2.png", "dog/1.png", ".cache/1.png", "__MACOSX/1.png"],
    "a hidden file": ["cat/1.png", "cat/.2.png", "dog/1.png"],
    "other files": ["cat/1.png", "cat/notes.txt", "dog/1.png", "README.md"],
    "splits": ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"],
    "other words for splits": ["training/cat/1.png", "training/dog/1.png", "eval/dog/1.png", "dev/cat/1.png"],
    "a split in a longer name": ["my-train-1/cat/1.png", "my-train-1/dog/1.png", "test_2/dog/1.png"],
    "a class of the test split alone": ["train/cat/1.png", "train/dog/1.png", "test/fish/1.png"],
    "deep": ["train/animals/cat/1.png", "train/animals/dog/1.png", "train/cars/dog/1.png"],
    "numbers in order of text": [f"{number}/1.png" for number in range(11)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folders_outline_is_what_reading_it_gives(tmp_path, layout):
    """Classes, splits, and each image's label."""
    for name in LAYOUTS[layout]:
        if name.endswith("/"):
            (tmp_path / "data" / name).mkdir(parents=True)
        elif name.lower().endswith((".png", ".jpg")):
            picture(tmp_path / "data" / name)
        else:
            (tmp_path / "data" / name).write_text("words")
    found = read_images(str(tmp_path / "data"), None, None)
    outline = outline_images(str(tmp_path / "data"), None, None)
    assert outline is not None and outline.splits is not None
    assert outline.classes == found["train"].classes
    assert outline.splits.keys() == found.keys()
    for split, images in found.items():
        assert sorted(outline.splits[split].labels.tolist()) == sorted(images.labels.tolist()), split


@pytest.mark.parametrize("layout", [["cat_train.png", "dog_test.png"], ["a/1.png", "a/metadata.csv"]])
def test_a_folder_laid_out_by_files_is_seen_later(write, tmp_path, layout):
    for name in layout:
        if name.endswith("csv"):
            (tmp_path / "data" / name).write_text("file_name,label\n1.png,cat\n")
        else:
            picture(tmp_path / "data" / name)
    assert outline_images(str(tmp_path / "data"), None, None) is None
    plan = plan_recipe(write(IMAGES, task__image_classification={"data": str(tmp_path / "data"), "image_size": 8}))
    assert plan.go and any("its classes are seen when the run reads it" in note for note in plan.notes)


def test_a_folder_without_images_is_an_error(write, tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    told = one(write(IMAGES, task__image_classification={"data": str(tmp_path / "data"), "image_size": 8}))
    assert "no images in folders by class" in told


def test_too_few_images_to_hold_some_out_are_found(write):
    told = one(write(IMAGES, task__image_classification={"data": "digits", "test_size": 5000}))
    assert "5000" in told or "5,000" in told


def test_a_training_without_steps_is_found(write):
    path = write(IMAGES, training__batch_size=4000, training__arguments={"dataloader_drop_last": True})
    (problem,) = plan_recipe(path).problems
    assert problem.key.startswith("training") and "training samples do not fill one batch" in problem.message
    assert main(["distill", str(path)]) == 2


def test_more_samples_than_test_images_are_found(write, capsys):
    path = write(GENERATION, task__image_generation__sampling={"images": 200})
    (problem,) = plan_recipe(path).problems
    assert problem.key is not None and problem.key.endswith("sampling.images")
    assert main(["distill", str(path)]) == 2
    assert " ".join(problem.message.split())[:60] in " ".join(capsys.readouterr().err.split())


def test_packages_that_fid_needs_are_looked_for(write, monkeypatch):
    monkeypatch.setattr(inception, "find_spec", lambda name: None if name == "torch_fidelity" else find_spec(name))
    told = one(write(GENERATION, task__image_generation__sampling={"images": 100, "inception": True}))
    assert "torch_fidelity" in told and "sampling.inception" in told


# -- the machine and the run's folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(("tree", "package"), [(IMAGES, "sklearn"), (TEXTS, "matplotlib"), (GENERATION, "diffusers")])
def test_a_package_that_is_needed_at_the_end_is_missed_at_the_beginning(write, monkeypatch, tree, package):
    path = write(tree)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(RecipeError, match=f"a run needs {package}, missing here"):
        check_packages(load_recipe(path).chosen_task)
    assert any(f"a run needs {package}, missing here" in message for message in messages(path))


@pytest.mark.slow
def test_seeds_are_added_to_a_finished_run(write, tmp_path, capsys):
    """What is there stays; fewer seeds, or others, are another run."""
    path = write(IMAGES, seeds=[0], baselines={})
    assert main(["distill", str(path)]) == 0
    first = json.loads((tmp_path / "run" / "results.json").read_text())["students"]["distilled"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*seed-0*/*")}
    assert main(["distill", str(path), "--seeds", "[0, 1]"]) == 0
    both = json.loads((tmp_path / "run" / "results.json").read_text())["students"]["distilled"]
    assert len(first) == 1 and len(both) == 2 and both[0] == first[0]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items() if p.exists())
    for other in ("[1]", "[1, 0]", "[2, 0, 1]"):
        assert main(["distill", str(path), "--seeds", other]) == 2
    assert "seeds" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_a_run_whose_further_seed_is_stopped_is_the_run_that_it_was(write, tmp_path, monkeypatch):
    path = write(IMAGES, seeds=[0], baselines={})
    assert main(["distill", str(path)]) == 0
    before = (tmp_path / "run" / "recipe.json").read_text()
    student = running._Run.student

    def stopped(self, name, objectives, seed):
        if seed:
            raise RecipeError("the training diverges")
        return student(self, name, objectives, seed)

    monkeypatch.setattr(running._Run, "student", stopped)
    assert main(["distill", str(path), "--seeds", "[0, 1]"]) == 2
    assert (tmp_path / "run" / "recipe.json").read_text() == before
    assert main(["distill", str(path)]) == 0


def test_what_only_this_machine_lacks_is_no_problem_of_another(write, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    plan = plan_recipe(write(TEXTS, task__language_modeling__lm_eval_tasks=["blimp"]), elsewhere=True)
    for said in ("a run needs matplotlib", "lm_eval_tasks needs the package lm-eval"):
        assert plan.go and any(said in note for note in plan.notes)


def test_a_folder_that_is_no_data_set_is_named(write, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "state.json").write_text("{}")
    told = one(write(IMAGES, task__image_classification={"data": str(tmp_path / "data"), "image_size": 8}))
    assert f"data={str(tmp_path / 'data')!r}: cannot be loaded" in told
