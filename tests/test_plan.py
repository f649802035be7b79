"""`squeezeheads plan`: what a recipe would do, told without weights and data; every mistake before training, with its
line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from squeezeheads import run
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.files import store_json
from squeezeheads.planning import plan_recipe
from squeezeheads.planning.costs import parse_memory
from squeezeheads.planning.plan import Plan
from squeezeheads.planning.shown import plan_text
from squeezeheads.recipe import dump_recipe, load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.tasks import LanguageModeling, Task
from tiny import write_recipe

ROOT = Path(__file__).parent.parent
VIT = {
    "model_type": "vit", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
    "patch_size": 4,
}  # fmt: skip
IMAGES = {
    "task": {"image_classification": {"data": "digits"}},
    "teacher": {"config": VIT, "training": {"max_steps": 4, "batch_size": 16}},
    "student": {"config": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2}},
    "objectives": {"task": {"weight": 0.5}, "logits": {"weight": 0.5}, "attention": {"schedule": "progressive"}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 3, "batch_size": 16},
}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
TEXTS = {
    "task": {"language_modeling": {"train": ["stdlib"], "vocabulary_size": 300, "block_size": 24}},
    "teacher": {"config": LLAMA, "training": {"max_steps": 2, "batch_size": 4}},
    "student": {"config": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}},
    "objectives": {"task": {}, "logits": {}, "attention": {}},
    "training": {"max_steps": 2, "batch_size": 4},
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe of images, or with ``texts=True`` of texts, with changes ``{"a__b": value}``."""

    def writer(texts: bool = False, name: str = "recipe.yaml", **changes) -> Path:
        tree = json.loads(json.dumps({**(TEXTS if texts else IMAGES), "output": str(tmp_path / "run")}))
        return write_recipe(tmp_path / name, tree, changes)

    return writer


def line_of(path: Path, key: str, nth: int = 0) -> int:
    """The line on which a key stands, the nth time from 0."""
    return [n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(f"{key}:")][nth]


def objective(plan: Plan, name: str, arm: str = "distilled"):
    return next(o for o in plan.objectives if (o["set"], o["name"]) == (arm, name))


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_a_plan_says_who_learns_what_from_whom(write):
    plan = plan_recipe(write())
    assert plan.go and plan.problems == []
    teacher, student = plan.models
    assert (teacher["whose"], teacher["layers"], teacher["heads"]) == ("teacher", 4, [[6, 6]])
    assert (student["whose"], student["layers"], student["heads"]) == ("student", 2, [[3, 3]])
    layers = objective(plan, "attention")["layers"]
    assert [(entry["student_layer"], entry["teacher_layer"]) for entry in layers] == [
        ("vit.layers.0.attention", "vit.layers.1.attention"),
        ("vit.layers.1.attention", "vit.layers.3.attention"),
    ]
    assert layers[0]["groups"] == [[0, 1], [2, 3], [4, 5]]
    assert layers[0]["tokens"].startswith("class + 4 patches (5 of")
    assert objective(plan, "attention")["unit"] == "nats per row and head"
    assert objective(plan, "logits")["weight"] == 0.5 and objective(plan, "task", "no teacher")["teachers"] == []
    text = plan_text(plan)
    assert text.startswith(f"{write()}: go\n")
    assert "vit.layers.1.attention ← vit.layers.3.attention: 0 ← 0, 1   1 ← 2, 3   2 ← 4, 5" in text
    assert "progressive groups, least_squares weights" in text and "class + 4 patches" in text


def test_parameters_are_those_of_the_real_models(write):
    path = write()
    recipe = load_recipe(path)
    recipe.chosen_task.load_data(preflight_pretrained())
    models = Models(recipe.chosen_task, recipe)
    real = {"teacher": models.new_teacher("teacher"), "student": models.new_student(0)}
    told = {model["whose"]: model["parameters"] for model in plan_recipe(path).models}
    assert told == {name: model.num_parameters() for name, model in real.items()}


