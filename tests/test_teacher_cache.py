"""An offline teacher: what is stored, what is learned from it, what is refused."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import pad
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from squeezeheads import (
    AttentionMSE,
    CachedTeacher,
    DeiTHard,
    DeiTSoft,
    Distillation,
    HiddenStates,
    JensenShannon,
    LogitKD,
    PredictionMatching,
    ReverseKL,
    SqueezedHeads,
    SqueezeTrainer,
    TaskLoss,
    write_teacher_cache,
)
from squeezeheads.batches import next_token_targets
from squeezeheads.files import working_in
from squeezeheads.objectives import Objective
from squeezeheads.objectives.token_chunks import mean_divergence
from squeezeheads.teacher_cache import shards, teacher_fingerprint, writing
from tiny import classifier, deit_student, image_batch, images, language_model, token_batch

VOCABULARY = 40
OBJECTIVES = [LogitKD, ReverseKL, JensenShannon]


def sharp(teacher: nn.Module, factor: float = 40.0) -> nn.Module:
    """With weights of the output layer so large that some tokens are much likelier than others."""
    with torch.no_grad():
        teacher.lm_head.weight.mul_(factor)
    return teacher


def losses(teacher, objective: Objective, student: nn.Module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and the student's gradients."""
    student.zero_grad()
    out = Distillation(teacher, {"it": objective}, targets=next_token_targets)(student, batch)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("k", [None, VOCABULARY])
def test_all_logits_are_the_live_teacher_bit_for_bit(tmp_path, k, kind, temperature):
    teacher, student, batch = sharp(language_model(4)), language_model(2, seed=1), token_batch([7, 5, 3], 8)
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=k)
    live, stored = (losses(t, kind(temperature=temperature), student, batch) for t in (teacher, cached))
    assert torch.equal(live[0], stored[0]) and live[0] > 0
    assert live[1].keys() == stored[1].keys()
    assert all(torch.equal(live[1][name], stored[1][name]) for name in live[1])


def over_outcomes(kind, log_student, teacher, indices, temperature):
    """Float64: the divergence between distributions over the k classes and "another one"; by autograd."""

    def outcomes(log_p):
        rest = log_p.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(-1, indices), rest], -1)

    p = outcomes((teacher.double() / temperature).log_softmax(-1))
    q = outcomes(log_student)
    if kind is LogitKD:
        return (p.exp() * (p - q)).sum(-1)
    if kind is ReverseKL:
        return (q.exp() * (q - p)).sum(-1)
    m = torch.log(0.5 * p.exp() + 0.5 * q.exp())
    return 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1)


def random_logits(rows: int = 9, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(1, rows, VOCABULARY, generator=generator) for _ in range(2))


