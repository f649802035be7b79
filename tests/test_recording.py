"""What is recorded is what ran: each family's own maps and outputs, through wrappers; and where it must refuse."""

import gc
import re
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, HEADS, LAYERS, WIDTH, Attention, Batch, SequenceFirst, Stack, run, seeded, watching
from squeezeheads.attention import AttentionRecord
from squeezeheads.recording import RecordingError, clean_path, read_output_weight, record_attention
from squeezeheads.squeezing import mixing_matrix

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated"),
]

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_batch = pytest.mark.parametrize(
    ("family", "padding"),
    [
        pytest.param(family, padding, id=f"{name}-{padding}")
        for name, family in FAMILIES.items()
        for padding in family.paddings
    ],
)
padded_batches = pytest.mark.parametrize(
    ("family", "padding"),
    [
        pytest.param(family, padding, id=f"{name}-{padding}")
        for name, family in FAMILIES.items()
        for padding in family.paddings
        if padding != "none"
    ],
)

# ------------------------------------------------------------------------------------------------------------ helpers


@pytest.fixture(autouse=True)
def same_weights_each_time():
    torch.manual_seed(0)


def record(model, batch, **choice):
    with torch.no_grad(), record_attention(model, **choice) as recording:
        run(model, batch)
    return recording


def hand_written(*blocks, **settings):
    """A stack in eval mode, of two plain blocks if none are given, and a batch for it."""
    model = Stack(*(blocks or (Attention(), Attention())), **settings).eval()
    return model, Batch({"x": seeded(3, 6, WIDTH)})


def real_rows(tensor, batch):
    """(B, H, Q, …) → (rows, H, …): the rows that are no padding."""
    tensor = tensor.transpose(1, 2)
    return tensor.flatten(0, 1) if batch.real is None else tensor[batch.real]


def value_of_each_head(rec):
    return rec.value.repeat_interleave(rec.num_heads // rec.num_key_value_heads, 1)


def outputs(rec, bias):
    """(B, Q, E): sum_i A_i V_i W_i + bias."""
    out = torch.einsum("bhqk,bhkd,hde->bqe", rec.maps(), value_of_each_head(rec).float(), rec.output_weight.float())
    return out if bias is None else out + bias


def traces_left(model):
    """What recording could leave behind on a model."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
    )
    left = [(path, kind) for path, module in model.named_modules() for kind in kinds if getattr(module, kind)]
    return left + ["function mode"] * torch._C._len_torch_function_stack()


class Spy(TorchFunctionMode):
    """Weak references to the queries of every attention call, in order."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.queries.append(weakref.ref(args[0]))
        return func(*args, **kwargs or {})


# --------------------------------------------------------------------------------------------------- the maps, exactly


@every_batch
def test_maps_equal_the_models_own_attention(family, padding):
    batch = family.batch(padding)
    own = family.maps(family, batch)
    recording = record(family.build(), batch)
    assert len(recording) == len(own) >= (1 if family.name == "multihead" else LAYERS)
    for rec, expected in zip(recording, own, strict=True):
        maps = rec.maps()
        assert maps.shape == expected.shape and maps.dtype == torch.float32
        maps, expected = real_rows(maps, batch), real_rows(expected, batch)
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)
        # What the model forbids is exactly 0, and nothing else is.
        assert torch.equal(maps == 0, expected == 0)
        # The weights are large enough that heads and layers could not be mistaken for each other.
        between_heads = (maps[:, :, None] - maps[:, None]).abs().amax((0, -1)) + torch.eye(maps.shape[1])
        assert between_heads.min() > 0.05


@every_batch
def test_future_positions_and_padding_keys_are_exactly_zero(family, padding):
    batch = family.batch(padding)
    for rec in record(family.build(), batch):
        maps = rec.maps()
        assert maps.isfinite().all()
        if family.causal:
            assert not maps.triu(1).any()
        if batch.real is not None:
            keys = batch.real.shape[1]
            assert not maps.transpose(1, 3)[:, :keys][~batch.real].any()
        torch.testing.assert_close(
            real_rows(maps, batch).sum(-1), torch.ones(()).expand_as(real_rows(maps, batch)[..., 0])
        )