def preflight_pretrained():
    from squeezeheads.tasks import Pretrained

    return Pretrained({"teacher": None})


def test_groups_found_on_data_are_not_made_up(write):
    plan = plan_recipe(write(texts=True))
    (layer,) = objective(plan, "attention")["layers"]
    assert layer["groups"] is None and layer["heads"] == [2, 4]
    assert "4 heads in 2 groups of 1 to 3, found on data at the start of the run" in plan_text(plan)
    equal = plan_recipe(write(texts=True, student__config={"num_hidden_layers": 1}))
    assert objective(equal, "attention")["layers"][0]["groups"] == [[0], [1], [2], [3]], "nothing is to be found"


def test_a_plan_reads_neither_weights_nor_data_and_leaves_nothing(write, monkeypatch):
    for name in ("load_data", "load"):
        monkeypatch.setattr(Task, name, lambda *args, **kwargs: pytest.fail("something was loaded"))
        monkeypatch.setattr(LanguageModeling, name, lambda *args, **kwargs: pytest.fail("something was loaded"))
    path = write(texts=True)
    assert plan_recipe(path).go
    assert [entry.name for entry in path.parent.iterdir()] == ["recipe.yaml"]


def test_json_says_the_same(write, capsys):
    path = write()
    assert main(["plan", str(path), "--json", "--memory", "2GiB"]) == 0
    told = json.loads(capsys.readouterr().out)
    plan = plan_recipe(path, memory=2 * 2**30)
    assert told == json.loads(json.dumps(plan.to_json()))
    assert told["go"] is True and told["memory_given"] == 2**31 and told["flops"]["distilled"]["squeezing"] > 0


def test_the_exit_code_is_the_answer(write, capsys):
    assert main(["plan", str(write())]) == 0
    assert main(["plan", "--objectives.attention.layers", "[[0, 9]]", str(write())]) == 2
    shown = capsys.readouterr().out
    assert "no go, one problem" in shown and "--objectives.attention.layers of the command line: " in shown
    assert main(["plan", "--help"]) == 0 and "--memory SIZE" in capsys.readouterr().out
    assert main(["plan", str(write()), "--memory", "much"]) == 2
    assert "expected a size such as 16GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 2**34), ("500 MB", 5 * 10**8), ("1e9", 10**9), ("1.5kib", 1536), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "16 apples", "-1GiB", "0", "nan", "1e999"])
def test_no_sizes(text):
    with pytest.raises(RecipeError, match="expected a size"):
        parse_memory(text)


# -- the shipped recipes -----------------------------------------------------------------------------------------------


ALL = """
import json, resource, sys
from squeezeheads.planning import plan_recipe
told = {}
for path, overrides in json.loads(sys.argv[1]).items():
    told[path] = plan_recipe(path, overrides).to_json()
print(json.dumps({"plans": told, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
"""


def pretrained_overrides(tmp_path: Path) -> dict[str, list[str]]:
    """Full-size recipes name models that are not here: folders with their configurations stand in."""
    from test_paper_recipes import DIT, HUB

    for name, config in HUB.items():
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()  # that there are weights; nothing reads them
    store_json(tmp_path / "dit" / "config.json", DIT)
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
    store_json(tmp_path / "vae" / "config.json", vae)
    for name in ("dit", "vae"):
        (tmp_path / name / "diffusion_pytorch_model.safetensors").touch()
    latents = f"--task.image_generation.autoencoder={tmp_path / 'vae'}"
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        recipe = load_recipe(path)
        specs = {"student": recipe.student, **{recipe.teacher_key(n): s for n, s in recipe.named_teachers.items()}}
        named = {key: spec.path for key, spec in specs.items() if spec.path in HUB}
        found[str(path)] = [f"--{key}.path={tmp_path / name}" for key, name in named.items()]
        if "latents" in path.read_text():
            found[str(path)].append(latents)
        if path.stem == "dit-xl-to-s":
            found[str(path)].append(f"--teacher.path={tmp_path / 'dit'}")
    return found