class Saying(nn.Module):
    """Gives the same logits for whatever batch."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, **_) -> torch.Tensor:
        return self.logits


def stored(folder, logits, **options):
    """What a cache gives back of (1, N, V) logits."""
    batch = {"input_ids": torch.arange(logits.shape[1])[None]}
    return write_teacher_cache(Saying(logits), [batch], folder, **options)(**batch)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("k", [1, 6, VOCABULARY - 1])
def test_truncated_is_the_divergence_over_k_and_the_rest(tmp_path, k, kind, temperature):
    taught, learned = random_logits()
    learned = learned.requires_grad_()
    held = stored(tmp_path / "c", taught, k=k, temperatures=(2.5, 1.0))
    targets = torch.ones(1, 9, dtype=torch.bool)
    targets[0, 4] = False
    value = mean_divergence(
        learned, [held], kind().divergence, temperature=temperature, targets=targets, chunk_bytes=400
    )
    (gradient,) = torch.autograd.grad(value, learned)

    double = learned.detach().double().requires_grad_()
    indices = taught.topk(k, -1).indices
    each = over_outcomes(kind, (double / temperature).log_softmax(-1), taught, indices, temperature)
    expected = each[targets].mean()
    (wanted,) = torch.autograd.grad(expected, double)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, 8, 20])
def test_what_truncation_costs(tmp_path, k, temperature):
    """Forward KL: short by (1 − m) · KL(teacher's rest ‖ student's rest); its gradient off by at most 2 (1 − m) / τ in
    sum. m is the mass kept, as the cache states it."""
    taught, learned = random_logits()
    learned = learned.double().requires_grad_()
    batch = {"input_ids": torch.arange(9)[None]}
    cache = write_teacher_cache(Saying(taught), [batch], tmp_path / "c", k=k, temperatures=(temperature,))
    held = cache(**batch)
    p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (taught, learned.detach()))
    chosen = taught.topk(k, -1).indices
    mass = p.exp().gather(-1, chosen).sum(-1)
    kept = cache.mass_kept[temperature]
    assert kept["mean"] == pytest.approx(float(mass.mean()), rel=1e-5)
    assert kept["least"] == pytest.approx(float(mass.min()), rel=1e-5)

    rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, chosen, False)
    conditional = [x[rest].view(1, 9, -1).log_softmax(-1) for x in (p, log_q)]
    short = (1 - mass) * (conditional[0].exp() * (conditional[0] - conditional[1])).sum(-1)
    for row in range(9):
        only = torch.zeros(1, 9, dtype=torch.bool)
        only[0, row] = True
        values, gradients = [], []
        for teacher in (taught, held):
            value = mean_divergence(learned, [teacher], LogitKD().divergence, temperature=temperature, targets=only)
            values.append(float(value.detach()))
            gradients.append(torch.autograd.grad(value, learned)[0])
        assert values[0] - values[1] == pytest.approx(float(short[0, row]), rel=1e-4, abs=1e-6)
        off = float((gradients[0] - gradients[1]).abs().sum())
        assert 0 < off <= 2 * (1 - float(mass[0, row])) / temperature + 1e-6


def test_a_rest_too_small_for_one_minus_its_complement(tmp_path):
    """With the rest at 1e-9 of the mass: its log must not come out as that of rounding."""
    taught = torch.zeros(1, 1, VOCABULARY)
    taught[..., 0] = 25.0
    held = stored(tmp_path / "c", taught, k=1)
    learned = torch.zeros(1, 1, VOCABULARY).log_softmax(-1)[0]
    where = (torch.tensor([0]), torch.tensor([0]))
    log = held.log_probabilities(where, learned, 1.0)
    torch.testing.assert_close(log, taught[0].log_softmax(-1), rtol=1e-6, atol=1e-6)


def test_impossible_classes(tmp_path):
    """Both models give the rest no probability at all: finite, as from the live teacher."""
    taught, learned = (x.clone() for x in random_logits())
    taught[..., 5:], learned[..., 5:] = -math.inf, -math.inf
    learned.requires_grad_()
    held = stored(tmp_path / "c", taught, k=5)
    live, off = (
        torch.autograd.grad(mean_divergence(learned, [t], LogitKD().divergence), learned)[0] for t in (taught, held)
    )
    assert off.isfinite().all() and off.abs().sum() > 0
    torch.testing.assert_close(off, live)


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("k", [6, None])
def test_narrow_numbers_lose_no_more_than_their_rounding(tmp_path, k, dtype, budget):
    """Of logits around -100, which half precision would round by 0.03: what is rounded is the distance to the best."""
    taught, learned = random_logits()
    held = stored(tmp_path / "c", taught - 100, k=k, dtype=dtype)
    where = torch.unravel_index(torch.arange(9), (1, 9))
    log_q = learned[0].log_softmax(-1)
    exact = stored(tmp_path / "d", taught - 100, k=k).log_probabilities(where, log_q, 1.0)
    log = held.log_probabilities(where, log_q, 1.0)
    distance = (taught.max() - taught.min()).item()
    assert held.values.dtype == dtype
    assert 0 < (log - exact).abs().max() <= 2 * budget * distance
    torch.testing.assert_close(log.exp(), exact.exp(), rtol=0, atol=2 * budget)


def test_half_precision_teachers_are_stored_as_they_are(tmp_path):
    taught = random_logits()[0].bfloat16()
    held = stored(tmp_path / "c", taught, k=None)
    assert held.values.dtype == torch.bfloat16 and torch.equal(held.values, taught)


def test_padding_changes_no_key_and_is_not_answered(tmp_path):
    teacher, lengths = sharp(language_model(4)), [7, 5, 3]
    written = token_batch(lengths, 8)
    cached = write_teacher_cache(teacher, [written], tmp_path / "c", k=6)
    assert (cached.samples, cached.predictions) == (3, 15)
    right = cached(**written)
    for total, side in ((12, "right"), (9, "left")):
        batch = token_batch(lengths, total, side)
        found = cached(**batch)
        assert found.shape == (3, total, VOCABULARY)
        mask = batch["attention_mask"].bool()
        assert torch.equal(found.known, mask)
        for name in ("values", "indices", "rest"):
            assert torch.equal(getattr(found, name)[mask], getattr(right, name)[written["attention_mask"].bool()])
    # A sample alone, without padding: with a mask of ones, or none.
    alone = {name: value[:1, :7] for name, value in written.items() if name != "labels"}
    for batch in (alone, {name: value for name, value in alone.items() if name != "attention_mask"}):
        found = cached(**batch)
        assert found.known is None and torch.equal(found.values[0], right.values[0, :7])
    student = language_model(2, seed=1)
    with pytest.raises(ValueError, match="made at padding count"):
        Distillation(cached, {"l": LogitKD()}, targets=lambda _: None)(student, written)


def test_what_a_key_depends_on(tmp_path):
    teacher, batch = sharp(language_model(4)), token_batch([7, 5], 7)
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=6)
    same = {**batch, "input_ids": batch["input_ids"].int(), "labels": batch["labels"] * 0}
    assert torch.equal(cached(**same).values, cached(**batch).values)
    for name, at in (("input_ids", (1, 4)), ("position_ids", (1, 0))):
        other = {**batch, name: batch[name].clone()}
        other[name][at] += 1
        with pytest.raises(ValueError, match="1 of 2 samples of a batch are not in the teacher cache.*number 1"):
            cached(**other)
    longer = token_batch([7, 5], 7)
    longer["attention_mask"][1, 5] = 1
    with pytest.raises(ValueError, match="1 of 2 samples"):
        cached(**longer)


def test_images_are_keyed_by_their_pixels(tmp_path):
    teacher, batch = classifier(4), image_batch(5)
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=3)
    assert not cached.settings.per_token and cached.predictions == 5
    found = cached(pixel_values=batch["pixel_values"][[3, 1]])
    assert torch.equal(found.values, teacher.eval()(batch["pixel_values"]).logits.topk(3).values[[3, 1]])
    pixels = batch["pixel_values"][:1].clone()
    pixels[0, 0, 0, 0] = torch.nextafter(pixels[0, 0, 0, 0], torch.tensor(9.0))
    with pytest.raises(
        ValueError, match=r"1 of 1 samples.*pixel_values \(1, 8, 8\).*live teacher.*write_teacher_cache"
    ):
        cached(pixel_values=pixels)
    with pytest.raises(ValueError, match="1 of 1 samples"):
        cached(pixel_values=batch["pixel_values"][:1].double())


@pytest.mark.parametrize("k", [3, None])
def test_deit_learns_from_a_cache(tmp_path, k):
    teacher, student, batch = classifier(4), deit_student(), image_batch(6)
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=k)
    hard = [Distillation(t, {"d": DeiTHard()})(student, batch).loss for t in (teacher, cached)]
    assert torch.equal(*hard) and hard[0] > 0
    soft = [Distillation(t, {"d": DeiTSoft()})(student, batch).loss for t in (teacher, cached)]
    assert torch.equal(*soft) if k is None else 0 < soft[1] < soft[0]


def test_mean_of_teachers(tmp_path):
    """Of complete caches as of the live ones; of truncated ones refused, whether at the start or where it is called."""
    teachers = {"a": classifier(4), "b": classifier(2, seed=1)}
    student, batch = classifier(3, seed=2), image_batch(6)
    whole = {n: write_teacher_cache(t, [batch], tmp_path / n, k=None) for n, t in teachers.items()}
    part = write_teacher_cache(teachers["b"], [batch], tmp_path / "part", k=3)
    deit = deit_student()
    for objective, learner in ((LogitKD(), student), (DeiTHard(), deit)):
        values = [
            Distillation(given, {"l": objective})(learner, batch).loss
            for given in (teachers, whole, {"a": teachers["a"], "b": whole["b"]})
        ]
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
        with pytest.raises(ValueError, match="'l' averages the logits of several teachers.*3 greatest of 10.*k=None"):
            Distillation({"a": whole["a"], "b": part}, {"l": objective})
    Distillation({"a": whole["a"], "b": part}, {"l": LogitKD(teacher="b")})(student, batch)
    with pytest.raises(ValueError, match="mean of several teachers' logits needs all 10"):
        held = part(pixel_values=batch["pixel_values"])
        mean_divergence(student(batch["pixel_values"]).logits, [held, held], LogitKD().divergence)


@pytest.mark.parametrize(
    "objective", [SqueezedHeads(), HiddenStates(), AttentionMSE(), PredictionMatching()], ids=lambda o: type(o).__name__
)
def test_objectives_that_need_more_are_refused_at_the_start(tmp_path, objective):
    cached = write_teacher_cache(classifier(4), [image_batch(2)], tmp_path / "c", k=None)
    with pytest.raises(ValueError, match=f"'it' \\({type(objective).__name__}\\) cannot learn from the teacher cache"):
        Distillation(cached, {"task": TaskLoss(), "it": objective})


def test_another_temperature(tmp_path):
    teacher, batch = classifier(4), image_batch(2)
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=3, temperatures=(1.0, 4.0))
    Distillation(cached, {"l": LogitKD(temperature=4.0)})
    with pytest.raises(ValueError, match=r"'l': temperature=2.0 is none of those .*\(1.0, 4.0\).*k=None"):
        Distillation(cached, {"l": LogitKD(temperature=2.0)})
    held = cached(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="temperature=2.0 is none"):
        mean_divergence(torch.zeros(2, 10), [held], LogitKD().divergence, temperature=2.0)


def test_students_of_another_vocabulary_are_refused(tmp_path):
    batch = token_batch([5], 5)
    cached = write_teacher_cache(language_model(4), [batch], tmp_path / "c", k=6)
    student = language_model(2, vocab_size=50)
    with pytest.raises(ValueError, match=r"student logits \(1, 5, 50\) and teacher logits \(1, 5, 40\) differ"):
        Distillation(cached, {"l": LogitKD()}, targets=next_token_targets)(student, batch)


# -- writing -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A teacher that counts its batches and may stop."""

    def __init__(self, model: nn.Module, most: int = 10**9) -> None:
        super().__init__()
        self.model, self.most, self.batches = model, most, 0

    def forward(self, **inputs):
        if self.batches == self.most:
            raise KeyboardInterrupt
        self.batches += 1
        return self.model(**inputs)


