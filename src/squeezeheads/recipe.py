"""A run as data: typed, unknown keys refused, every default and its help text in one place.

Recipes are YAML, read with a safe loader that refuses a key written twice. Each field's docstring is its help text on
the command line, and every key can be given there: ``squeezeheads distill recipe.yaml --training.max_steps 100``.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from squeezeheads.adapters import LoraSpec
from squeezeheads.batches import ONLY
from squeezeheads.errors import RecipeError, in_short, similar
from squeezeheads.objectives import OBJECTIVES, Objective
from squeezeheads.tasks import TASKS, Task
from squeezeheads.trust import refuse_imports, refuse_untrusted
from squeezeheads.yaml_text import read_yaml


# One optional field an entry, so that recipes name objectives and tasks by their keys and a new one is one entry there.
def _optional_fields(name: str, types: Mapping[str, Any], doc: str) -> type:
    fields = [(key, option | None, field(default=None)) for key, option in types.items()]
    return make_dataclass(name, fields, namespace={"__module__": __name__, "__doc__": doc})


Objectives = _optional_fields(
    "Objectives",
    {key: cls | list[cls] for key, cls in OBJECTIVES.items()},  # type: ignore[valid-type]
    "Objectives by name; those left out are not used. A list gives several of a kind: one a teacher.",
)
TaskChoice = _optional_fields("TaskChoice", TASKS, "Exactly one task, by name.")


@dataclass
class TrainingSpec:
    """How a model is trained."""

    max_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Samples a step and process, before accumulation."""
    gradient_accumulation_steps: int = 1
    """Batches that are summed into a step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of forward and backward passes."""
    save_every: int = 500
    """Steps between checkpoints that a stopped run goes on from."""
    log_every: int = 50
    """Steps between logged losses."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Any further option of transformers.TrainingArguments, by its name."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: expected a finite number of at least 0.")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}: expected fewer than max_steps={self.max_steps}, or the peak "
                "learning rate is never reached."
            )


@dataclass
class ModelSpec:
    """A model: pretrained, or new with random weights."""

    path: str | None = None
    """Folder or hub name of a pretrained model; without it the model is new."""
    config: dict[str, Any] = field(default_factory=dict)
    """Configuration of a new model: any key of its transformers configuration; for image generation any option of its
    diffusers class. A teacher names its model_type; a student's keys are changes to the teacher's configuration."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """transformers' attention kernel; attention can be recorded under "sdpa" alone, others serve runs without it."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """In which numbers a pretrained model is loaded ("auto": as it was saved) or a new one is made. A student that is
    trained in less than float32 loses small updates: use training.precision instead."""

    def __post_init__(self) -> None:
        if self.path is not None and self.config:
            raise ValueError(
                f"path={self.path!r} and config are both given: a pretrained model keeps its configuration."
            )
        if self.path is None and self.dtype == "auto":
            raise ValueError("dtype='auto' without path: a new model was never saved. Expected float32, for example.")
        for name in {"dtype", "torch_dtype"} & {*self.config}:
            raise ValueError(f"config.{name} cannot be given here: use dtype, beside config.")


@dataclass
class StudentSpec(ModelSpec):
    """The student: new, or pretrained and trained further, wholly or by an adapter."""

    lora: LoraSpec | None = None
    """Train and save low-rank adapters of the pretrained model alone; needs path, and the package peft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None and self.path is None:
            raise ValueError("lora without path: adapters of random weights teach nothing. Name a pretrained model.")


@dataclass
class CacheSpec:
    """A teacher's predictions for the training data, written once and read in its place."""

    k: int | Literal["all"] = "all"
    """Logits kept of each prediction, the greatest; "all" is exact, and puts a whole vocabulary on the disk for every
    token."""
    # No None: jsonargparse (4.53.0) reads null as the text "None" in an option within an option.
    folder: str = ""
    """Where they lie; several runs with the same teacher may name the same. Empty: teacher-cache under output."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which numbers the logits are stored."""

    def __post_init__(self) -> None:
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k={self.k}: expected at least 1, or all.")
        if self.folder and not self.folder.strip():
            raise ValueError(f"folder={self.folder!r}: expected the path of a folder.")


