"""What a recipe from a stranger, and what it names, cannot do: each sentence of docs/security.md."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, TimmWrapperConfig, ViTForImageClassification, modeling_utils
from transformers.integrations import hub_kernels

from squeezeheads import SqueezeTrainer, TaskLoss, write_teacher_cache
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation.image_model import load_judge
from squeezeheads.preflight import check_output
from squeezeheads.recipe import load_recipe
from squeezeheads.run_cache import check_caches
from squeezeheads.run_folder import models_and_data
from squeezeheads.tasks import ImageClassification, LanguageModeling, Pretrained
from squeezeheads.training_options import training_arguments
from test_cli import SMALL
from test_trainer import arguments, trainer
from tiny import classifier, image_batch, images, write_recipe


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that a stranger's code would leave. `evil.py`, on the path and in the working folder, leaves it when it is
    imported."""
    mark = tmp_path / "code-was-run"
    source = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Thing: pass\nmain = Thing\n"
    (tmp_path / "evil.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("evil", None)
    yield mark
    assert "evil" not in sys.modules
    assert not mark.exists()


class Evil:
    """Leaves the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> str:
        tree = json.loads(json.dumps({**SMALL, "output": str(tmp_path / "run")}))
        return str(write_recipe(tmp_path / "recipe.yaml", tree, changes))

    return write


def refused(capsys, *arguments: str) -> str:
    assert main(["distill", *arguments]) == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the file itself


def test_the_mark_is_left_by_what_the_tests_plant(tmp_path):
    """Or none of them could fail."""
    mark = tmp_path / "mark"
    torch.save(Evil(mark), tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        torch.load(tmp_path / "evil.pt", weights_only=True)
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


def test_yaml_makes_no_objects(recipe, ran, capsys):
    path = Path(recipe())
    path.write_text(path.read_text() + f"extra: !!python/object/apply:pathlib.Path.touch [{str(ran)!r}]\n")
    assert "no valid YAML" in refused(capsys, str(path))


THING = {"class_path": "evil.Thing", "init_args": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives__task": THING},
        {"objectives__task": "evil.Thing"},
        {"task": THING},
        {"training": THING},
        {"student": "evil.Thing"},
        {"student__config": THING},
        {"student__config__hidden_act": "evil.Thing"},
        {"teacher__training__arguments": THING},
        {"training__arguments": {"optim": "evil.Thing"}},
        {"training__arguments": {"lr_scheduler_kwargs": THING}},
        {"training__arguments": {"lr_scheduler_kwargs": {"of": [THING]}}},
        {"training__arguments": {"lr_scheduler_kwargs": json.dumps(THING)}},
        {"student__config__rope_scaling": THING},
        {"teacher__config__hidden_act": json.dumps(THING)},
        {"teacher__config__hidden_act": "!!python/name:evil.Thing"},
    ],
    ids=str,
)
def test_a_recipe_imports_nothing(recipe, ran, capsys, changes):
    refused(capsys, recipe(**changes))


def test_text_is_taken_as_it_stands(recipe, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    loaded = load_recipe(recipe(output="${oc.env:SECRET}/$SECRET/`id`"))
    assert loaded.output == "${oc.env:SECRET}/$SECRET/`id`"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"task": {"language_modeling": {"train": ["x"], "lm_eval_tasks": ["a"], "lm_eval_folder": "none"}}},
            "lm_eval",
        ),
        ({"training__arguments": {"report_to": "wandb"}}, "training.arguments.report_to"),
        (
            {"teacher__training__arguments": {"report_to": ["tensorboard", "wandb"]}},
            "teacher.training.arguments.report",
        ),
        ({"training__arguments": "{report_to: wandb}"}, "training.arguments.report_to"),
        ({"training__arguments": {"report_to": {"wandb": 1}}}, "training.arguments.report_to"),
        ({"training__arguments": {"trackio_space_id": "them/theirs"}}, "trackio_space_id"),
        ({"student__config": {"trust_remote_code": True}}, "student.config.trust_remote_code"),
    ],
    ids=str,
)
def test_what_the_command_line_alone_may_say_is_refused_in_a_file(recipe, changes, key):
    with pytest.raises(RecipeError, match=f"{key}.* cannot stand in a file: .*"):
        load_recipe(recipe(**changes))


def test_the_command_line_may_say_it(recipe):
    path = recipe(training__arguments={"report_to": "none"})
    for given in ("--training.arguments.report_to=wandb", "--training.arguments={report_to: wandb}"):
        assert load_recipe(path, [given]).training.arguments["report_to"] == "wandb"
    wandb = recipe(training__arguments={"report_to": "wandb"})
    with pytest.raises(RecipeError, match="report_to"):
        load_recipe(wandb, ["--training.arguments.optim", "sgd"])
    assert load_recipe(wandb, ["--training.arguments.report_to", "none"]).training.arguments["report_to"] == "none"
    load_recipe(recipe(baselines={"report_to": {"task": {}}}))
    texts = {"language_modeling": {"train": ["x"], "lm_eval_tasks": ["a"], "lm_eval_folder": "mine"}}
    key = "--task.language_modeling.lm_eval_folder"
    assert load_recipe(recipe(task=texts), [key, "other"]).chosen_task.lm_eval_folder == "other"
    with pytest.raises(RecipeError, match=f"command line: {key} 'mine'"):
        load_recipe(recipe(task=texts))


def test_nothing_is_reported_unless_asked_for(recipe, tmp_path):
    loaded = load_recipe(recipe())
    assert training_arguments(loaded.training, "training", tmp_path, 0).report_to == []


def test_no_command_takes_remote_code(recipe, ran, capsys):
    assert "trust_remote_code" in refused(capsys, recipe(), "--trust_remote_code", "true")


# ------------------------------------------------------------------------------------------------- models and data


def with_code_of_its_own(folder: Path) -> Path:
    """A model that asks for code that lies beside it, as remote code does; and so does its image processor."""
    classifier(6).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Thing"]}
    config["auto_map"] = {name: "evil.Thing" for name in ("AutoConfig", "AutoModelForImageClassification")}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "Thing", "auto_map": {"AutoImageProcessor": "evil.Thing"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    shutil.copy("evil.py", folder / "evil.py")
    return folder


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_models_own_code_is_not_run(recipe, ran, capsys, tmp_path, whose):
    folder = with_code_of_its_own(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    message = refused(capsys, recipe(**{whose: {"path": str(folder)}}))
    assert str(folder) in message and "custom code" in message


def test_an_image_processors_own_code_is_not_run(recipe, ran, capsys, tmp_path):
    folder = with_code_of_its_own(tmp_path / "model")
    processor = (folder / "preprocessor_config.json").read_text()
    classifier(6).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(processor)
    refused(capsys, recipe(teacher={"path": str(folder)}))


def test_a_tokenizers_own_code_is_not_run(ran, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    own = {"tokenizer_class": "Thing", "auto_map": {"AutoTokenizer": ["evil.Thing", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    shutil.copy("evil.py", folder / "evil.py")
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"some words {i} " * 50)
    with pytest.raises(RecipeError, match="tokenizer"):
        LanguageModeling(train=["texts"], tokenizer=str(folder)).load_data(Pretrained({}, None, None))


def test_pickled_weights_are_not_opened(recipe, ran, capsys, tmp_path):
    classifier(6, patch_size=4).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weights": Evil(ran)}, tmp_path / "model" / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, recipe(teacher={"path": str(tmp_path / "model")}))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_what_is_pickled_in_a_checkpoint_runs_nothing(tmp_path, ran, file):
    """A folder of a run from a stranger. Trainer writes the last of these and nobody reads it."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path / "run", **saving).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    torch.save(Evil(ran), tmp_path / "run" / "checkpoint-2" / file)
    if file == "training_args.bin":
        trainer(tmp_path / "run", **saving).train(resume_from_checkpoint=True)
    else:
        with pytest.raises(Exception, match="[Ww]eights"):
            trainer(tmp_path / "run", **saving).train(resume_from_checkpoint=True)


HUB_KERNEL = "kernels-community/flash-attn2"


@pytest.fixture
def fetched(monkeypatch):
    """transformers takes a name of the hub for a kernel, and runs what lies there, where the package kernels is
    installed: as if it were. What would be fetched."""
    asked: list[str] = []

    def fetch(name, *args, **kwargs):
        asked.append(name)
        raise ValueError("a kernel would be fetched")

    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *args: True)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *args: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetch)
    return asked