def image_batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [image_batch(4, seed) for seed in range(count)]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stopped_writing_goes_on(tmp_path):
    """Shards are kept, half ones are not, samples in them are not run again; the result is that of one go."""
    teacher, batches, folder = classifier(4), image_batches(5), tmp_path / "c"
    options = {"k": 3, "shard_bytes": 1}
    whole = write_teacher_cache(Counting(teacher), batches, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_cache(Counting(teacher, 3), batches, folder, **options)
    assert sorted(files(folder)) == ["begun.json", *(f"shard-0000{n}.safetensors" for n in range(3))]
    with pytest.raises(ValueError, match=r"holds no index.json, but 3 shards: writing was stopped.*goes on"):
        CachedTeacher(folder)
    # As a kill during a shard leaves it, and as a machine without power may.
    (folder / "shard-00009.safetensors.part").write_bytes(b"half")
    third = folder / "shard-00002.safetensors"
    third.write_bytes(third.read_bytes()[:-5])
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    again = Counting(teacher)
    cached = write_teacher_cache(again, batches, folder, **options)
    assert again.batches == 3, "the third batch, cut off, and the two that were never run"
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert not list(folder.glob("*.part")) and not (folder / "begun.json").exists()
    assert cached.samples == whole.samples == 20
    for batch in batches:
        mine, theirs = (c(pixel_values=batch["pixel_values"]) for c in (cached, whole))
        assert torch.equal(mine.values, theirs.values) and torch.equal(mine.rest, theirs.rest)
        assert torch.equal(mine.indices, theirs.indices)
    assert cached.mass_kept[1.0] == pytest.approx(whole.mass_kept[1.0])


def test_a_shard_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """Stopped before any renaming, nothing is left under its own name; and the next start goes on."""
    from pathlib import Path

    folder, replace = tmp_path / "c", Path.replace
    for left in ("begun.json.part", "shard-00000.safetensors.part", "index.json.part"):

        def stop(self, target, name=left):
            if self.name == name:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_teacher_cache(classifier(4), image_batches(1), folder, k=3)
        assert (folder / left).exists() and not (folder / left.removesuffix(".part")).exists()
    monkeypatch.undo()
    assert write_teacher_cache(classifier(4), image_batches(1), folder, k=3).samples == 4
    assert sorted(files(folder)) == ["index.json", "shard-00000.safetensors"]


def test_a_whole_cache_is_not_computed_again_and_grows(tmp_path):
    teacher, batches = Counting(classifier(4)), image_batches(3)
    write_teacher_cache(teacher, [*batches[:2], batches[0]], tmp_path / "c", k=3)
    assert teacher.batches == 2, "a sample that comes again is stored once"
    before = files(tmp_path / "c")
    write_teacher_cache(teacher, batches[:2], tmp_path / "c", k=3)
    assert teacher.batches == 2 and files(tmp_path / "c") == before
    mixed = torch.cat([batches[2]["pixel_values"][:1], batches[0]["pixel_values"][-1:]])
    grown = write_teacher_cache(teacher, [{"pixel_values": mixed}, *batches], tmp_path / "c", k=3)
    assert teacher.batches == 4 and grown.samples == 12, "of batches that are stored in part, what is not"
    expected = teacher.eval()(pixel_values=mixed).logits.topk(3).values
    torch.testing.assert_close(grown(pixel_values=mixed).values, expected)


@pytest.mark.parametrize("first", [torch.bfloat16, None])
def test_a_cache_knows_the_precision_that_its_teacher_ran_in(tmp_path, first):
    """Logits of mixed precision are no logits of float32, though they are stored so."""

    def write(dtype):
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            return write_teacher_cache(classifier(4), image_batches(1), tmp_path / "c", k=None, dtype=torch.float32)

    names = {torch.bfloat16: "bfloat16", None: "none"}
    other = torch.bfloat16 if first is None else None
    assert write(first).settings.compute == names[first]
    with pytest.raises(ValueError, match=rf"other settings \(compute {names[first]} there, {names[other]} now\)"):
        write(other)
    write(first)
    index = tmp_path / "c" / "index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "compute"}))
    assert CachedTeacher(tmp_path / "c").settings.compute == "unknown", "of an older version"


def test_one_process_writes_at_a_time(tmp_path):
    with (
        working_in(tmp_path / "c"),
        pytest.raises(ValueError, match=rf"another process works in {tmp_path / 'c'} \(pro"),
    ):
        write_teacher_cache(classifier(4), image_batches(1), tmp_path / "c", k=3)
    assert not (tmp_path / "c").exists(), "nothing was written"
    write_teacher_cache(classifier(4), image_batches(1), tmp_path / "c", k=3)


def test_what_lies_on_the_disk(tmp_path):
    """Shards of stated types, an index that states k, temperatures, mass, and no pickles."""
    cached = write_teacher_cache(classifier(4), image_batches(3), tmp_path / "c", k=3, shard_bytes=500)
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    assert (index["k"], index["vocabulary"], index["dtype"], index["temperatures"]) == (3, 10, "float32", [1.0])
    assert index["mass_kept"]["1.0"]["least"] <= index["mass_kept"]["1.0"]["mean"] < 1
    assert index["samples"] == sum(shard["samples"] for shard in index["shards"]) == 12
    shard = tmp_path / "c" / index["shards"][0]["file"]
    tensors = load_file(shard)
    assert {name: t.dtype for name, t in tensors.items()} == {
        "keys": torch.uint8, "lengths": torch.int64, "values": torch.float32, "indices": torch.uint16,
        "rest": torch.float32,
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"index.json", *(shard["file"] for shard in index["shards"])}
    assert cached.bytes == sum((tmp_path / "c" / s["file"]).stat().st_size for s in index["shards"])


def test_large_vocabularies(tmp_path):
    """Class numbers above 65,535 come back."""
    logits = torch.zeros(1, 2, 70_000)
    logits[0, 0, 69_999] = logits[0, 1, 65_536] = 9.0
    held = stored(tmp_path / "c", logits, k=1)
    assert held.indices.flatten().tolist() == [69_999, 65_536]


def gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    set_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, **changes))