@padded_batches
def test_padding_changes_no_real_row(family, padding):
    """Sample by sample without its padding, the maps are the same."""
    batch, model = family.batch(padding), family.build()
    recording = record(model, batch)
    for sample in range(2):
        kept = batch.real[sample]
        name = next(name for name in ("input_ids", "x", "src") if name in batch.inputs)
        tokens = batch.inputs[name]
        first = family.name == "multihead"  # sequence first
        alone = tokens[kept][:, sample, None] if first else tokens[sample, kept][None]
        inputs = {name: alone} | ({"real": torch.ones(1, len(alone), dtype=torch.bool)} if first else {})
        if name == "input_ids":
            inputs |= {"position_ids": kept.nonzero().T}
        for rec, single in zip(recording, record(model, Batch(inputs)), strict=True):
            kept_keys = F.pad(kept, (0, rec.num_keys - len(kept)), value=True)  # and the key that add_bias_kv adds
            maps = rec.maps()[sample][:, kept][..., kept_keys]
            torch.testing.assert_close(maps, single.maps()[0], rtol=0, atol=1e-5)


def test_a_temperature_divides_the_scores_and_what_is_added_to_them():
    query, key, bias = seeded(2, 3, 5, 4), seeded(2, 3, 7, 4, seed=6), seeded(3, 5, 7, seed=7)
    rec = AttentionRecord("attention", query, key, attention_mask=bias, scale=0.3)
    scores = 0.3 * query @ key.transpose(-1, -2) + bias
    torch.testing.assert_close(rec.maps(), scores.softmax(-1))
    torch.testing.assert_close(rec.maps(temperature=2.5), (scores / 2.5).softmax(-1))


# -------------------------------------------------------------------------------------------------- output projections


@every_batch
def test_maps_values_and_output_weight_give_what_the_projection_put_out(family, padding):
    batch, model = family.batch(padding), family.build()
    with watching(model, family.projection) as calls:
        recording = record(model, batch)
    assert len(calls) == len(recording)
    for rec, (module, _, _, expected) in zip(recording, calls, strict=True):
        if isinstance(module, nn.MultiheadAttention):
            expected = expected[0] if module.batch_first else expected[0].transpose(0, 1)
            module = module.out_proj
        real = slice(None) if batch.real is None else batch.real
        torch.testing.assert_close(outputs(rec, module.bias)[real], expected[real], rtol=1e-4, atol=1e-4)


class Int8Linear(nn.Module):
    """A quantised layer as libraries write them: linear-like by its attributes alone."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return F.linear(x, self.codes * self.scale, self.bias)


def as_conv1d(linear):
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight.data, conv.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
    return conv


def as_dynamically_quantized(linear):
    try:
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this torch quantises no linear layer: {error}")


def with_lora(linear):
    model = nn.ModuleDict({"project": linear})
    inject_adapter_in_model(LoraConfig(target_modules=["project"], lora_dropout=0.5, init_lora_weights=False), model)
    return model["project"]


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        pytest.param(lambda linear: linear, 1e-5, id="linear"),
        pytest.param(as_conv1d, 1e-5, id="conv1d"),
        pytest.param(with_lora, 1e-5, id="lora"),
        pytest.param(lambda linear: nn.utils.parametrizations.weight_norm(linear), 1e-5, id="parametrized"),
        pytest.param(Int8Linear, 1e-5, id="int8"),
        # It quantises what goes in as well, to 7 or 8 bits.
        pytest.param(as_dynamically_quantized, 5e-2, id="dynamically-quantized"),
    ],
)
def test_output_weight_is_read_through_any_linear_like_layer(change, tolerance):
    model, batch = hand_written()
    for block in model.blocks:
        block.to_out = change(block.to_out).eval()
    with watching(model, ".to_out") as calls:
        recording = record(model, batch)
    for rec, (module, _, _, expected) in zip(recording, calls, strict=True):
        bias = module.bias() if callable(module.bias) else module.bias
        torch.testing.assert_close(outputs(rec, bias), expected, rtol=0, atol=tolerance)
    if hasattr(module, "weight") and callable(module.weight):
        weight = module.weight().dequantize().T.reshape(HEADS, -1, WIDTH)
        torch.testing.assert_close(rec.output_weight, weight, rtol=0, atol=1e-6)


def gpt2_with_lora(**settings):
    config = LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False, **settings)
    model = get_peft_model(FAMILIES["gpt2"].build(), config)
    return model, FAMILIES["gpt2"].batch("right")


def lora_weight(model, layer):
    """W + scaling · A B of a layer's output projection, and W alone; from the parameters."""
    project = model.base_model.model.transformer.h[layer].attn.c_proj
    base = project.base_layer.weight.detach()
    added = project.scaling["default"] * (project.lora_B["default"].weight @ project.lora_A["default"].weight).T
    return (base + added.detach()).reshape(HEADS, -1, WIDTH), base.reshape(HEADS, -1, WIDTH)


