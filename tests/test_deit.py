"""DeiT's distillation through the distillation token, and the task loss with labels that are probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, set_seed

from squeezeheads import DeiTHard, DeiTSoft, Distillation, LogitKD, SqueezedHeads, TaskLoss
from squeezeheads.cli import main
from squeezeheads.recording import RecordingError
from squeezeheads.tasks.augmentation import smoothed
from test_cli import recipe  # noqa: F401 (a fixture)
from tiny import classifier, deit_student, image_batch


def cnn(num_labels: int = 10) -> ResNetForImageClassification:
    set_seed(1)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=num_labels)
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("make", [lambda: classifier(6, seed=1), cnn], ids=["ViT", "CNN"])
def test_values_and_gradients_are_deits(make):
    """By the definitions, all in float64: the soft loss is so small that float32 rounds it by more than 1e-5."""
    teacher, student, batch = make().double().eval(), deit_student().double().eval(), image_batch(6)
    batch["pixel_values"] = batch["pixel_values"].double()
    tau = 3.0
    objectives = {"task": TaskLoss(0.5), "hard": DeiTHard(0.5), "soft": DeiTSoft(0.3, temperature=tau)}
    out = Distillation(teacher, objectives)(student, batch)
    with torch.no_grad():
        taught = teacher(pixel_values=batch["pixel_values"]).logits
    own = student(pixel_values=batch["pixel_values"])
    by_class, by_teacher = own.cls_logits, own.distillation_logits
    expected = {"task": 0.0, "hard": 0.0, "soft": 0.0}
    for i in range(6):
        log_student, log_soft = by_teacher[i].log_softmax(-1), (by_teacher[i] / tau).log_softmax(-1)
        p = (taught[i] / tau).softmax(-1)
        expected["task"] -= by_class[i].log_softmax(-1)[batch["labels"][i]] / 6
        expected["hard"] -= log_student[taught[i].argmax()] / 6
        expected["soft"] += (p * (p.log() - log_soft)).sum() / (6 * 10)
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name].double(), value.detach(), rtol=1e-10, atol=1e-13, msg=name)
    total = 0.5 * expected["task"] + 0.5 * expected["hard"] + 0.3 * tau**2 * expected["soft"]
    torch.testing.assert_close(out.loss.double(), total, rtol=1e-10, atol=1e-13)
    parameters = list(student.parameters())
    found = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(total, parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("objective", [DeiTHard(), DeiTSoft()])
def test_each_head_learns_from_its_own(objective):
    """The teacher's terms leave the class head alone, the task leaves the distillation head alone."""
    student, batch = deit_student(), image_batch(4)
    Distillation(cnn(), {"distillation": objective})(student, batch).loss.backward()
    assert student.cls_classifier.weight.grad is None
    assert student.distillation_classifier.weight.grad.abs().sum() > 0
    student.zero_grad()
    Distillation(None, {"task": TaskLoss()})(student, batch).loss.backward()
    assert student.distillation_classifier.weight.grad is None and student.cls_classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", [DeiTHard(), DeiTSoft(temperature=2.0)])
def test_parts_of_a_batch_add_up(objective):
    teacher, batch = classifier(6, seed=1).eval(), image_batch(7)
    found = []
    for sizes in ([7], [2, 4, 1]):
        student = deit_student().eval()
        distillation = Distillation(teacher, {"d": objective})
        distillation.prepare(student, [batch])
        counts = distillation.count(batch)
        parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
        loss = sum(distillation(student, dict(zip(batch, part, strict=True)), counts=counts).loss for part in parts)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-8)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", [DeiTHard(), DeiTSoft()])
def test_predictions_that_do_not_count_leave_no_trace(objective):
    teacher, student, batch = classifier(6, seed=1).eval(), deit_student().eval(), image_batch(5)
    some = {**batch, "labels": batch["labels"].clone()}
    some["labels"][[1, 4]] = -100
    few = {key: value[[0, 2, 3]] for key, value in batch.items()}
    values = [Distillation(teacher, {"d": objective})(student, b).loss for b in (some, few)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-8)
    none = {**batch, "labels": torch.full((5,), -100)}
    assert Distillation(teacher, {"d": objective})(student, none).loss == 0


def test_hard_labels_of_several_teachers_are_those_of_their_mean():
    teachers = {name: classifier(6, seed=seed).eval() for name, seed in (("a", 1), ("b", 2))}
    student, batch = deit_student().eval(), image_batch(8)
    with torch.no_grad():
        decided = sum(t(pixel_values=batch["pixel_values"]).logits for t in teachers.values()).argmax(-1)
        expected = F.cross_entropy(student(pixel_values=batch["pixel_values"]).distillation_logits, decided)
    out = Distillation(teachers, {"hard": DeiTHard()})(student, batch)
    torch.testing.assert_close(out.loss.detach(), expected)