def test_who_the_teacher_is(tmp_path):
    """Weights and configuration tell teachers apart; a saved copy is the same one."""
    teacher = gpt2()
    print_ = teacher_fingerprint(teacher)
    teacher.save_pretrained(tmp_path / "saved")
    assert teacher_fingerprint(GPT2LMHeadModel.from_pretrained(tmp_path / "saved")) == print_
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[0].ln_1.bias[3] += 1e-6
    assert teacher_fingerprint(other) != print_
    assert teacher_fingerprint(gpt2(layer_norm_epsilon=1e-3)) != print_

    batch = token_batch([5], 5)
    write_teacher_cache(teacher, [batch], tmp_path / "c", k=6)
    assert CachedTeacher(tmp_path / "c", teacher=teacher).samples == 1
    for wrong in (other, teacher_fingerprint(other)):
        with pytest.raises(ValueError, match="predictions of another teacher"):
            CachedTeacher(tmp_path / "c", teacher=wrong)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": 1}, "teacher "),
        ({"k": 5}, "k 6 there, 5 now"),
        ({"k": None}, "k 6 there, 40 now"),
        ({"dtype": torch.float16}, "dtype float32 there, float16 now"),
        ({"temperatures": (2.0,)}, r"temperatures \(1.0,\) there, \(2.0,\) now"),
    ],
)
def test_a_folder_holds_one_cache(tmp_path, changes, told):
    batch = token_batch([5], 5)
    write_teacher_cache(gpt2(), [batch], tmp_path / "c", k=6)
    before = files(tmp_path / "c")
    options = {"k": 6, **changes}
    teacher = gpt2(options.pop("teacher", 0))
    with pytest.raises(ValueError, match=f"another teacher or with other settings .*{told}"):
        write_teacher_cache(teacher, [batch], tmp_path / "c", **options)
    assert files(tmp_path / "c") == before


