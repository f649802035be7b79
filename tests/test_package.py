"""What `pip install squeezeheads` brings: a light import, documented names, few requirements, a whole wheel."""

import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import squeezeheads
from squeezeheads.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]

OPTIONAL = {
    "accelerate",
    "datasets",
    "diffusers",
    "jsonargparse",
    "lm_eval",
    "matplotlib",
    "peft",
    "rich",
    "scipy",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
    "trl",
    "yaml",
}

# Top-level modules outside the standard library, after `import torch` and after `import squeezeheads` on top of it.
PROBE = """
import json, sys
def loaded():
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
import torch
before = loaded()
import squeezeheads
print(json.dumps({"torch": sorted(before), "added": sorted(loaded() - before)}))
"""


def fresh_process(code: str) -> str:
    """What ``code`` prints in an interpreter that has imported nothing yet, started outside the repository."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    return json.loads(fresh_process(PROBE))


def test_import_brings_nothing_that_torch_has_not_brought(imported: dict[str, list[str]]) -> None:
    assert set(imported["added"]) == {"squeezeheads"}


def test_import_brings_no_optional_package(imported: dict[str, list[str]]) -> None:
    assert OPTIONAL.isdisjoint(imported["torch"] + imported["added"])


def test_version_is_that_of_the_distribution() -> None:
    assert squeezeheads.__version__ == metadata.version("squeezeheads"), "run `make` again: the install is out of date"


@pytest.mark.parametrize("name", squeezeheads.__all__)
def test_public_name_has_a_docstring(name: str) -> None:
    public = getattr(squeezeheads, name)
    assert callable(public), f"{name} is public and neither a function nor a class"
    text = inspect.cleandoc(public.__doc__ or "")
    # a dataclass without a docstring is given its signature for one
    assert text and not text.startswith(f"{name}("), f"{name} has no docstring"


def test_public_names_are_listed_once() -> None:
    assert len(squeezeheads.__all__) == len(set(squeezeheads.__all__))


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="squeezed_attention_los"):
        squeezeheads.squeezed_attention_los  # noqa: B018


def test_documentation_lists_exactly_the_public_names() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: squeezeheads\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(squeezeheads.__all__)


def requirements() -> dict[str | None, set[str]]:
    """Names of the required distributions of each extra; ``None`` is the core."""
    found: dict[str | None, set[str]] = {}
    for line in metadata.requires("squeezeheads") or []:
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        name = requirement.name.lower()
        if requirement.extras:
            name += f"[{','.join(sorted(requirement.extras))}]"
        found.setdefault(extra and extra[1], set()).add(name)
    return found


def test_core_requires_torch_and_numpy_alone() -> None:
    assert requirements()[None] == {"torch", "numpy"}


def test_extras() -> None:
    extras = requirements()
    assert set(extras) == {None, "hf", "eval", "diffusion", "peft", "trl", "timm", "all", "dev"}
    assert extras["hf"] >= {"transformers", "accelerate", "datasets", "safetensors", "jsonargparse[signatures]", "rich"}
    assert extras["eval"] == {"lm-eval", "rouge-score", "torchmetrics"}
    assert extras["timm"] == {"timm", "torchvision"}


def test_all_is_everything_but_timm_and_dev() -> None:
    extras = requirements()
    assert extras["all"] == extras["hf"] | extras["eval"] | extras["diffusion"] | extras["peft"] | extras["trl"]


def test_every_required_package_has_its_extra_in_the_table() -> None:
    """What a command says about a missing package is what pyproject.toml says."""
    modules = {"lm-eval": "lm_eval", "pyyaml": "yaml", "rouge-score": "rouge_score", "scikit-learn": "sklearn"}
    mine = {
        (modules.get(name.partition("[")[0], name.partition("[")[0]), extra)
        for extra, names in requirements().items()
        if extra not in (None, "all", "dev")
        for name in names
    }
    assert mine <= set(EXTRAS.items())
    assert set(EXTRAS) - {name for name, _ in mine} == {"docstring_parser"}, "which jsonargparse[signatures] brings"


def test_metadata() -> None:
    about: Any = metadata.metadata("squeezeheads")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"


def test_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="squeezeheads")
    assert command.value == "squeezeheads.cli:main"


def test_exact_versions_are_the_same_in_both_files() -> None:
    """ruff and mypy are pinned in pyproject.toml too: the two files must not drift apart."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    pinned = {}
    for line in metadata.requires("squeezeheads") or []:
        requirement = Requirement(line)
        exact = [spec.version for spec in requirement.specifier if spec.operator == "=="]
        if exact:
            pinned[requirement.name.lower()] = exact[0]
        version = constraints.get(requirement.name.lower())
        assert version is None or requirement.specifier.contains(version), f"{line} refuses the tested {version}"
    assert pinned == {name: constraints[name] for name in ("ruff", "mypy")}


def test_wheel_is_whole(tmp_path: Path) -> None:
    """The wheel holds every module, the marker for type checkers, and the recipes from the root of the repository."""
    pytest.importorskip("hatchling", reason="hatchling comes with the extra dev")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("squeezeheads-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    source, recipes = ROOT / "src", ROOT / "recipes"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    shipped = {f"squeezeheads/recipes/{path.relative_to(recipes)}" for path in recipes.rglob("*.yaml")}
    assert modules | shipped <= names
    assert "squeezeheads/recipes/demo/digits.yaml" in names
    assert "squeezeheads/py.typed" in names
    assert not [name for name in names if not name.startswith("squeezeheads")]


def test_a_missing_optional_package_is_named():
    """As in an environment with torch alone."""
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "import squeezeheads\n"
        "try:\n    squeezeheads.SqueezeTrainer\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "squeezeheads[hf]" in done.stdout and "SqueezeTrainer" in done.stdout, done.stderr