def test_reading_a_lora_layer_in_training_leaves_its_dropout_out_and_on():
    model, batch = gpt2_with_lora(lora_dropout=0.5)
    model.train()
    model.base_model.model.transformer.h[1].eval()  # a mode that is not its parent's
    modes = [module.training for module in model.modules()]
    recording = record(model, batch)
    for layer, rec in enumerate(recording):
        assert rec.name == f"base_model.model.transformer.h.{layer}.attn"
        adapted, base = lora_weight(model, layer)
        assert (adapted - base).abs().max() > 0.1
        torch.testing.assert_close(rec.output_weight, adapted, rtol=1e-5, atol=1e-5)
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)


def test_output_weight_follows_an_adapter_that_is_switched_off_or_merged():
    model, batch = gpt2_with_lora()
    adapted, base = lora_weight(model, 0)
    torch.testing.assert_close(record(model, batch)[0].output_weight, adapted)
    with model.disable_adapter():
        torch.testing.assert_close(record(model, batch)[0].output_weight, base)
    torch.testing.assert_close(record(model, batch)[0].output_weight, adapted)
    model.merge_adapter()
    torch.testing.assert_close(record(model, batch)[0].output_weight, adapted)


def test_output_weight_follows_a_lora_wrapped_around_the_projection_later():
    model, batch = hand_written()
    before = record(model, batch)[0].output_weight
    model.blocks[0].to_out = with_lora(model.blocks[0].to_out).eval()
    with watching(model, ".to_out") as calls:
        rec = record(model, batch)[0]
    assert (rec.output_weight - before).abs().max() > 0.1
    torch.testing.assert_close(outputs(rec, calls[0][0].bias), calls[0][3], rtol=0, atol=1e-5)


@torch.no_grad()
def in_place(linear):
    linear.weight[3, 5] += 1e-3


@torch.no_grad()
def through_data(linear):
    linear.weight.data.mul_(0.9)