def test_a_damaged_cache_is_refused(tmp_path):
    batch = image_batch(4)
    write_teacher_cache(classifier(4), [batch], tmp_path / "c", k=3)
    shard = tmp_path / "c" / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="shard-00000.safetensors cannot be read"):
        CachedTeacher(tmp_path / "c")
    with pytest.raises(ValueError, match="holds no index.json. Call write_teacher_cache"):
        CachedTeacher(tmp_path / "nothing")


BATCH = {"input_ids": torch.arange(6).view(2, 3)}


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({"k": 0}, BATCH, "k=0: expected a whole number of at least 1"),
        ({"k": 41}, BATCH, "k=41: the teacher tells 40 classes apart"),
        ({"temperatures": (0.0,)}, BATCH, "expected at least one positive number"),
        ({"temperatures": ()}, BATCH, "expected at least one positive number"),
        ({"dtype": torch.int8}, BATCH, "expected a type of floating-point"),
        ({}, {**BATCH, "attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "sample 0 has a gap"),
        ({}, {**BATCH, "attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask \(2, 1, 3, 3\).*expects \(B, N\)"),
        ({}, {**BATCH, "mode": "fast"}, "input 'mode' is str fast"),
        ({}, {**BATCH, "token_type_ids": torch.zeros(1, 3)}, "expected tensors of one batch"),
        ({}, {"labels": torch.zeros(2)}, "inputs of no samples"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, options, batch, message):
    with pytest.raises(ValueError, match=message):
        write_teacher_cache(gpt2(), [batch], tmp_path / "c", **{"k": 5, **options})
    assert not (tmp_path / "c").exists()


def test_more_mistakes(tmp_path):
    with pytest.raises(ValueError, match="no batch to write"):
        write_teacher_cache(gpt2(), [], tmp_path / "c", k=5)
    bad = random_logits()[0]
    bad[0, 3, 4] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        stored(tmp_path / "c", bad, k=5)
    with pytest.raises(ValueError, match=r"gave logits \(1, 2, 2, 40\) for 1 samples"):
        stored(tmp_path / "c", torch.zeros(1, 2, 2, 40), k=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        write_teacher_cache(gpt2(), [BATCH], tmp_path / "file", k=5)
    cached = write_teacher_cache(gpt2(), [BATCH], tmp_path / "c", k=5)
    with pytest.raises(ValueError, match="input 'output_hidden_states' is bool True.*logits alone"):
        cached(**BATCH, output_hidden_states=True)


def test_long_samples_are_looked_through_in_parts(tmp_path, monkeypatch):
    taught = random_logits()[0]
    once = stored(tmp_path / "a", taught, k=5)
    monkeypatch.setattr(writing, "WORK_BYTES", 2 * VOCABULARY * 4)
    parts = stored(tmp_path / "b", taught, k=5)
    assert torch.equal(once.values, parts.values) and torch.equal(once.rest, parts.rest)


def test_the_teacher_is_left_as_it_was(tmp_path):
    """In training mode with dropout: it is run without, and is in training mode again."""
    teacher, batch = gpt2(), token_batch([5], 5)
    batch.pop("position_ids")
    teacher.train()
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=None)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    logits = teacher.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(cached(**batch).values, logits)


# -- training ----------------------------------------------------------------------------------------------------------


def trained(teacher, data, folder, temperature: float = 2.0) -> SqueezeTrainer:
    trainer = SqueezeTrainer(
        model=classifier(3, seed=1),
        teacher=teacher,
        args=TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, report_to="none", seed=3,
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        ),
        objectives={"task": TaskLoss(0.5), "logits": LogitKD(0.5, temperature=temperature)},
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_training_from_a_cache_is_training_from_the_teacher(tmp_path):
    """All logits: the same losses and final weights, bit for bit, over two shuffled epochs. Few logits: others, but
    near."""
    teacher, data = classifier(4), images(16)
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    # As the trainer collates them: the teacher's last bits may depend on how many samples it sees at once.
    batches = [
        {"pixel_values": torch.stack([s["pixel_values"] for s in data[i : i + 4]])} for i in range(0, len(data), 4)
    ]
    caches = {k: write_teacher_cache(teacher, batches, tmp_path / str(k), k=k, temperatures=(2.0,)) for k in (10, 4)}
    live, whole, part = (trained(t, data, tmp_path / "run") for t in (teacher, caches[10], caches[4]))
    logged = [[e["logits"] for e in t.state.log_history if "logits" in e] for t in (live, whole, part)]
    assert logged[0] == logged[1] and len(logged[0]) == 8
    weights = [dict(t.model.named_parameters()) for t in (live, whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert logged[2] != logged[0]
    assert "parameters" not in repr(caches[4]) and not list(caches[4].parameters())


def test_a_trainer_with_mixed_precision(tmp_path):
    """accelerate wraps the teacher's forward pass; what it returns comes through."""
    teacher, data = classifier(4), images(4)
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in data])}
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=4)
    trainer = SqueezeTrainer(
        model=classifier(3, seed=1), teacher=cached, objectives={"logits": LogitKD()}, train_dataset=data,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=1, report_to="none",
            bf16=True, use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        ),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["logits"] > 0


def test_a_sample_that_is_not_there_stops_the_training(tmp_path):
    teacher, data = classifier(4), images(8)
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in data[:7]])}
    cached = write_teacher_cache(teacher, [batch], tmp_path / "c", k=4, temperatures=(2.0,))
    with pytest.raises(ValueError, match="1 of 4 samples of a batch are not in the teacher cache"):
        trained(cached, data, tmp_path / "run")