@dataclass
class TeacherSpec(ModelSpec):
    """The teacher: pretrained, trained at the start of the run, or both: a pretrained model that is trained further."""

    training: TrainingSpec | None = None
    """How it is trained at the start of the run; needed without path."""
    base_of_student: bool = False
    """The teacher is the model that the student's lora adapts, run with the adapters off and not held a second time."""
    cache: CacheSpec | None = None
    """For objectives on logits alone, and data that are the same in every epoch: learn from its stored predictions."""

    def check(self, key: str) -> None:
        """
        Raises:
            ValueError: neither a pretrained teacher, nor all that a new one needs; another one beside
                base_of_student.
        """
        if self.base_of_student:
            given = [name for name in ("path", "config", "training") if getattr(self, name)]
            if given:
                raise ValueError(f"{key}.base_of_student and {key}.{given[0]} name two models: leave one out.")
            if self.cache is not None:
                raise ValueError(
                    f"{key}.base_of_student and {key}.cache: the student holds its base anyway, so that nothing would "
                    f"be saved. Leave one out, or name the base by {key}.path."
                )
            return
        if self.path is None and self.training is None:
            raise ValueError(
                f"{key} has neither path nor training: give the folder of a pretrained teacher, or train one."
            )
        if self.path is None and "model_type" not in self.config:
            raise ValueError(f"{key}.config names no model_type: expected one, for example vit.")


@dataclass
class Recipe:
    """A distillation run."""

    task: TaskChoice  # type: ignore[valid-type]
    """What is learned, from which data."""
    student: StudentSpec
    """The model that learns."""
    objectives: Objectives  # type: ignore[valid-type]
    """What the student learns from."""
    teacher: TeacherSpec | None = None
    """The model that teaches."""
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    """In place of teacher: several, by name. Objectives say whom they learn from with their own key teacher; logits are
    averaged where they don't. A student's config is changes to that of the first."""
    training: TrainingSpec = field(default_factory=TrainingSpec)
    """How students are trained."""
    baselines: dict[str, Objectives] = field(default_factory=dict)  # type: ignore[valid-type]
    """Further students to compare with, by name: same initialisation, data order and training, other objectives."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One student for each seed and set of objectives: the seed sets initialisation and data order."""
    output: str = "runs/distill"
    """Folder of everything that the run leaves."""

    def __post_init__(self) -> None:
        if len(_chosen(self.task)) != 1:
            raise ValueError(
                f"task names {sorted(_chosen(self.task)) or 'nothing'}: expected exactly one of {', '.join(TASKS)}."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: expected at least one seed, each once.")
        if DISTILLED in self.baselines:
            raise ValueError(f"baselines.{DISTILLED}: that name is taken by the objectives themselves.")
        folders = [folder_name(name).casefold() for name in self.arms]
        for name in self.baselines:
            if not name or folders.count(folder_name(name).casefold()) > 1:
                raise ValueError(
                    f"baselines.{name}: its folder would be another's too. Choose clearly different names."
                )
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds}: expected whole numbers from 0 to 4294967295.")
        for name, objectives in self.arms.items():
            if not objectives:
                where = "objectives" if name == DISTILLED else f"baselines.{name}"
                raise ValueError(f"{where} is empty: expected at least one of {', '.join(OBJECTIVES)}.")
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("teacher and teachers: expected exactly one of them.")
        for name, spec in self.teachers.items():
            if not name or folder_name(name) != name:
                raise ValueError(f"teachers.{name}: expected a name of letters, digits, - and _.")
            spec.check(f"teachers.{name}")
        if self.teacher is not None:
            self.teacher.check("teacher")
        for name, spec in self._teachers.items():
            if spec.base_of_student and self.student.lora is None:
                raise ValueError(
                    f"{self.teacher_key(name)}.base_of_student without student.lora: a student without adapters has no "
                    f"base to go back to. Give {self.teacher_key(name)}.path."
                )

    @property
    def named_teachers(self) -> dict[str, TeacherSpec]:
        """All teachers by name; the only one is called "teacher". The student's base is as the student names it."""
        student = self.student
        base = {name: getattr(student, name) for name in ("path", "attn_implementation", "dtype")}
        teachers = self._teachers
        return {n: dataclasses.replace(t, **base) if t.base_of_student else t for n, t in teachers.items()}

    @property
    def _teachers(self) -> dict[str, TeacherSpec]:
        return dict(self.teachers) if self.teacher is None else {ONLY: self.teacher}

    def teacher_key(self, name: str) -> str:
        """Where a teacher stands in the recipe, for messages."""
        return f"teachers.{name}" if self.teacher is None else "teacher"

    @property
    def chosen_task(self) -> Task:
        """The task."""
        return next(iter(_chosen(self.task).values()))

    @property
    def measuring_keys(self) -> tuple[str, ...]:
        """The keys that only say how a finished model is measured."""
        ((name, task),) = _chosen(self.task).items()
        return tuple(f"task.{name}.{key}" for key in sorted(task.measuring))

    @property
    def arms(self) -> dict[str, dict[str, Objective]]:
        """All sets of objectives by name: the baselines, then the recipe's own."""
        named = {**self.baselines, DISTILLED: self.objectives}
        return {name: _flat(_chosen(objectives)) for name, objectives in named.items()}