def optimizer_step(linear):
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    linear(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()


def new_parameter(linear):
    linear.weight = nn.Parameter(linear.weight.detach() + 1)


def other_dtype(linear):
    linear.to(torch.bfloat16)


@pytest.mark.parametrize("change", [in_place, through_data, optimizer_step, new_parameter, other_dtype])
def test_the_kept_output_weight_is_read_anew_when_the_layer_changes(change):
    linear = nn.Linear(WIDTH, 10)
    read = read_output_weight(linear, HEADS, WIDTH // HEADS)
    assert read_output_weight(linear, HEADS, WIDTH // HEADS) is read
    assert read_output_weight(linear, 1, WIDTH).shape == (1, WIDTH, 10)
    change(linear)
    anew = read_output_weight(linear, HEADS, WIDTH // HEADS)
    assert anew.dtype == linear.weight.dtype
    tolerance = 1e-2 if anew.dtype == torch.bfloat16 else 1e-6
    expected = linear.weight.detach().T.reshape(HEADS, -1, 10)
    torch.testing.assert_close(anew, expected, rtol=tolerance, atol=tolerance / 10)


@torch.no_grad()
def test_the_kept_output_weight_is_read_anew_after_the_least_change():
    linear = nn.Linear(WIDTH, 10, bias=False, dtype=torch.bfloat16)
    for _ in range(3):
        linear.weight[3, 5] *= 1 + torch.finfo(torch.bfloat16).eps
        assert torch.equal(read_output_weight(linear, 1, WIDTH)[0], linear.weight.T)
    linear.weight.zero_()
    for dtype in (torch.bfloat16, torch.float64):  # equal numbers in another format
        assert read_output_weight(linear.to(dtype), 1, WIDTH).dtype == dtype


def test_the_kept_output_weight_is_read_anew_when_packed_weights_change():
    quantized = as_dynamically_quantized(nn.Linear(WIDTH, WIDTH))
    read = read_output_weight(quantized, HEADS, WIDTH // HEADS)
    weight, bias = quantized._packed_params._weight_bias()
    quantized.set_weight_bias(torch.quantize_per_tensor(-weight.dequantize(), weight.q_scale(), 0, torch.qint8), bias)
    torch.testing.assert_close(read_output_weight(quantized, HEADS, WIDTH // HEADS), -read, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_does_not_round_the_weight_off_in_half_precision(dtype):
    linear = nn.Linear(WIDTH, 50, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.normal_(linear.bias, std=2)
    weight = read_output_weight(linear, 1, WIDTH)[0].float()
    error = (weight - linear.weight.detach().float().T).abs().max()
    assert error < torch.finfo(dtype).eps * 0.1  # as large as the weights; the bias is 20 times that


def test_an_output_weight_read_in_inference_mode_and_autocast_is_an_ordinary_float32_tensor():
    model, batch = hand_written()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with record_attention(model) as recording:
            run(model, batch)
        weight = recording[0].output_weight
    assert not weight.is_inference() and not weight.requires_grad
    torch.testing.assert_close(weight, model.blocks[0].to_out.weight.detach().T.reshape(HEADS, -1, WIDTH))


def test_output_weight_may_be_read_inside_the_context():
    model, batch = hand_written()
    with torch.no_grad(), record_attention(model) as recording:
        run(model, batch)
        weights = [rec.output_weight for rec in recording]
    for block, weight in zip(model.blocks, weights, strict=True):
        torch.testing.assert_close(weight, block.to_out.weight.detach().T.reshape(HEADS, -1, WIDTH))
    assert recording.names == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("gate", ["before", "after"])
def test_a_gate_before_the_projection_leaves_it_unknown_and_the_error_says_how_to_name_it(gate):
    model, batch = hand_written(Attention(gate=gate))
    groups = ((0, 1), (2, 3))
    for _ in range(2):  # found out in the first pass, known in the second
        rec = record(model, batch)[0]
        assert rec.output_weight is None
        with pytest.raises(ValueError, match=re.escape("record_attention(model, output_projections={'blocks.0': ")):
            mixing_matrix(rec, groups)
        assert mixing_matrix(rec, groups, weights="mean").sum() == 3 * 2
    rec = record(model, batch, output_projections={"blocks.0": "blocks.0.to_out"})[0]
    torch.testing.assert_close(rec.output_weight, model.blocks[0].to_out.weight.detach().T.reshape(HEADS, -1, WIDTH))
    mixing_matrix(rec, groups)


def test_an_override_holds_for_its_context_only():
    model, batch = hand_written()
    override = {"blocks.0": "blocks.1.to_q"}
    found, named, again = (
        record(model, batch, output_projections=choice)[0].output_weight for choice in (None, override, None)
    )
    torch.testing.assert_close(named, model.blocks[1].to_q.weight.detach().T.reshape(HEADS, -1, WIDTH))
    torch.testing.assert_close(found, model.blocks[0].to_out.weight.detach().T.reshape(HEADS, -1, WIDTH))
    assert again is found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"blocks.0": "blocks.0.project"}, "'blocks.0.project' is no module of Stack"),
        ({"block.0": "blocks.0.to_out"}, "'block.0' is no module of Stack"),
        ({"blocks.0": "blocks"}, "'blocks' is a ModuleList, expected a linear layer"),
    ],
)
def test_an_override_that_names_no_linear_layer_is_refused(override, message):
    model, _ = hand_written()
    with pytest.raises(ValueError, match=re.escape(message)):
        record_attention(model, output_projections=override)


# ----------------------------------------------------------------------------------------------------- grouped queries


def test_grouped_queries_with_and_without_enable_gqa():
    plain, batch = hand_written(Attention(kv_heads=2))
    grouped, _ = hand_written(Attention(kv_heads=2, enable_gqa=True))
    grouped.load_state_dict(plain.state_dict())
    plain_record, grouped_record = record(plain, batch)[0], record(grouped, batch)[0]
    assert plain_record.num_key_value_heads == HEADS and grouped_record.num_key_value_heads == 2
    assert grouped_record.num_heads == HEADS
    torch.testing.assert_close(grouped_record.maps(), plain_record.maps(), rtol=0, atol=1e-6)
    bias = plain.blocks[0].to_out.bias
    torch.testing.assert_close(outputs(grouped_record, bias), outputs(plain_record, bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_grouped_record_equals_the_ungrouped_one(kv_heads):
    query, key, value = seeded(2, 6, 5, 4), seeded(2, kv_heads, 7, 4, seed=6), seeded(2, kv_heads, 7, 4, seed=7)
    mask = seeded(5, 7) > -0.5
    grouped = AttentionRecord("attention", query, key, value, attention_mask=mask)
    repeated = (tensor.repeat_interleave(6 // kv_heads, 1) for tensor in (key, value))
    assert torch.equal(grouped.maps(), AttentionRecord("attention", query, *repeated, attention_mask=mask).maps())


# ------------------------------------------------------------------------------------------------------ which calls


def test_a_module_called_several_times_gives_a_record_a_call_in_order():
    model, batch = hand_written(rounds=3)
    with torch.no_grad(), watching(model, ".to_q") as calls:
        recording = record(model, batch)
    assert recording.names == ["blocks.0", "blocks.1"] * 3
    for rec, (*_, query) in zip(recording, calls, strict=True):
        assert torch.equal(rec.query, query.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    assert not torch.equal(recording[0].query, recording[2].query)
    for rec in recording[::2]:
        assert torch.equal(rec.output_weight, recording[0].output_weight)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        (["blocks.1"], [1, 3]),
        ([2], [2]),
        (["blocks.0", 3], [0, 2, 3]),
        ([3, 0], [0, 3]),
        (["blocks.0", 0], [0, 2]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_layers_keeps_only_the_named_calls_and_holds_nothing_of_the_rest(layers, kept):
    model, batch = hand_written(rounds=2)
    with Spy() as spy, torch.no_grad(), record_attention(model, layers=layers) as recording:
        run(model, batch)
        alive = [query() is not None for query in spy.queries]  # nothing is held while the context is open either
    assert len(spy.queries) == 4
    assert alive == [call in kept for call in range(4)]
    assert [spy.queries[call]() for call in kept] == [rec.query for rec in recording]
    assert recording.names == [f"blocks.{call % 2}" for call in kept]


@pytest.mark.parametrize("family", ["gpt2", "encoder", "dit"])
def test_layers_keeps_only_the_named_layer_of_a_real_model(family):
    family = FAMILIES[family]
    model, batch = family.build(), family.batch("none")
    everything = record(model, batch)
    for choice in ([everything.names[1]], [1]):
        (only,) = record(model, batch, layers=choice)
        assert only.name == everything.names[1]
        assert torch.equal(only.maps(), everything[1].maps())


def test_layers_that_cannot_be_are_refused():
    model, _ = hand_written()
    with pytest.raises(ValueError, match=re.escape("'blocks.2' is no module of Stack")):
        record_attention(model, layers=["blocks.0", "blocks.2"])
    with pytest.raises(ValueError, match=re.escape("layers=[-1]: positions count from 0")):
        record_attention(model, layers=[0, -1])
    with pytest.raises(TypeError, match="expects a torch.nn.Module, got function"):
        record_attention(lambda x: x)


@pytest.mark.parametrize(("layers", "missing"), [([0, 2], "[2]"), (["blocks.0", "blocks.1.to_q"], "['blocks.1.to_q']")])
def test_a_layer_that_was_planned_but_did_not_run_is_an_error(layers, missing):
    model, batch = hand_written()
    with pytest.raises(RecordingError, match=re.escape(f"attention layers {missing} of Stack were planned but")):
        record(model, batch, layers=layers)
    assert not traces_left(model)


def test_a_skipped_layer_is_an_error_where_it_was_planned():
    class Skip(nn.Module):
        def forward(self, x):
            return x

    model, batch = hand_written()
    skipped, model.blocks[1] = model.blocks[1], Skip()
    model.blocks[1].attention = skipped
    assert record(model, batch).names == ["blocks.0"]
    with pytest.raises(RecordingError, match="planned but did not run: 1 attention calls were seen"):
        record(model, batch, layers=["blocks.1.attention"])


# ------------------------------------------------------------------------------------------------ attention not seen


class Flash(nn.Module):
    """A kernel called past scaled_dot_product_attention."""

    def forward(self, x):
        x = x[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0][:, 0]


class WithWeights(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]  # need_weights=True by default


def eager_llama():
    return FAMILIES["llama"].build("eager"), FAMILIES["llama"].batch("none")


@pytest.mark.parametrize(
    "make",
    [
        eager_llama,
        lambda: hand_written(Flash()),
        lambda: hand_written(WithWeights(WIDTH, HEADS)),
        lambda: hand_written(nn.Linear(WIDTH, WIDTH)),
    ],
    ids=["eager", "flash", "need_weights", "no-attention"],
)
def test_attention_that_cannot_be_seen_is_an_error_that_says_what_to_load(make):
    model, batch = make()
    with pytest.raises(RecordingError, match='attn_implementation="sdpa"') as error:
        record(model, batch)
    if hasattr(model, "config"):
        assert "Its attn_implementation is 'eager'" in str(error.value)
    assert not traces_left(model)


def test_no_forward_pass_in_the_context_is_an_error():
    model, _ = hand_written()
    with pytest.raises(RecordingError, match="run its forward pass inside the context"), record_attention(model):
        pass


def test_a_second_forward_pass_in_one_context_is_an_error():
    model, batch = hand_written()
    with pytest.raises(RecordingError, match="second forward pass"), record_attention(model):
        run(model, batch)
        run(model, batch)
    assert not traces_left(model)
    assert len(record(model, batch)) == 2


class Folded(nn.Module):
    """Heads folded into the batch: three dimensions."""

    def forward(self, x):
        batch, length, width = x.shape
        x = x.view(batch, length, HEADS, -1).transpose(1, 2).flatten(0, 1)
        x = F.scaled_dot_product_attention(x, x, x)
        return x.view(batch, HEADS, length, -1).transpose(1, 2).flatten(2)


def test_heads_folded_into_the_batch_are_refused_by_name():
    model, batch = hand_written(Folded())
    with pytest.raises(ValueError, match=re.escape("attention 'blocks.0': query has shape (12, 6, 6), expected four")):
        record(model, batch)
    assert not traces_left(model)


# ------------------------------------------------------------------------------------------- errors, nesting, traces


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        self.inner(x)
        raise KeyError("inside the model")


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_an_exception_is_not_masked_and_leaves_no_trace(where):
    model, batch = hand_written(Attention(), Broken() if where == "inside" else Attention())
    with pytest.raises(KeyError, match=f"{where} the model"), record_attention(model, layers=[7]):
        if where == "before":
            raise KeyError("before the model")
        run(model, batch)
        raise KeyError("after the model")
    assert not traces_left(model)
    model.blocks[1] = Attention()
    assert record(model, batch).names == ["blocks.0", "blocks.1"]


def test_a_module_that_survives_an_error_inside_keeps_its_name():
    class Survivor(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken = nn.Sequential(Broken())

        def forward(self, x):
            try:
                return self.broken(x)
            except KeyError:
                return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

    model, batch = hand_written(Survivor(), Attention())
    assert record(model, batch).names == ["blocks.0.broken.0.inner", "blocks.0", "blocks.1"]

    def refuse(*_):
        raise KeyError("before the module")

    model.blocks[0].broken.register_forward_pre_hook(refuse)
    assert record(model, batch).names == ["blocks.0", "blocks.1"]


@every_family
def test_recording_leaves_no_trace(family):
    model, batch = family.build(), family.batch("none")
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad(), record_attention(model) as recording:
        run(model, batch)
        assert traces_left(model)
    assert not traces_left(model)
    assert all(rec.output_weight is not None for rec in recording)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


def test_records_and_caches_keep_no_model_alive():
    model, batch = hand_written()
    recording = record(model, batch)
    assert recording[0].output_weight is not None
    remains = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(module() for module in remains)
    assert recording[0].output_weight is not None and recording[1].output_weight is None


@pytest.mark.parametrize("teacher_name", ["llama", "encoder", "multihead"])
@pytest.mark.parametrize("student_name", ["gpt2", "decoder"])
@pytest.mark.parametrize("turn", ["in order", "in turn"])
def test_nested_recordings_of_teacher_and_student_do_not_mix(teacher_name, student_name, turn):
    families = [FAMILIES[student_name], FAMILIES[teacher_name]]
    (student, batch), (teacher, other) = ((family.build(), family.batch("none")) for family in families)
    alone = [record(student, batch), record(teacher, other)]
    with torch.no_grad(), record_attention(student) as learned, record_attention(teacher) as taught:
        for model, inputs in ((student, batch), (teacher, other))[:: 1 if turn == "in order" else -1]:
            run(model, inputs)
    for nested, expected in zip((learned, taught), alone, strict=True):
        assert nested.names == expected.names
        for rec, same in zip(nested, expected, strict=True):
            assert torch.equal(rec.query, same.query) and torch.equal(rec.output_weight, same.output_weight)
    assert not traces_left(student) and not traces_left(teacher)


# ------------------------------------------------------------------------------------------- gradient checkpointing


class Core(nn.Module):
    """The attention kernel as a module of its own, without parameters."""

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.core, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), Core(), nn.Linear(WIDTH, WIDTH)
        self.use_reentrant = None

    def body(self, x):
        query, key, value = self.to_qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(self.core(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x):
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def checkpointed(name, use_reentrant):
    """A model in training, with checkpointing or (None) without, and its batch."""
    if name == "hand-written":
        torch.manual_seed(0)
        model, batch = Stack(Checkpointed(), Checkpointed()), Batch({"x": seeded(3, 6, WIDTH).requires_grad_()})
        for block in model.blocks:
            block.use_reentrant = use_reentrant
        return model.train(), batch
    model, batch = FAMILIES[name].build().train(), FAMILIES[name].batch(FAMILIES[name].paddings[-1])
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model, batch


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("backward", ["inside", "after"])
@pytest.mark.parametrize(
    ("name", "projection"),
    [("gpt2", ".c_attn"), ("llama", ".q_proj"), ("bert", ".query"), ("vit", ".q_proj"), ("hand-written", ".to_qkv")],
)
def test_gradient_checkpointing_records_each_layer_once_and_gives_the_same_gradients(name, projection, backward):
    results = []
    for use_reentrant in (None, False):
        model, batch = checkpointed(name, use_reentrant)
        with watching(model, projection) as calls:
            with record_attention(model) as recording:
                out = run(model, batch)
                loss = out.float().square().mean() + sum(rec.maps().square().sum() for rec in recording)
                if backward == "inside":
                    loss.backward()
            if backward == "after":
                loss.backward()
        # The layers did run again, and were not recorded again.
        assert len(calls) == LAYERS * (1 if use_reentrant is None else 2)
        results.append((recording.names, gradients(model)))
    (names, expected), (again, found) = results
    assert len(names) == LAYERS and again == names
    assert len(found) > LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_checkpointed_as_a_whole_is_recorded_once():
    model, batch = hand_written()
    x = batch.inputs["x"].requires_grad_()
    with record_attention(model) as recording:
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert recording.names == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "hand-written"])
def test_reentrant_checkpointing_is_refused(name):
    model, batch = checkpointed(name, True)
    before = traces_left(model)  # transformers' own hook on the embeddings
    with pytest.raises(RecordingError, match=re.escape("gradient_checkpointing_kwargs={'use_reentrant': False}")):
        with record_attention(model):
            run(model, batch)
    assert traces_left(model) == before


@pytest.mark.parametrize("state", ["frozen", "in evaluation"])
def test_a_part_that_runs_without_gradient_on_purpose_is_no_mistake(state):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            with torch.no_grad():
                return self.attention(x)

    model, batch = hand_written(Tower(), Attention())
    model.train()
    if state == "frozen":
        model.blocks[0].requires_grad_(False)
    else:
        model.blocks[0].eval()
    with record_attention(model) as recording:
        run(model, batch)
    assert [rec.query.requires_grad for rec in recording] == [False, True]


# --------------------------------------------------------------------------------------------------------- wrappers


def recorded_step(model, batch):
    """The records of a pass, and the gradients of a loss on its output and its maps."""
    with record_attention(model) as recording:
        out = run(model, batch)
    (out.square().mean() + sum(rec.maps().square().sum() for rec in recording)).backward()
    return recording, gradients(model)


def assert_same_records(recording, expected):
    assert recording.names == expected.names
    for rec, same in zip(recording, expected, strict=True):
        torch.testing.assert_close(rec.maps(), same.maps(), rtol=0, atol=1e-5)
        # By head: compiled, transformers repeats grouped keys and values by itself.
        torch.testing.assert_close(value_of_each_head(rec), value_of_each_head(same), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "hand-written",
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("vit", marks=pytest.mark.slow),
        pytest.param("encoder", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_student_is_recorded_as_it_is_without_compiling(name):
    if name == "hand-written":
        model, batch = hand_written(Attention())  # one layer: compiling takes its time
    else:
        model, batch = FAMILIES[name].build(), FAMILIES[name].batch("none")
    torch._dynamo.reset()
    expected, gradients_expected = recorded_step(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(5):
        if step == 2:
            with torch.no_grad():
                run(compiled, batch)  # a pass that is not recorded must not stay in the compiled code
            continue
        model.zero_grad()
        recording, _ = recorded_step(compiled, batch)
        assert_same_records(recording, expected)
        torch.testing.assert_close(gradients(model), gradients_expected, rtol=1e-4, atol=1e-5)
    assert not traces_left(compiled)
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gpt2", "hand-written", "multihead"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_ddp_has_the_same_names_and_records(name, one_process):
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch("none")
    expected = record(model, batch)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with record_attention(wrapped, layers=expected.names) as recording:
        run(wrapped, batch)
    assert_same_records(recording, expected)
    for rec, same in zip(recording, expected, strict=True):
        assert torch.equal(rec.output_weight, same.output_weight)
    sum(rec.maps().square().sum() for rec in recording).backward()
    assert gradients(model)
    assert not traces_left(wrapped)


def test_wrappers_leave_no_level_in_a_path():
    for wrapped in ("module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "_orig_mod.module.a.b", "a._orig_mod.b"):
        assert clean_path(wrapped) == "a.b"
    assert clean_path("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b") == "a.b"
    assert clean_path("") == clean_path("module") == clean_path("_orig_mod") == ""
    assert clean_path("a.module.b") == "a.module.b"


@pytest.mark.parametrize("name", ["gpt2", "dit", "mdt-masked", "encoder", "hand-written"])
def test_under_autocast_the_recorded_tensors_are_bfloat16_and_the_maps_float32(name):
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch("none")
    exact = record(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        recording = record(model, batch)
    for rec, same in zip(recording, exact, strict=True):
        assert {rec.query.dtype, rec.key.dtype, rec.value.dtype} == {torch.bfloat16}
        assert rec.maps().dtype == torch.float32
        assert rec.output_weight is not None and rec.output_weight.dtype == torch.float32
        torch.testing.assert_close(rec.maps(), same.maps(), rtol=0, atol=0.1)


# -------------------------------------------------------------------------------------------------------- gradients


@every_family
def test_gradients_flow_from_the_maps_of_a_student_and_not_from_a_teacher(family):
    model, batch = family.build(), family.batch(family.paddings[-1])
    with record_attention(model.train()) as recording:
        run(model, batch)
    for rec in recording:
        model.zero_grad()
        rec.maps().square().sum().backward(retain_graph=True)
        found = gradients(model)
        assert found and all(gradient.isfinite().all() for gradient in found.values())
        assert max(gradient.abs().max() for gradient in found.values()) > 1e-4
    for rec in record(model.eval(), batch):
        assert not rec.maps().requires_grad and not rec.output_weight.requires_grad


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_recording_changes_neither_outputs_nor_gradients(family, training):
    model, batch = family.build().train(training), family.batch(family.paddings[-1])
    results = []
    for context in (nullcontext(), record_attention(model)):
        model.zero_grad()
        with context:
            out = run(model, batch)
        out.square().sum().backward()
        results.append((out.detach(), gradients(model) or pytest.fail("nothing to compare")))
    (plain, expected), (recorded, found) = results
    torch.testing.assert_close(recorded, plain, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_an_encoder_in_evaluation_leaves_its_fused_path_and_stays_equal_up_to_rounding():
    """nn.TransformerEncoder without gradient runs a fused layer that calls no attention; recorded, it must not."""
    family = FAMILIES["encoder"]
    model, batch = family.build(), family.batch("right")
    with torch.no_grad():
        fused = run(model, batch)
        with record_attention(model):
            recorded = run(model, batch)
    torch.testing.assert_close(recorded[batch.real], fused[batch.real], rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- memory


@every_family
def test_recording_copies_nothing(family):
    model, batch = family.build(), family.batch(family.paddings[-1])
    with Spy() as spy, record_attention(model) as recording:
        run(model, batch)
    assert len(spy.queries) == len(recording) > 0
    for rec, query in zip(recording, spy.queries, strict=True):
        assert rec.query is query()


def test_learned_queries_are_broadcast_over_the_batch_without_a_copy():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, HEADS, 2, 5))
            self.project = nn.Linear(WIDTH, HEADS * 5)

        def forward(self, x):
            key = self.project(x).unflatten(-1, (HEADS, 5)).transpose(1, 2)
            return F.scaled_dot_product_attention(self.query, key, key).mean(2).mean((1, 2))[:, None, None] + 0 * x

    model, batch = hand_written(Pool())
    rec = record(model, batch)[0]
    assert rec.query.shape == (3, HEADS, 2, 5) and rec.query.data_ptr() == model.blocks[0].query.data_ptr()


def test_a_sequence_first_multihead_attention_may_be_the_model_itself():
    attention = SequenceFirst().attention.eval()
    x = seeded(6, 3, WIDTH)
    with torch.no_grad(), record_attention(attention) as recording:
        out = attention(x, x, x, need_weights=False)[0]
    assert recording.names == [""]
    torch.testing.assert_close(outputs(recording[0], attention.out_proj.bias), out.transpose(0, 1))
