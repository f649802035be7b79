"""A real pretrained vision transformer (see `make assets`): its weights under their right names, and as a teacher."""

from __future__ import annotations

import pytest
import torch
from benchmarks import pretrained_vit
from benchmarks.assets import AssetError
from transformers import AutoImageProcessor, AutoModel

from squeezeheads import record_attention
from squeezeheads.tasks import ImageClassification, Pretrained
from squeezeheads.token_layout import known_layout

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        return pretrained_vit.save_folder(tmp_path_factory.mktemp("vit") / "vit")
    except AssetError as error:
        pytest.skip(str(error))


def test_every_tensor_finds_its_place_and_computes_what_onnx_computes(folder):
    """The first layer against ONNX's own reference evaluator; all tensors by name."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    whole = onnx.load(pretrained_vit.onnx_file())
    last = "/backbone/encoder/layer.0/norm2/Add_1_output_0"  # attention, residual, second norm
    end = next(i for i, node in enumerate(whole.graph.node) if last in node.output) + 1
    del whole.graph.node[end:], whole.graph.output[:]
    whole.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(whole).run(None, {"input_image": pixels.numpy()})
    seen = []
    layer = next(m for name, m in model.named_modules() if name.endswith("layer.0") or name.endswith("layers.0"))
    layer.norm2.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model.eval()(pixels)
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_it_serves_as_teacher_with_a_new_head(folder):
    task = ImageClassification(channels=3, new_head=True)
    splits = task.load_data(Pretrained({"teacher": str(folder)}))
    model = task.load(str(folder)).eval()
    task.check_model(model.config, "teacher")
    assert known_layout(model) == ("class",)
    with torch.no_grad(), record_attention(model) as recorded:
        logits = model(pixel_values=task.collate([splits.test[0]])["pixel_values"]).logits
    assert logits.shape == (1, 10) and len(recorded) == 12
    assert recorded[0].num_heads == 6 and recorded[0].num_keys == 1 + 16 * 16
    assert AutoImageProcessor.from_pretrained(folder).image_mean == tuple(pretrained_vit.MEAN)