RECIPE_FILE = "recipe.json"
"""In a run's folder, the recipe that it carries out."""

DISTILLED = "distilled"
"""Name of the students that learn from the recipe's own objectives."""


def folder_name(name: str) -> str:
    """The folder of a set of objectives."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _chosen(options: Any) -> dict[str, Any]:
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def _flat(objectives: Mapping[str, Objective | list[Objective]]) -> dict[str, Objective]:
    """One entry an objective: those of a list are named after their teacher as well.

    Raises:
        ValueError: two of a list that would have one name.
    """
    flat: dict[str, Objective] = {}
    for key, value in objectives.items():
        for objective in value if isinstance(value, list) else [value]:
            name = f"{key}-{objective.teacher}" if isinstance(value, list) else key
            if name in flat:
                raise ValueError(f"{key}: several for teacher={objective.teacher!r}: expected one a teacher.")
            flat[name] = objective
    return flat


def recipe_parser(path: Path) -> Any:
    """A jsonargparse parser with an option for every key of a recipe; those that ``path`` gives are its defaults."""
    from jsonargparse import ArgumentParser

    files: list[str | PathLike[str]] = [glob.escape(str(path))]  # jsonargparse takes them for patterns
    parser = ArgumentParser(prog="squeezeheads", exit_on_error=False, default_config_files=files, add_help=False)
    parser.add_class_arguments(Recipe, None)
    return parser


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: command-line style, ``["--training.max_steps", "100"]``.

    Raises:
        RecipeError: no such file, an unknown key, one written twice, a wrong type, an impossible value; names them.
    """
    from jsonargparse import ArgumentError

    if Path(path).is_dir():
        raise RecipeError(f"{path}: a folder. Expected a recipe, a YAML file.")
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such recipe. Expected a YAML file; `squeezeheads demo` runs a shipped one.")
    _refuse_imports(Path(path), overrides)
    try:
        parsed = recipe_parser(Path(path)).parse_args(list(overrides)).as_dict()
    except ArgumentError as error:
        raise RecipeError(f"{path}: {_readable(str(error))}") from error
    values = {f.name: parsed[f.name] for f in dataclasses.fields(Recipe)}
    try:
        refuse_untrusted(values, _overrides(overrides))
        return _build(Recipe, values, "")
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def _refuse_imports(path: Path, overrides: Sequence[str]) -> None:
    """jsonargparse would import what stands where it expects options (``class_path``, or a dotted name). A recipe is
    data and imports nothing: where options are expected there must be a mapping of options."""
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
        _check_mappings(Recipe, tree, "")
        refuse_imports(tree)
        for key, text in _overrides(overrides):
            value = read_yaml(text)
            for part in reversed(key.split(".")):
                value = {part: value}
            _check_mappings(Recipe, value, "")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: nested too deeply to be a recipe, or an alias stands within itself.") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``--key value`` and ``--key=value``."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            yield key, value if equals else following