def changed_config(folder: Path, **changes) -> str:
    classifier(6, patch_size=4).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_a_kernel_is_seen_to_be_fetched(tmp_path, fetched):
    """Or none of the tests could fail. transformers takes what the folder says before what it is asked for."""
    folder = changed_config(tmp_path / "a", _attn_implementation=HUB_KERNEL)
    with suppress(ValueError):
        AutoModelForImageClassification.from_pretrained(folder, attn_implementation="sdpa")
    assert fetched == [HUB_KERNEL]
    with suppress(ImportError):
        AutoModelForImageClassification.from_config(classifier(6).config, attn_implementation="flash_attention_2")
    assert fetched == [HUB_KERNEL, HUB_KERNEL]


@pytest.mark.parametrize(
    "changes",
    [
        {"student__attn_implementation": HUB_KERNEL},
        {"student__attn_implementation": "flash_attention_2"},
        {"teacher__attn_implementation": "flash_attention_3"},
        {"student__config__attn_implementation": HUB_KERNEL},
        {"student__config___attn_implementation": HUB_KERNEL},
        {"student__config___attn_implementation": {"": HUB_KERNEL}},
        {"teacher__config___attn_implementation": "flash_attention_2"},
    ],
    ids=str,
)
def test_no_kernel_is_fetched(recipe, capsys, fetched, changes):
    assert "attn_implementation" in refused(capsys, recipe(objectives={"task": {}}, **changes))
    assert fetched == []


