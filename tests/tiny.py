"""Tiny classifiers, language models and data for the tests above the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)


def classifier(
    heads: int, layers: int = 2, width: int = 24, seed: int = 0, **changes: Any
) -> ViTForImageClassification:
    """A ViT for images (1, 8, 8) of 10 classes: 16 patches and the class token."""
    set_seed(seed)
    config = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, **changes}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=heads, **config))


def deit_student(seed: int = 0, **changes: Any) -> DeiTForImageClassificationWithTeacher:
    """A DeiT of 3 heads with a distillation head, for the images of ``classifier``: 16 patches and two special
    tokens."""
    set_seed(seed)
    config = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, **changes}
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**{**sizes, **config}, attn_implementation="sdpa"))


def language_model(heads: int, layers: int = 2, width: int = 24, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A LLaMA of 40 tokens."""
    set_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": heads, **changes}))


def images(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Samples for a classifier."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels, strict=True)]


def image_batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for a classifier."""
    samples = images(count, seed)
    return {
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
        "labels": torch.tensor([s["labels"] for s in samples]),
    }


def token_batch(lengths: list[int], total: int, side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch for a language model; the tokens of a sample do not depend on the padding. A sample's first token
    has no label: under left padding it would be predicted from a padding position."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(total - length, total)
        ids[row, where] = torch.randint(1, 40, (length,), generator=generator)
        mask[row, where] = 1
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
    }


def check_plain_checkpoint(folder: Path, model: ViTForImageClassification, scratch: Path) -> None:
    """``folder`` holds a classifier of 3 heads, nothing beside it, and opens as ``model``."""
    classifier(3).save_pretrained(scratch)
    names, bare = (load_file(f / "model.safetensors").keys() for f in (folder, scratch))
    assert names == bare
    opened = AutoModelForImageClassification.from_pretrained(folder)
    pixels = images(3)[0]["pixel_values"][None]
    torch.testing.assert_close(opened.eval()(pixels).logits, model.eval()(pixels).logits)


def write_recipe(path: Path, tree: dict, changes: dict) -> Path:
    """A recipe as a file, with changes by keys such as ``training__max_steps``."""
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(tree))
    return path