def _check_mappings(kind: Any, value: Any, key: str) -> None:
    if value is None:
        if kind is not Any and type(None) not in get_args(kind):
            raise ValueError(f"{key or 'recipe'}: expected a value, got nothing.")
        return
    listed = _listed(kind)
    if listed is not None and isinstance(value, list):
        for index, part in enumerate(value):
            _check_mappings(listed, part, f"{key}[{index}]")
        return
    option = next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)
    if option is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'recipe'}: expected a mapping of options, got {in_short(repr(value), 60)}.")
    hints = {f.name: get_type_hints(option)[f.name] for f in dataclasses.fields(option) if f.init}
    for name, part in value.items():
        where = f"{key}.{name}" if key else str(name)
        if get_origin(kind) is dict:
            _check_mappings(option, part, where)
        elif name in hints:
            _check_mappings(hints[name], part, where)
        else:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Expected one of {', '.join(hints)}."
            raise ValueError(f"unknown key {where!r}.{hint}")


def _listed(kind: Any) -> type | None:
    """The dataclass that a type allows a list of, if it does."""
    parts = (part for option in get_args(kind) if get_origin(option) is list for part in get_args(option))
    return next((part for part in parts if dataclasses.is_dataclass(part) and isinstance(part, type)), None)


def _build(kind: Any, value: Any, key: str) -> Any:
    """Dataclasses from plain data whose types are checked already; impossible values are reported with their key."""
    listed = _listed(kind)
    if listed is not None and isinstance(value, list):
        return [_build(listed, part, f"{key.removesuffix('.')}[{index}].") for index, part in enumerate(value)]
    if isinstance(value, dict) and get_origin(kind) is dict:
        return {name: _build(get_args(kind)[1], part, f"{key}{name}.") for name, part in value.items()}
    option: Any = next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)
    if (
        isinstance(value, dict) and option is not None
    ):  # a mapping may also be an option's value, as in a model's config
        hints = get_type_hints(option)
        parts = {name: _build(hints[name], part, f"{key}{name}.") for name, part in value.items()}
        try:
            return option(**parts)
        except ValueError as error:
            raise ValueError(f"{key}{error}") from error
    return value


def shipped_recipe(name: str) -> Path:
    """The path of a recipe in ``recipes/demo``, which lies beside ``src`` in a checkout and inside an installed
    package.

    Raises:
        RecipeError: there is none of that name.
    """
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        path = folder / "demo" / f"{name}.yaml"
        if path.is_file():
            return path
    raise RecipeError(f"{name}: no recipe of that name is shipped with squeezeheads.")


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, defaults included; options that are not used are left out, unless that has to be said."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            items = [(f, plain(getattr(value, f.name))) for f in dataclasses.fields(value) if f.init]
            return {f.name: item for f, item in items if item is not None or f.default is not None}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(recipe)


def _readable(message: str) -> str:
    """jsonargparse's message without its talk of Python types."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    kept = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in kept if line and not line.startswith(noise)]
    text = re.sub(r"Problem with given class_path '[^']*':|Given value: \w+\(.*\)$", "", " ".join(kept))
    text = re.sub(r"a <class '(\w+)'>", r"\1", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    keys = re.findall(r'Parser key "([^"]*)":', text)
    text = " ".join(re.sub(r'Parser key "[^"]*":', "", text).split())
    text = re.sub(r"^(.+?)(?: \1)+$", r"\1", text)  # said once for each type that the value might have had
    one_of = re.search(r"Expected one of (.+?)\. Got value: (\S+)$", text)
    if one_of is not None:
        known = re.findall(r"'([^']*)'", one_of[1])
        text += f".{similar(one_of[2], known)}"
    a_list = re.search(r"Expected list\. Got value: ([^\[{]+)$", text)
    if a_list is not None:
        text += f". A list is written [{a_list[1]}]."
    # A key that is named alone may be named by the option within it, too.
    names = [key for before, key in zip(["", *keys], keys, strict=False) if not f".{before}".endswith(f".{key}")]
    return (f"{'.'.join(names)}: " if names else "") + text
