"""Whole models of six families through the public interface: nothing depends on how a batch is padded, split and
accumulated, on how maps are tiled, or on what memory held before; and a seed decides everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)

from squeezeheads import (
    Distillation,
    SqueezedHeads,
    SqueezedRelations,
    SqueezeTrainer,
    record_attention,
    squeezed_attention_loss,
    tiling,
)
from squeezeheads.models import MDTTransformer2DModel

WIDTH, VOCABULARY = 24, 40
LENGTHS = [37, 5, 1, 20]  # of the texts of a batch: more than a tile has rows, and fewer

Inputs = dict[str, Tensor]


def gpt2(heads: int, layers: int, drop: float) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": heads, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=0.0, use_cache=False))


def sizes(heads: int, layers: int) -> dict[str, int]:
    named = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": heads}
    return named


def llama(heads: int, layers: int, drop: float) -> nn.Module:
    config = LlamaConfig(
        **sizes(heads, layers), vocab_size=VOCABULARY, num_key_value_heads=heads // 2, attention_dropout=drop
    )
    config.use_cache = False
    return LlamaForCausalLM(config)


def bert(heads: int, layers: int, drop: float) -> nn.Module:
    config = BertConfig(**sizes(heads, layers), vocab_size=VOCABULARY, hidden_dropout_prob=drop)
    config.attention_probs_dropout_prob = 0.0
    return BertModel(config)


def deit(heads: int, layers: int, drop: float) -> nn.Module:
    return DeiTModel(DeiTConfig(**sizes(heads, layers), image_size=24, patch_size=4, hidden_dropout_prob=drop))


def denoiser(kind: type, **more: Any) -> Callable[[int, int, float], nn.Module]:
    def make(heads: int, layers: int, drop: float) -> nn.Module:
        options = {"num_attention_heads": heads, "attention_head_dim": WIDTH // heads, "in_channels": 4}
        options |= {"num_layers": layers, "sample_size": 12, "num_embeds_ada_norm": 10, **more}
        options["num_layers"] += layers + 1 if kind is MDTTransformer2DModel else 0  # two encoder layers at least
        options |= {"dropout": drop} if kind is DiTTransformer2DModel else {}
        return kind(**options)

    return make


def texts(lengths: list[int] = LENGTHS, total: int = max(LENGTHS), side: str = "right") -> Inputs:
    """The tokens of a text and their positions are the same whatever stands around them."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (len(lengths), total), generator=generator)  # padding is no special token
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(total - length, total)
        ids[row, where] = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(row))
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def pictures() -> Inputs:
    return {"pixel_values": torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(5))}


def noise() -> Inputs:
    latents = torch.randn(4, 4, 12, 12, generator=torch.Generator().manual_seed(5))
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([3, 700, 20, 999]),
        "class_labels": torch.tensor([1, 2, 0, 9]),
    }