@pytest.mark.slow
def test_every_shipped_recipe_is_planned_in_little_memory(tmp_path):
    recipes = pretrained_overrides(tmp_path)
    assert len(recipes) == 16
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(recipes)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["MiB"] < 2048
    for path, plan in told["plans"].items():
        name = Path(path).stem
        messages = [problem["message"] for problem in plan["problems"]]
        here = "demo" in path and name not in ("smollm2-wordnet", "fashion-vit")  # those need `make assets`
        if not here:
            # What is missing on this machine is told, and nothing else is amiss.
            missing = ("not there", "no such folder", "no tokenizer files", "no file matches", "bf16", "timm")
            missing += ("loaded", "torch-fidelity")
            assert all(any(word in message for word in missing) for message in messages), messages
        if "paper" in path:
            assert any("data/" in message for message in messages)
            assert {model["whose"] for model in plan["models"]} >= {"student"}
            assert plan["memory"]["students"]["total"] > 2**30 and plan["flops"]["distilled"]["squeezing_share"] < 0.2
            taught = [o for o in plan["objectives"] if o["kind"] == "SqueezedHeads"]
            assert taught and all(o["layers"] for o in taught), name


def test_full_size_models_are_those_of_the_paper_recipes(tmp_path):
    overrides = next(o for path, o in pretrained_overrides(tmp_path).items() if "llama-13b" in path)
    plan = plan_recipe(ROOT / "recipes" / "paper" / "llama-13b-to-7b.yaml", overrides)
    assert [model["parameters"] // 10**6 for model in plan.models] == [13015, 6738]
    (layer, *_) = objective(plan, "attention")["layers"]
    assert layer["heads"] == [32, 40] and len(layer["groups"]) == 32
    memory = plan.memory["students"]
    assert memory["weights"] == pytest.approx(4 * 6.738e9, rel=1e-3) and memory["optimiser"] == 2 * memory["gradients"]
    assert memory["teachers"] == pytest.approx(2 * 13.016e9, rel=1e-2), "bfloat16, and its logits"
    assert memory["activations"] < 5e9, "layers are checkpointed"


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "wrong head count": (
        {"student__config": {"hidden_size": 12, "num_attention_heads": 5}},
        r"hidden_size=12 is no multiple of num_attention_heads=5",
        "hidden_size",
        0,
    ),
    "vocabulary mismatch": (
        {"texts": True, "student__config__vocab_size": 20},
        r"student tells 20 tokens apart, the tokenizer has 257",
        "student",
        0,
    ),
    "missing file": (
        {"texts": True, "task__language_modeling__train": ["nothing.txt"]},
        r"train: nothing\.txt is not there",
        "train",
        0,
    ),
    "layer out of range": (
        {"objectives__attention__layers": [[0, 9]]},
        r"objectives\.attention: layers: \[0, 9\] is no pair .* a teacher layer from 0 to 3",
        "layers",
        0,
    ),
    "token counts": (
        {"student__config__patch_size": 2},
        r"objectives\.attention: .*grids of 16 and 4 patches",
        "attention",
        0,
    ),
    "unknown key": (
        {"objectives__attention__decai": "linear"},
        r"unknown key 'objectives\.attention\.decai'. Did you mean 'decay'",
        "decai",
        0,
    ),
    "eager model": (
        {"student__attn_implementation": "eager"},
        r"student: no scaled_dot_product_attention call .* attn_implementation is 'eager'",
        "attn_implementation",
        0,
    ),
    "too wide for float16": (
        {"student__config": {"hidden_size": 65600, "num_attention_heads": 4, "num_hidden_layers": 1},
         "student__dtype": "float16"},
        r"student is 65600 wide at .*, and float16 ends at 65,504",
        "dtype",
        0,
    ),
    "same folder twice": (
        {"baselines": {"no teacher": {"task": {}}, "no-teacher": {"logits": {}}}},
        r"baselines\.no.teacher: its folder would be another's too",
        "no",
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_training_with_its_line(write, name, capsys, monkeypatch):
    monkeypatch.setattr(run, "models_and_data", lambda *args: pytest.fail("data or models were loaded"))
    changes, message, key, nth = MISTAKES[name]
    path = write(**changes)
    plan = plan_recipe(path)
    found = [problem for problem in plan.problems if says(message, problem.message)]
    assert len(found) == 1, [str(problem) for problem in plan.problems]
    if key != "no":
        assert found[0].place == f"{path}:{line_of(path, key, nth)}"
    assert main(["distill", str(path)]) == 2
    assert says(message, " ".join(capsys.readouterr().err.split()))
    assert not (path.parent / "run").exists()


def says(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def test_a_batch_too_large_for_the_memory_given_is_found(write, capsys):
    path = write()
    plan = plan_recipe(path, memory=2**18)
    (teacher, student) = plan.problems
    assert teacher.key == "teacher.training.batch_size" and student.key == "training.batch_size"
    assert student.place == f"{path}:{line_of(path, 'batch_size', 1)}"
    assert "batch_size=16: a step needs about" in student.message and "0.2 MiB are given" in student.message
    roomy = plan.memory["teacher teacher"]["total"] + plan.memory["students"]["total"]
    assert plan_recipe(path, memory=roomy).go
    assert main(["plan", str(path), "--memory", "256KiB"]) == 2 and "2 problems" in capsys.readouterr().out


def test_the_largest_batch_that_is_named_fits(write):
    path = write(training__batch_size=512)
    given = plan_recipe(path).memory["students"]["total"] * 3 // 4
    problem = next(p for p in plan_recipe(path, memory=given).problems if p.key == "training.batch_size")
    most = int(problem.message.split("; about ")[-1].split()[0])
    assert 1 <= most < 512
    fewer = plan_recipe(path, [f"--training.batch_size={most}", f"--teacher.training.batch_size={most}"])
    assert fewer.memory["students"]["total"] <= given * 1.02


def test_an_output_folder_of_another_run_is_found(write):
    path = write()
    store_json(path.parent / "run" / "recipe.json", dump_recipe(load_recipe(path)))
    assert plan_recipe(path).go, "its own run goes on"
    (problem,) = plan_recipe(path, ["--training.max_steps=7"]).problems
    assert "holds a run of another recipe: training.max_steps differ" in problem.message
    assert problem.place == f"{path}:{line_of(path, 'output')}"


def test_all_mistakes_are_listed_at_once(write, capsys):
    path = write(
        texts=True,
        task__language_modeling__train=["nothing.txt"],
        objectives__attention__layers=[[0, 9]],
        objectives__logits__temperature=-1.0,
        student__attn_implementation="sdpa",
        training__learning_rate="fast",
        training__arguments={"push_to_hub": True},
        sedes=[1],
    )
    plan = plan_recipe(path)
    keys = {problem.key for problem in plan.problems}
    assert keys == {
        "task.language_modeling.train", "objectives.attention.layers", "objectives.logits.temperature",
        "training.learning_rate", "training.arguments", "sedes",
    }  # fmt: skip
    assert all(problem.place and problem.place.startswith(f"{path}:") for problem in plan.problems)
    assert plan.models, "what can be told is told all the same"
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().out.startswith(f"{path}: no go, 6 problems\n")


def test_a_missing_key_is_not_blamed_on_the_wrong_line(write):
    """``train`` is refused and left out; that it is then missed is no second mistake."""
    plan = plan_recipe(write(texts=True, task__language_modeling__train={"a": 1}))
    (problem,) = plan.problems
    assert problem.key == "task.language_modeling.train"


def test_a_wrong_override_is_named_as_one(write):
    (problem,) = plan_recipe(write(), ["--training.max_step=7"]).problems
    assert problem.place == "--training.max_step of the command line" and "max_steps" in problem.message


def test_a_merged_key_has_the_line_where_it_is_written(tmp_path):
    tree = yaml.safe_dump({**IMAGES, "output": str(tmp_path / "run"), "training": {}})
    text = tree.replace("training: {}", "").replace("output:", "x: &x {max_steps: 0}\noutput:")
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "training:\n  <<: *x\n  batch_size: 4\n")
    problems = plan_recipe(path).problems
    places = {problem.key: problem.place for problem in problems}
    assert places["x"] == f"{path}:{line_of(path, 'x')}"
    assert places["training.max_steps"] == f"{path}:{line_of(path, 'x')}"


def test_another_vocabulary_than_the_teachers_is_told_of_the_logits(write):
    plan = plan_recipe(write(texts=True, student__config__vocab_size=310))
    (problem,) = plan.problems
    assert problem.key == "objectives.logits" and "310 tokens or classes apart, teacher 300" in problem.message


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./nowhere", "there is no folder ./nowhere here. Paths start from"),
        ("/no/where", "there is no folder /no/where here. Paths start from"),
        ("models/of/mine", "there is no folder models/of/mine here. Paths start from"),
        ("someone/nothing", "there is no folder someone/nothing here, and from the hub: "),
        ("nothing", "there is no folder nothing here, and from the hub: "),
        ("./recipe.yaml", "./recipe.yaml is a file: expected a folder"),
    ],
)
def test_a_model_that_is_not_there_is_looked_for_here_first(write, monkeypatch, path, said, texts):
    """What can only be a path is not asked for on the hub."""
    recipe = write(texts=texts, teacher={"path": path})
    monkeypatch.chdir(recipe.parent)
    if "hub" not in said:
        monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    (problem,) = plan_recipe(recipe).problems
    assert problem.key == "teacher.path" and f"teacher.path={path!r} cannot be loaded: {said}" in problem.message