def test_gradients_of_parts_of_a_padded_batch(tmp_path):
    """A causal language model: samples in another order and with other padding than they were written with."""
    teacher, student = sharp(language_model(4)), language_model(2, seed=1)
    written, batch = token_batch([7, 5, 3], 8), token_batch([7, 5, 3], 10)
    cached = write_teacher_cache(teacher, [written], tmp_path / "c", k=None)
    turned = {name: value.flip(0) for name, value in batch.items()}
    live, off = (losses(t, LogitKD(), student, turned) for t in (teacher, cached))
    torch.testing.assert_close(off[0], live[0])
    for name, gradient in live[1].items():
        torch.testing.assert_close(off[1][name], gradient, msg=name)


def test_format_of_another_version_is_refused(tmp_path):
    write_teacher_cache(classifier(4), [image_batch(2)], tmp_path / "c", k=3)
    index = tmp_path / "c" / shards.INDEX
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99 of teacher caches, expected 1"):
        CachedTeacher(tmp_path / "c")


def test_pad_is_no_part_of_inputs_embeds(tmp_path):
    teacher = gpt2()
    embeds = teacher.transformer.wte(torch.arange(6).view(1, 6)).detach()
    mask = torch.ones(1, 6, dtype=torch.long)
    cached = write_teacher_cache(teacher, [{"inputs_embeds": embeds, "attention_mask": mask}], tmp_path / "c", k=4)
    padded = {"inputs_embeds": pad(embeds, (0, 0, 0, 2), value=7.0), "attention_mask": pad(mask, (0, 2))}
    found = cached(**padded)
    assert found.shape == (1, 8, 40) and int(found.known.sum()) == 6