def test_units_are_said():
    assert DeiTSoft().unit == "nats per prediction and class" and DeiTHard().unit == "nats per prediction"
    teacher, student, batch = classifier(6, seed=1).eval(), deit_student(num_hidden_layers=1).eval(), image_batch(4)
    with torch.no_grad():
        logits = student(pixel_values=batch["pixel_values"]).distillation_logits
    soft = Distillation(teacher, {"d": DeiTSoft()})(student, batch).terms["d"]
    plain = Distillation(teacher, {"d": LogitKD()})(lambda_student(logits), batch).terms["d"]
    torch.testing.assert_close(soft * 10, plain)


def lambda_student(logits):
    class Fixed(torch.nn.Module):
        def forward(self, **_):
            return {"logits": logits}

    return Fixed()


def test_mistakes_are_named():
    batch = image_batch(3)
    with pytest.raises(TypeError, match="DeiTForImageClassificationWithTeacher"):
        Distillation(classifier(6), {"hard": DeiTHard()})(classifier(3), batch)
    with pytest.raises(ValueError, match=r"\(3, 10\) and teacher logits \(3, 7\)"):
        Distillation(cnn(7), {"hard": DeiTHard()})(deit_student(), batch)
    with pytest.raises(RecordingError):
        Distillation(cnn(), {"attention": SqueezedHeads()})(deit_student(), batch)


def test_a_cnn_teacher_beside_one_with_attention():
    """Logits from one, attention from the other: the CNN is never recorded."""
    teachers = {"cnn": cnn(), "vit": classifier(6, seed=1)}
    objectives = {"hard": DeiTHard(teacher="cnn"), "attention": SqueezedHeads(teacher="vit", calibration_batches=1)}
    out = Distillation(teachers, objectives)(deit_student(), image_batch(3))
    assert out.terms["attention"] > 0 and out.terms["hard"] > 0


def test_the_student_is_a_plain_checkpoint_that_averages_its_heads(tmp_path):
    student = deit_student().eval()
    student.save_pretrained(tmp_path)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    out = opened(pixel_values=image_batch(2)["pixel_values"])
    torch.testing.assert_close(out.logits, (out.cls_logits + out.distillation_logits) / 2)


@pytest.mark.parametrize("make", [lambda: classifier(3), deit_student], ids=["one head", "two heads"])
def test_task_loss_with_probabilities_is_soft_cross_entropy(make):
    student, batch = make().eval(), image_batch(5)
    labels = batch.pop("labels")
    q = 0.7 * smoothed(labels, 10, 0.1) + 0.3 * smoothed(labels.flip(0), 10, 0.1)
    out = Distillation(classifier(6, seed=1), {"task": TaskLoss(), "logits": LogitKD()})(
        student, {**batch, "label_probabilities": q}
    )
    own = student(**batch)
    logits = (own.cls_logits if "cls_logits" in own else own.logits).double()
    expected = -(q.double() * logits.log_softmax(-1)).sum() / 5
    torch.testing.assert_close(out.terms["task"].double(), expected.detach(), rtol=1e-6, atol=0)
    assert out.counts["task"] == out.counts["logits"] == 5
    found = torch.autograd.grad(
        Distillation(None, {"task": TaskLoss()})(student, {**batch, "label_probabilities": q}).loss,
        list(student.parameters()),
        allow_unused=True,
    )
    wanted = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_probabilities_of_another_shape_are_named():
    batch = {"pixel_values": image_batch(3)["pixel_values"], "label_probabilities": torch.full((3, 7), 1 / 7)}
    with pytest.raises(ValueError, match=r"\(3, 7\) do not fit the student's logits \(3, 10\)"):
        Distillation(None, {"task": TaskLoss()})(classifier(3), batch)


def test_a_run_with_a_cnn_teacher(recipe, tmp_path):  # noqa: F811
    """As docs/image-classification.md has it: a pretrained CNN, a student with a distillation head, mixed labels."""
    cnn().save_pretrained(tmp_path / "cnn")
    student = {
        "model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"], "hidden_size": 24,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "patch_size": 4,
    }  # fmt: skip
    path = recipe(
        teacher={"path": str(tmp_path / "cnn"), "attn_implementation": "eager"},
        student={"config": student},
        objectives={"task": {"weight": 0.5}, "deit_hard": {"weight": 0.5}},
        baselines={},
        task__image_classification__augmentation={"mixup": 0.8, "label_smoothing": 0.1},
        seeds=[0],
    )
    assert main(["distill", path]) == 0
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert type(opened).__name__ == "DeiTForImageClassificationWithTeacher" and opened.config.num_labels == 10