@dataclass(frozen=True)
class Family:
    make: Callable[[int, int, float], nn.Module]
    batch: Callable[[], Inputs]

    def build(self, heads: int, layers: int, seed: int, drop: float = 0.0) -> nn.Module:
        """A model whose maps are far from uniform."""
        set_seed(seed)
        model = self.make(heads, layers, drop)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(1.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        return model

    def pair(self) -> tuple[nn.Module, nn.Module]:
        return self.build(4, 1, seed=0).eval(), self.build(6, 2, seed=1).eval().requires_grad_(False)


FAMILIES = {
    "gpt2": Family(gpt2, texts),
    "llama": Family(llama, texts),
    "bert": Family(bert, texts),
    "deit": Family(deit, pictures),
    "dit": Family(denoiser(DiTTransformer2DModel, norm_num_groups=1), noise),
    "mdt": Family(denoiser(MDTTransformer2DModel, num_decoder_layers=1), noise),
}
LANGUAGE = [name for name in FAMILIES if FAMILIES[name].batch is texts]
every_family = pytest.mark.parametrize("name", FAMILIES)


def loss_and_gradients(
    student: nn.Module, teacher: nn.Module, batch: Inputs, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of two lines, as a training loop of one's own has it."""
    rows = batch["attention_mask"].bool() if "attention_mask" in batch else None
    student.zero_grad()
    with torch.no_grad(), record_attention(teacher) as taught:
        teacher(**batch)
    with record_attention(student) as learned:
        student(**batch)
    loss = squeezed_attention_loss(learned, taught, rows=rows, **options)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def check_close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Loss and gradients in float32: 1e-4 of the loss, and of the largest gradient of a parameter, which its small
    ones are sums of."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=1e-7)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    assert largest > 1e-4, "no gradient to compare"
    for key, gradient in expected[1].items():
        scale = float(gradient.abs().max()) + 1e-3 * largest
        assert float((found[1][key] - gradient).abs().max()) <= tolerance * scale, key


def check_same(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0]) and torch.isfinite(found[0])
    assert found[1].keys() == expected[1].keys() and found[1]
    for key, gradient in expected[1].items():
        assert torch.isfinite(gradient).all() and torch.equal(found[1][key], gradient), key


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("weights", ["least_squares", "mean"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_changes_nothing(name: str, weights: str) -> None:
    """Its side, its amount, and what its tokens are."""
    student, teacher = FAMILIES[name].pair()
    expected = loss_and_gradients(student, teacher, texts(), weights=weights)
    for total, side in ((37, "left"), (50, "right"), (50, "left")):
        found = loss_and_gradients(student, teacher, texts(total=total, side=side), weights=weights)
        check_close(found, expected)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_text_without_padding_counts_as_in_a_batch(name: str) -> None:
    """Each text alone, weighed by its rows."""
    student, teacher = FAMILIES[name].pair()
    expected = loss_and_gradients(student, teacher, texts())
    total, sums = torch.zeros(()), {key: torch.zeros_like(g) for key, g in expected[1].items()}
    for row, length in enumerate(LENGTHS):
        whole = texts()
        alone = {key: value[row : row + 1, :length] for key, value in whole.items()}
        loss, gradients = loss_and_gradients(student, teacher, alone)
        share = length / sum(LENGTHS)
        total += share * loss
        for key, gradient in gradients.items():
            sums[key] += share * gradient
    check_close((total, sums), expected)


def objectives() -> dict[str, Any]:
    return {
        "attention": SqueezedHeads(schedule="progressive"),
        "relations": SqueezedRelations(schedule="progressive"),
    }


@every_family
def test_a_batch_may_be_split(name: str) -> None:
    """Parts of a batch, with the items of the whole, add up to it."""
    student, teacher = FAMILIES[name].pair()
    batch = FAMILIES[name].batch()
    distillation = Distillation(teacher, objectives())
    distillation.prepare(student, [batch])
    counts = distillation.count(batch)

    def of(parts: list[slice]) -> tuple[Tensor, dict[str, Tensor]]:
        student.zero_grad()
        total = torch.zeros(())
        for part in parts:
            loss = distillation(student, {k: v[part] for k, v in batch.items()}, counts=counts).loss
            loss.backward()
            total += loss.detach()
        return total, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    expected = of([slice(0, 4)])
    check_close(of([slice(0, 1), slice(1, 4)]), expected)
    check_close(of([slice(i, i + 1) for i in (2, 0, 3, 1)]), expected)


def trained(folder: Path, name: str, *, seed: int = 3, drop: float = 0.0, **changes: Any) -> SqueezeTrainer:
    """Three steps of four samples."""
    family = FAMILIES[name]
    batch = family.batch()
    if "class_labels" in batch:  # all without a class: denoisers drop classes at random while they train
        batch["class_labels"] = torch.full((4,), 10)
    student, teacher = family.build(4, 1, seed=seed, drop=drop), family.build(6, 2, seed=1)
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": seed}
    run = SqueezeTrainer(
        model=student,
        teacher=teacher,
        args=TrainingArguments(output_dir=str(folder), **{**options, **changes}),
        objectives=objectives(),
        train_dataset=[{k: v[i % 4] for k, v in batch.items()} for i in range(12)],
    )
    run.train()
    return run


def logged(run: SqueezeTrainer) -> list[list[float]]:
    keys = ("loss", "attention", "relations", "grad_norm")
    return [[entry[key] for key in keys] for entry in run.state.log_history if "loss" in entry]


@every_family
def test_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    whole = logged(trained(tmp_path / "a", name))
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = logged(trained(tmp_path / "b", name, **sizes))
    assert len(whole) == 3 and whole[0] != whole[2]
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@every_family
def test_a_seed_decides_everything(tmp_path: Path, name: str) -> None:
    """Bit for bit, dropout and order of the data included."""
    first, second, other = (trained(tmp_path / str(i), name, seed=s, drop=0.1) for i, s in enumerate((3, 3, 4)))
    assert logged(first) == logged(second) and logged(first) != logged(other)
    weights = [list(run.model.parameters()) for run in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


# ------------------------------------------------------------------------------------------------ tiles and numbers


@pytest.mark.parametrize("weights", ["least_squares", "joint", "mean"])
@every_family
def test_the_size_of_tiles_changes_nothing(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = FAMILIES[name].pair()
    batch = FAMILIES[name].batch()
    counted = []
    original = tiling.tiles

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(original(*args, **kwargs))
        return counted[-1]

    for module in ("divergence.tiled", "squeezing.residuals"):
        monkeypatch.setattr(f"squeezeheads.{module}.tiles", counting)
    found, numbers = [], []
    for size in (2**30, 1, 20_000):
        monkeypatch.setattr(tiling, "TILE_BYTES", size)
        counted.clear()
        found.append(loss_and_gradients(student, teacher, batch, weights=weights, implementation="tiled"))
        numbers.append(sum(len(t) for t in counted))
    assert numbers[0] < numbers[2] < numbers[1], "the size had no effect"
    check_close(found[1], found[0])
    check_close(found[2], found[0])
    dense = loss_and_gradients(student, teacher, batch, weights=weights, implementation="reference")
    check_close(found[1], dense)


@every_family
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    """Models in bfloat16 (8 bits: 1/256) against the same rounded weights and inputs in float32. The budget, 16
    roundings, is for what one to five layers and a softmax make of one."""
    student, teacher = (model.bfloat16() for model in FAMILIES[name].pair())
    batch = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in FAMILIES[name].batch().items()
    }
    half = loss_and_gradients(student, teacher, batch)
    student, teacher = student.float(), teacher.float()
    whole = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    single = loss_and_gradients(student, teacher, whole)
    torch.testing.assert_close(half[0].float(), single[0], rtol=16 / 256, atol=0)
    a, b = (torch.cat([g.float().flatten() for _, g in sorted(x[1].items())]) for x in (half, single))
    assert float((a - b).norm() / b.norm()) <= 16 / 256


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fresh memory holds NaN, and so does memory that is used again. What was taken is listed."""
    taken: list[str] = []
    empty, empty_like, take = torch.empty, torch.empty_like, tiling.Workspace.take

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    def taking(self: Any, name: str, *args: Any) -> Tensor:
        taken.append(name)
        return poison(take(self, name, *args))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(tiling.Workspace, "take", taking)
    return taken


@pytest.mark.parametrize("weights", ["least_squares", "joint", "mean"])
@every_family
def test_nothing_is_read_from_fresh_memory(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    student, teacher = FAMILIES[name].pair()
    batch = FAMILIES[name].batch()
    monkeypatch.setattr(tiling, "TILE_BYTES", 20_000)
    expected = loss_and_gradients(student, teacher, batch, weights=weights, implementation="tiled")
    taken = request.getfixturevalue("poisoned")
    found = loss_and_gradients(student, teacher, batch, weights=weights, implementation="tiled")
    assert taken, "the workspace was not used"
    assert torch.empty(3).isnan().all()
    check_same(found, expected)