def test_the_parts_of_image_generation_are_looked_for_here_first(write):
    denoiser = {"model_type": "dit", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    task = {"data": "digits", "autoencoder": "./vae", "classifier": "./judge", "sampling": {"features": "./eyes"}}
    plan = plan_recipe(
        write(
            task={"image_generation": task},
            teacher={"path": "./dit"},
            student={"config": {**denoiser, "patch_size": 4}},
            objectives={"task": {}},
            baselines={},
        )
    )
    messages = [problem.message for problem in plan.problems]
    for key, path in (
        ("autoencoder", "./vae"), ("classifier", "./judge"), ("sampling.features", "./eyes"), ("teacher.path", "./dit"),
    ):  # fmt: skip
        assert any(f"{key}={path!r} cannot be loaded: there is no folder {path} here" in m for m in messages), messages


def test_a_teacher_that_is_not_there_leaves_the_rest_shown(write):
    plan = plan_recipe(write(teacher={"path": "./nowhere"}))
    (problem,) = plan.problems
    assert problem.key == "teacher.path" and "cannot be loaded" in problem.message
    assert plan.objectives and plan.models == [] and any("not known either" in note for note in plan.notes)


def test_a_pretrained_teacher_is_planned_by_its_configuration_alone(write, tmp_path):
    recipe = load_recipe(write())
    task = recipe.chosen_task
    task.sketch_data(preflight_pretrained())
    folder = tmp_path / "teacher"
    Models(task, recipe).new_teacher("teacher").save_pretrained(folder)
    save_file({}, folder / "model.safetensors")  # no weights
    plan = plan_recipe(write(teacher={"path": str(folder)}))
    assert plan.go and plan.models[0]["from"] == str(folder) and plan.models[0]["layers"] == 4


def test_no_yaml_is_an_error(tmp_path):
    for text in ("a: [", "", "- 1\n- 2\n", "a: 1\na: 2\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError):
            plan = plan_recipe(tmp_path / "recipe.yaml")
            raise RecipeError("; ".join(map(str, plan.problems)))
    with pytest.raises(RecipeError, match="no such recipe"):
        plan_recipe(tmp_path / "nothing.yaml")