@pytest.mark.parametrize(
    "said",
    [
        {"_attn_implementation": HUB_KERNEL},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": HUB_KERNEL},
        {"part": {"_experts_implementation": "them/theirs"}},
    ],
    ids=str,
)
def test_no_kernel_is_fetched_for_a_folder(tmp_path, fetched, said):
    """For a model of the run, and for one that judges images."""
    path, task = changed_config(tmp_path / "model", **said), ImageClassification()
    with pytest.raises(RecipeError, match="teacher.path=.*cannot be loaded: .*_implementation"):
        task.pretrained_config(path, "teacher.path")
    with pytest.raises(ValueError, match="_implementation"):
        task.load(path)
    with pytest.raises(RecipeError, match="classifier: .*_implementation"):
        load_judge(path, (1, 8), "classifier", classifies=True)
    assert fetched == []


def test_a_class_that_runs_on_a_kernel_of_the_hub_is_refused(monkeypatch, fetched):
    """Even where the package of the flash attention that was asked for is there."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(ViTForImageClassification, "_compatible_flash_implementations", [HUB_KERNEL], raising=False)
    with pytest.raises(ValueError, match=f"ViTForImageClassification runs on {HUB_KERNEL}"):
        ImageClassification().build(classifier(6).config, "flash_attention_2")
    assert fetched == []


LOADING = [
    {"checkpoint_path": "evil.pt"}, {"pretrained": True}, {"pretrained_cfg": {"file": "evil.pt"}},
    {"pretrained_cfg_overlay": {"url": "http://them"}}, {"cache_dir": "/etc"}, {"features_only": True},
]  # fmt: skip


@pytest.mark.parametrize("arguments", LOADING, ids=str)
def test_timm_loads_nothing(recipe, ran, capsys, tmp_path, arguments):
    """Its `create_model`, to which `model_args` go, opens a checkpoint by these; before 1.0.26 by unpickling it."""
    torch.save({"weights": Evil(ran)}, tmp_path / "evil.pt")
    config = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": arguments}
    message = refused(capsys, recipe(teacher={"config": config, "training": SMALL["teacher"]["training"]}))
    assert f"teacher.config.model_args.{next(iter(arguments))}=" in message
    folder = tmp_path / "model"
    TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=10, model_args=arguments).save_pretrained(folder)
    message = refused(capsys, recipe(teacher={"path": str(folder)}))
    assert f"{folder}: its configuration's model_args.{next(iter(arguments))}=" in message
    with pytest.raises(ValueError, match="a file would be loaded by it"):
        ImageClassification().load(str(folder))
    with pytest.raises(RecipeError, match="a file would be loaded by it"):
        load_judge(str(folder), (1, 8), "sampling.features", classifies=False)


def test_timm_takes_no_architecture_from_elsewhere(recipe, capsys):
    config = {"model_type": "timm_wrapper", "architecture": "local-dir:/mine"}
    message = refused(capsys, recipe(teacher={"config": config, "training": SMALL["teacher"]["training"]}))
    assert "teacher.config.architecture='local-dir:/mine': expected the name of an architecture" in message


@pytest.mark.parametrize("name", ["./evil", "hub:evil"])
def test_a_data_sets_script_is_not_run(ran, tmp_path, name):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text((tmp_path / "evil.py").read_text())
    with pytest.raises(RecipeError, match="evil"):
        if name == "./evil":
            ImageClassification(data=name).load_data(Pretrained({}, None, None))
        else:
            LanguageModeling(train=[name]).load_data(Pretrained({}, None, None))


BUILDERS = [
    "pandas",
    "text",
    "csv",
    "json",
    "parquet",
    "arrow",
    "imagefolder",
    "webdataset",
    "sql",
    "spark",
    "generator",
]


@pytest.mark.parametrize("name", [*BUILDERS, "mine", "./mine", ".", "mine/train.pkl"])
def test_a_name_of_the_hub_reads_nothing_here(ran, tmp_path, name):
    """`datasets` has builders that read files of this machine by such names, and takes a folder for a data set. That of
    pandas unpickled what it found."""
    (tmp_path / "mine").mkdir()
    for place in (tmp_path, tmp_path / "mine"):
        (place / "train.pkl").write_bytes(pickle.dumps(Evil(ran)))
        (place / "train.txt").write_text("a secret")
    said = "is here, not on the hub" if "mine" in name or name == "." else "is no data set of the hub"
    images, texts = ImageClassification(data=f"hub:{name}"), LanguageModeling(train=[f"hub:{name}"])
    for task in (images, texts):
        with pytest.raises(RecipeError, match=f"{name} {said}"):
            task.load_data(Pretrained({}, None, None))
        (problem,) = task.sketch_data(Pretrained({}, None, None)).problems
        assert f"{name} {said}" in problem[1]


def test_a_script_among_images_is_not_run(recipe, ran, tmp_path):
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(8):
                Image.new("L", (8, 8), 20 * i).save(tmp_path / "pictures" / split / label / f"{i}.png")
    for name in ("pictures.py", "evil.py", "__init__.py"):
        shutil.copy("evil.py", tmp_path / "pictures" / name)
    loaded = load_recipe(
        recipe(task={"image_classification": {"data": str(tmp_path / "pictures"), "validation_size": 4}})
    )
    assert len(models_and_data(loaded, console())[1].test) == 16


def console():
    from rich.console import Console

    return Console(file=open(os.devnull, "w"))


# ----------------------------------------------------------------------------------------------------------- files


def test_names_stay_below_output(recipe, tmp_path):
    loaded = load_recipe(recipe(baselines={"../../outside": {"task": {}}, "/etc/x": {"task": {}}}))
    from squeezeheads.recipe import folder_name

    assert [folder_name(name) for name in loaded.arms] == ["------outside", "-etc-x", "distilled"]
    with pytest.raises(RecipeError, match="letters, digits"):
        load_recipe(recipe(teacher=None, teachers={"../x": SMALL["teacher"]}))


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "is no run of squeezeheads" in refused(capsys, recipe())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("link", ["work", "student", "work/students/distilled", "student/model.safetensors"])
def test_links_inside_a_run_are_refused(recipe, tmp_path, link):
    """What lies behind would be written to, or deleted with `work`."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("weights")
    place = tmp_path / "run" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(recipe())
    from squeezeheads.files import store_json
    from squeezeheads.recipe import dump_recipe

    store_json(tmp_path / "run" / "recipe.json", dump_recipe(loaded))
    check_output(tmp_path / "run", loaded)
    place.symlink_to(tmp_path / "mine" / ("model.safetensors" if place.suffix else ""))
    with pytest.raises(RecipeError, match="is a symbolic link to .*let output itself be the link"):
        check_output(tmp_path / "run", loaded)


def test_output_itself_may_be_a_link(recipe, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    check_output(tmp_path / "run", load_recipe(recipe()))


def test_checkpoints_behind_links_are_not_deleted(tmp_path):
    """Of a trainer in a script, which takes any folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights").write_text("")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(tmp_path / "mine")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    SqueezeTrainer(
        model=classifier(3), args=arguments(run, **saving), objectives={"task": TaskLoss()}, train_dataset=images(16)
    ).train()
    assert [p.name for p in sorted(run.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-4"]
    assert (tmp_path / "mine" / "weights").exists()


def own_shard(folder: Path) -> None:
    """As a cache's would be named, and with another's tensors."""
    save_file({"embeddings": torch.arange(4.0)}, folder / "shard-00000.safetensors")


@pytest.mark.parametrize(
    "plant",
    [
        own_shard,
        lambda folder: (folder / "shard-00001.safetensors").write_text("half of something"),
        lambda folder: (folder / "shard-notes.safetensors.part").write_text("mine"),
        lambda folder: (folder / "shard-00000.safetensors.part").write_text("mine"),
        lambda folder: (folder / "index.json").write_text('{"weight_map": {}}'),
        lambda folder: (folder / "thesis.txt").write_text("years of work"),
    ],
    ids=["a shard", "half a shard", "a part", "a part of that name", "an index", "a text"],
)
def test_a_folder_that_is_no_teacher_cache_is_left_alone(tmp_path, capsys, plant):
    """Before any training, by `plan` and by the run; and in code of one's own."""
    mine = tmp_path / "mine"
    mine.mkdir()
    plant(mine)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    tree = json.loads(json.dumps({**SMALL, "output": str(tmp_path / "run")}))
    tree |= {"objectives": {"task": {}, "logits": {}}, "baselines": {}}
    tree["teacher"]["cache"] = {"folder": str(mine)}
    path = write_recipe(tmp_path / "recipe.yaml", tree, {})
    message = refused(capsys, str(path))
    assert f"teacher.cache.folder={str(mine)!r}: {mine} holds {next(iter(before))} and is no teacher cache" in message
    loaded = load_recipe(path)
    models, splits = models_and_data(loaded, console())
    with pytest.raises(RecipeError, match="is no teacher cache"):
        check_caches(loaded, models.vocabularies)
    with pytest.raises(ValueError, match="is no teacher cache"):
        write_teacher_cache(classifier(6), [image_batch(2)], mine, k=3)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_others_files_within_a_teacher_cache_stay(tmp_path):
    """Those whose names are not quite a shard's are not looked at, one that is named as a shard is refused."""
    folder = tmp_path / "cache"
    write_teacher_cache(classifier(6), [image_batch(2)], folder, k=3)
    for name in ("shard-foo.safetensors", "shard-foo.safetensors.part", "shard-1.part", "notes.txt"):
        (folder / name).write_text("mine")
    (folder / "shard-00005.safetensors.part").write_text("cut off")
    assert write_teacher_cache(classifier(6), [image_batch(2, seed=1)], folder, k=3).samples == 4
    assert all(
        (folder / name).exists() for name in ("shard-foo.safetensors", "shard-foo.safetensors.part", "notes.txt")
    )
    assert (folder / "shard-1.part").exists() and not (folder / "shard-00005.safetensors.part").exists()
    save_file({"embeddings": torch.arange(4.0)}, folder / "shard-00007.safetensors")
    with pytest.raises(ValueError, match=r"shard-00007.safetensors is no shard of a teacher cache: move it"):
        write_teacher_cache(classifier(6), [image_batch(2, seed=2)], folder, k=3)
    assert (folder / "shard-00007.safetensors").exists()
