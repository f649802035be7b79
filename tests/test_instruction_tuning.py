"""Instruction tuning: what is read, how it is written out, which tokens count, what is sampled and how it is scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from benchmarks import wordnet
from benchmarks.assets import AssetError
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer, LlamaConfig

from squeezeheads import Distillation, LogitKD, SqueezedHeads, TaskLoss, attention_divergence, record_attention
from squeezeheads.batches import evaluating, padding_rows
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation.responses import exact_match, rouge_l, sample_responses
from squeezeheads.recipe import load_recipe
from squeezeheads.tasks.base import Pretrained
from squeezeheads.tasks.instruction_tuning import InstructionTuning
from squeezeheads.tasks.instructions import read_requests
from squeezeheads.tasks.tokenization import train_byte_bpe
from tiny import language_model

NEW = Pretrained(teachers={"teacher": None})
BYTES = 257  # vocabulary of plain bytes and the end token

DOLLY = {"instruction": "Name a colour.", "context": "", "response": "Blue", "category": "open_qa"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": ["3", "three"]}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Bye"},
    ]
}
EMPTY = {"instruction": "Say nothing.", "output": ""}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def jsonl(tmp_path):
    def write(*items, name="data") -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(item)}\n" for item in items))
        return str(path)

    return write


@pytest.fixture
def chat_tokenizer(tmp_path):
    """The folder of a byte tokenizer with a chat template that ends turns by the end token and a line break."""
    tokenizer = train_byte_bpe([], BYTES)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def task_of(train: str, **options) -> InstructionTuning:
    """A task whose three splits hold what ``train`` holds, but that other splits' requests begin with another letter:
    the same request may not be on two sides."""
    copies = [str(Path(train).with_name(f"{part}.jsonl")) for part in ("validation", "test")]
    for copy in copies:
        items = [json.loads(line) for line in Path(train).read_text().splitlines()]
        for item in items:
            holder, key = (item, "instruction") if "instruction" in item else (item["messages"][0], "content")
            holder[key] = Path(copy).name[0] + holder[key][1:]
        Path(copy).write_text("".join(f"{json.dumps(item)}\n" for item in items))
    small = {"vocabulary_size": BYTES, "max_new_tokens": 6, "generation_seeds": [1, 2]}
    return InstructionTuning(train=[train], validation=copies[:1], test=copies[1:], **{**small, **options})


def loaded(train: str, pretrained: Pretrained = NEW, **options):
    task = task_of(train, **options)
    return task, task.load_data(pretrained)


def text(task, ids) -> str:
    return task._tokenizer.decode(ids)


def model_of(task, heads=2, seed=0, **changes):
    return language_model(heads, seed=seed, **task.data_config(), **changes).eval()


# Reading and writing out


def test_the_alpaca_form_is_pinned(jsonl):
    task, splits = loaded(jsonl(DOLLY, ALPACA))
    assert [text(task, s["input_ids"]) for s in splits.train] == [
        "Answer the request below.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue<|endoftext|>",
        "Answer the request below. The input belongs to it.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n3<|endoftext|>",
    ]
    assert [s["references"] for s in splits.test] == [["Blue"], ["3", "three"]]


def test_the_chat_template_is_the_tokenizers_and_ends_at_the_end_token(jsonl, chat_tokenizer):
    task, splits = loaded(jsonl(CHAT, ALPACA), tokenizer=chat_tokenizer)
    assert [text(task, s["input_ids"]) for s in splits.train] == [
        "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>Hello<|end|>\n<|user|>Bye?<|end|>\n"
        "<|assistant|>Bye<|end|>",
        "<|user|>Add.\n\n1 and 2<|end|>\n<|assistant|>3<|end|>",
    ]
    # The last response alone is learned.
    assert [text(task, [t for t in s["labels"] if t != -100]) for s in splits.train] == ["Bye<|end|>", "3<|end|>"]


def test_a_template_whose_turns_end_otherwise_still_gets_the_end_token(jsonl, chat_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "<|stop|>")
    tokenizer.save_pretrained(chat_tokenizer)
    task, splits = loaded(jsonl(ALPACA), tokenizer=chat_tokenizer)
    assert text(task, [t for t in splits.train[0]["labels"] if t != -100]) == "3<|stop|>\n<|end|>"


def test_alpaca_form_on_request_even_with_a_chat_template(jsonl, chat_tokenizer):
    task, splits = loaded(jsonl(DOLLY), tokenizer=chat_tokenizer, format="alpaca")
    assert text(task, splits.train[0]["input_ids"]).endswith("### Response:\nBlue<|end|>")


def test_a_chat_of_one_request_fits_the_alpaca_form(jsonl):
    single = {"messages": [{"role": "user", "content": "Hi {x}"}, {"role": "assistant", "content": "Hello"}]}
    task, splits = loaded(jsonl(single))
    assert "### Instruction:\nHi {x}\n\n### Response:\nHello" in text(task, splits.train[0]["input_ids"])


@pytest.mark.parametrize("with_beginning", (False, True))
def test_labels_stand_on_the_response_and_its_end_alone(jsonl, tmp_path, with_beginning):
    tokenizer = train_byte_bpe([], BYTES)
    if with_beginning:  # LLaMA's kind: a special token before each text, and here one behind it too
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        ends = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "<|endoftext|>")]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ends)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    task, splits = loaded(jsonl(DOLLY), tokenizer=str(tmp_path / "tokenizer"))
    (sample,) = splits.train
    response = len("Blue") + 1  # bytes and the end token
    assert sample["labels"][-response:] == sample["input_ids"][-response:]
    assert set(sample["labels"][:-response]) == {-100}
    assert len(sample["labels"]) == len(sample["input_ids"]) == sample["prompt_length"] + response
    assert sample["input_ids"][-1] == task._tokenizer.eos_token_id
    assert sample["input_ids"].count(task._tokenizer.eos_token_id) == 1
    assert text(task, sample["input_ids"]).startswith("<s>Answer" if with_beginning else "Answer")


def test_special_tokens_spelled_out_in_the_data_are_only_text(jsonl):
    task, splits = loaded(jsonl({"instruction": "Repeat <|endoftext|>", "output": "<|endoftext|> it is"}))
    assert splits.train[0]["input_ids"].count(task._tokenizer.eos_token_id) == 1


# Limits


def test_longer_prompts_are_left_out_everywhere_and_counted(jsonl):
    long = {"instruction": "x" * 200, "output": "y"}
    task = task_of(jsonl(DOLLY, long, ALPACA, EMPTY), max_prompt_length=150, max_length=160)
    splits = task.load_data(NEW)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [2, 2, 2]
    names, long_one = ("train", "validation", "test"), "their prompts are longer than max_prompt_length=150 tokens"
    assert splits.notices == [
        *(f"{split}: of 4 requests 1 left out, they have no response." for split in names),
        *(f"{split}: of 3 requests 1 left out, {long_one}." for split in names),
    ]


def test_nothing_to_report_is_not_reported(jsonl):
    assert task_of(jsonl(DOLLY, ALPACA)).load_data(NEW).notices == []


def test_long_responses_are_cut_and_then_have_no_end(jsonl):
    task = task_of(jsonl({"instruction": "Say y.", "output": "y" * 300}), max_length=120, max_prompt_length=100)
    splits = task.load_data(NEW)
    assert splits.notices[0] == "train: of 1 requests 1 have responses that are cut at max_length=120 tokens."
    (sample,) = splits.train
    assert len(sample["input_ids"]) == len(sample["labels"]) == 120
    assert task._tokenizer.eos_token_id not in sample["input_ids"]


def test_the_limit_itself_is_within(jsonl):
    _, splits = loaded(jsonl(DOLLY))
    length = splits.train[0]["prompt_length"]
    _, same = loaded(jsonl(DOLLY), max_prompt_length=length, max_length=length + 5)
    assert same.train == splits.train
    with pytest.raises(RecipeError, match=rf"all 1 prompts.*={length - 1} tokens, the shortest has {length}"):
        task_of(jsonl(DOLLY), max_prompt_length=length - 1).load_data(NEW)


def test_a_response_is_the_first_that_is_not_blank_and_those_without_are_left_out(jsonl):
    blanks = {"instruction": "a", "output": ["", " \n", "the cat", "", "a cat"]}
    task, splits = loaded(jsonl(blanks, {"instruction": "b", "output": ["", " "]}, DOLLY))
    learned = [text(task, [t for t in s["labels"] if t != -100]) for s in splits.train]
    assert learned == ["the cat<|endoftext|>", "Blue<|endoftext|>"]
    assert [s["references"] for s in splits.test] == [["the cat", "a cat"], ["Blue"]]
    told = [notice for notice in splits.notices if notice.startswith("test")]
    assert told == ["test: of 3 requests 1 left out, they have no response."]


def test_the_same_request_is_never_on_two_sides(jsonl):
    """Left out of train, not of what is reported; the same words as input and as context are the same request."""
    dolly = {**DOLLY, "response": "Red"}
    other = {"instruction": "Add.", "context": "1 and 2", "response": "III"}
    last = {**ALPACA, "input": ""}
    files = {
        "train": jsonl(DOLLY, ALPACA, DOLLY, last, name="train"),
        "validation": jsonl(other, dolly, name="validation"),
        "test": jsonl(dolly, name="test"),
    }
    task = InstructionTuning(**{name: [file] for name, file in files.items()}, vocabulary_size=BYTES)
    splits = task.load_data(NEW)
    assert [s["references"] for s in splits.test] == [["Red"]]
    assert [s["references"] for s in splits.validation] == [["III"]]
    assert [text(task, s["input_ids"]) for s in splits.train] == [
        "Answer the request below.\n\n### Instruction:\nAdd.\n\n### Response:\n3<|endoftext|>"
    ]
    assert splits.notices == [
        "validation: of 2 requests 1 left out, they are in test too.",
        "train: of 4 requests 3 left out, they are in validation or test too.",
    ]
    covered = InstructionTuning(train=[files["train"]], test=[jsonl(last, DOLLY, ALPACA, name="all")])
    with pytest.raises(RecipeError, match="train: all its requests are in test too"):
        covered.load_data(NEW)


def test_one_file_on_two_sides_is_refused_by_whatever_name(jsonl, tmp_path, monkeypatch):
    path = Path(jsonl(DOLLY, ALPACA, name="one"))
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    for train, test in (("one.jsonl", "./one.jsonl"), (str(path), "x/../one.jsonl")):
        with pytest.raises(ValueError, match=r"one\.jsonl is named twice"):
            InstructionTuning(train=[train], test=[test])
    with pytest.raises(RecipeError, match=r"one\.jsonl is in both train and test"):
        InstructionTuning(train=["*.jsonl"], test=["one.jsonl"]).load_data(NEW)
    (tmp_path / "x" / "copy.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match=r"one\.jsonl in train and .*copy\.jsonl in validation are copies"):
        InstructionTuning(train=["one.jsonl"], validation=["x"]).load_data(NEW)


def test_folders_and_globs_of_requests(jsonl, tmp_path):
    for index in range(4):
        file = Path(jsonl({"instruction": f"Say {index}.", "output": f"{index}"}, name=f"f{index}"))
        target = tmp_path / ("a/deep" if index % 2 else "a") / f"{index}{'.ndjson' if index == 3 else '.jsonl'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    (tmp_path / "a" / "notes.txt").write_text("no requests")
    other = jsonl({"instruction": "Other.", "output": "other"}, name="other")
    small = {"vocabulary_size": BYTES, "test": [other], "validation_share": 0.25}
    for source, expected in ((tmp_path / "a", "0123"), (tmp_path / "a" / "*.jsonl", "02")):
        splits = InstructionTuning(train=[str(source)], **small).load_data(NEW)
        found = {r for part in (splits.train, splits.validation) for s in part for r in s["references"]}
        assert found == set(expected)
    with pytest.raises(RecipeError, match=r"gone\.jsonl is not there: expected a JSONL file, a folder, a glob\."):
        InstructionTuning(train=["gone.jsonl"]).load_data(NEW)
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"train: .*alpaca\.json is JSON, .*load_dataset\('json', .*to_json"):
        InstructionTuning(train=[str(tmp_path / "alpaca.json")]).load_data(NEW)


def test_held_out_requests_are_apart_and_the_same_for_every_tokenizer(jsonl):
    items = [{"instruction": f"Say {i // 2}.", "output": f"{i}"} for i in range(60)]  # each request twice
    path = jsonl(*items)
    small = {"validation_share": 0.2, "test_share": 0.1, "vocabulary_size": BYTES}
    task = InstructionTuning(train=[path], **small)
    splits = task.load_data(NEW)
    parts = {
        name: {text(task, s["input_ids"][: s["prompt_length"]]) for s in getattr(splits, name)}
        for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {"train": 21, "validation": 6, "test": 3}
    assert len(set().union(*parts.values())) == 30
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [42, 12, 6]
    other = InstructionTuning(train=[path], **{**small, "vocabulary_size": 280})
    assert [s["references"] for s in other.load_data(NEW).test] == [s["references"] for s in splits.test]
    third = InstructionTuning(train=[path], **small, split_seed=1)
    assert [s["references"] for s in third.load_data(NEW).test] != [s["references"] for s in splits.test]


# What is learned from


def test_rows_and_targets_are_those_that_predict_a_response_token(jsonl):
    task, splits = loaded(jsonl(DOLLY, ALPACA))
    batch = task.collate(splits.train)
    lengths = [len(s["input_ids"]) for s in splits.train]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == (2, max(lengths))
    expected = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, sample in enumerate(splits.train):
        expected[row, sample["prompt_length"] - 1 : len(sample["input_ids"]) - 1] = True
    assert torch.equal(task.rows(batch), expected)
    assert torch.equal(task.targets(batch), expected)


def distil(task, batch):
    teacher, student = model_of(task, heads=4, seed=1), model_of(task, heads=2)
    objectives = {"task": TaskLoss(0.5), "logits": LogitKD(0.5), "attention": SqueezedHeads()}
    distillation = Distillation(teacher, objectives, rows=task.rows, targets=task.targets, loss_takes_count=True)
    out = distillation(student, batch)
    out.loss.backward()
    return out, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beside", ([], [ALPACA]), ids=("alone", "in company"))
def test_a_sample_without_response_gives_finite_losses_and_no_part_of_the_gradient(jsonl, beside):
    """The task leaves such samples out; a loop of one's own may have them."""
    task, splits = loaded(jsonl(DOLLY, ALPACA))
    dolly, alpaca = splits.train
    prompt = dolly["input_ids"][: dolly["prompt_length"]]
    empty = {**dolly, "input_ids": prompt, "labels": [-100] * len(prompt)}
    company = [alpaca] if beside else []
    out, gradients = distil(task, task.collate([empty, *company]))
    assert torch.isfinite(out.loss) and all(torch.isfinite(v) for v in out.terms.values())
    assert all(torch.isfinite(g).all() for g in gradients.values())
    if company:
        without, expected = distil(task, task.collate(company))
        for name, value in without.terms.items():
            torch.testing.assert_close(out.terms[name], value, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    else:
        assert out.loss == 0 and all(not g.any() for g in gradients.values())


def test_padding_to_a_longer_batch_changes_nothing(jsonl):
    task, splits = loaded(jsonl(DOLLY, {"instruction": "z" * 60, "output": "y"}))
    other = {**splits.train[1], "labels": [-100] * len(splits.train[1]["labels"])}  # longer, and counts nowhere
    alone, _ = distil(task, task.collate(splits.train[:1]))
    padded, _ = distil(task, task.collate([splits.train[0], other]))
    for name, value in alone.terms.items():
        torch.testing.assert_close(padded.terms[name], value, rtol=1e-5, atol=1e-6)


def test_masked_prompt_tokens_do_not_matter_for_attention_rows(jsonl):
    task, splits = loaded(jsonl(DOLLY))
    batch = task.collate(splits.train)
    prompt = splits.train[0]["prompt_length"]
    # All but the last: that one asks for the first response token, it is a row itself.
    batch["attention_mask"][:, : prompt - 1] = 0
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, : prompt - 1] = torch.randint(1, BYTES, (1, prompt - 1))
    assert torch.equal(task.rows(batch), task.rows(changed))
    teacher, student = model_of(task, heads=2, seed=1), model_of(task, heads=2)

    def divergence(inputs, rows):
        ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(**ids)
        with torch.no_grad(), record_attention(student) as learned:
            student(**ids)
        mix = torch.eye(2).expand(1, 2, 2)
        return attention_divergence(learned[1], taught[1], mix, rows=rows)

    torch.testing.assert_close(divergence(batch, task.rows(batch)), divergence(changed, task.rows(changed)))
    # The check can fail: prompt rows see the change.
    everywhere = torch.ones_like(padding_rows(batch))
    visible = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in (batch, changed)]
    assert not torch.allclose(divergence(visible[0], everywhere), divergence(visible[1], everywhere))


def test_score_is_the_mean_over_all_response_tokens(jsonl):
    task, splits = loaded(jsonl(DOLLY, ALPACA, {"instruction": "Long?", "output": "yes, much longer"}))
    model = model_of(task, attention_dropout=0.5).train()
    found = task.score(model, splits.test, batch_size=3)["loss"]
    assert model.training
    total, count = 0.0, 0
    for sample in splits.test:
        with torch.no_grad(), evaluating(model):
            logp = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        for position in range(sample["prompt_length"], len(sample["input_ids"])):
            total -= logp[position - 1, sample["input_ids"][position]].item()
            count += 1
    assert count == 5 + 2 + 17
    assert found == pytest.approx(total / count, rel=1e-5)


# Sampled responses


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7]]


def sample(model, prompts=PROMPTS, **options):
    return sample_responses(model, prompts, **{"eos_token_id": 2, "max_new_tokens": 12, "seed": 3, **options})


def test_the_same_seed_draws_the_same_and_another_one_others():
    model = language_model(2)
    first = sample(model)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert sample(model) == first
    assert torch.equal(torch.get_rng_state(), state), "the global stream is not touched"
    assert sample(model, seed=4) != first
    assert first[0] != first[3], "a prompt that is asked twice is answered twice"


def test_responses_depend_neither_on_batches_nor_on_order():
    model = language_model(2)
    first = sample(model, batch_size=4)
    assert sample(model, batch_size=1) == first
    assert sample(model, PROMPTS[:3], batch_size=2) == first[:3]
    assert sample(model, [PROMPTS[2], PROMPTS[1]]) == [first[2], first[1]]


def test_draws_follow_the_models_whole_distribution():
    """Frequencies of the first new token against the model's probabilities: χ² over 40 tokens, 4,000 draws."""
    model = language_model(2).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # away from uniform
        # What a checkpoint may ask for must not shape it.
        model.generation_config.update(top_k=2, repetition_penalty=5.0, do_sample=True, temperature=0.1)
        probability = (model(torch.tensor([[5, 6]])).logits[0, -1] / 1.5).softmax(-1)
    drawn = sample(model, [[5, 6]] * 4000, max_new_tokens=1, temperature=1.5, batch_size=4000)
    counts = torch.bincount(torch.tensor([r[0] if r else 2 for r in drawn]), minlength=40).float()
    chi2 = ((counts - 4000 * probability) ** 2 / (4000 * probability)).sum()
    assert chi2 < 85, "39 degrees of freedom: above 85 once in 30,000 times, and the draws are fixed"
    assert model.generation_config.top_k == 2, "the model's own configuration is back"


def test_a_response_ends_before_its_end_token_and_the_model_keeps_its_mode():
    model = language_model(2).train()
    model.model.layers[0].eval()
    longest = sample(model, max_new_tokens=40)
    assert model.training and not model.model.layers[0].training
    assert all(2 not in response and len(response) <= 40 for response in longest)
    ended = next(r for r in longest if len(r) > 3)
    stop = ended[3]
    cut = ended.index(stop)
    again = sample(model, max_new_tokens=40, eos_token_id=stop)
    assert again[longest.index(ended)] == ended[:cut]
    model.generation_config.eos_token_id = [2, stop]
    assert sample(model, max_new_tokens=40)[longest.index(ended)] == ended[:cut], "the model's own ends count too"


def test_a_model_that_has_diverged_is_named_before_it_is_sampled_from():
    model = language_model(2)
    model.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(RecipeError, match="probabilities are not finite.*diverged"):
        sample(model)


def test_rouge_l_is_that_of_rouge_score_with_the_best_reference():
    predictions = ["The cats were running home", "blue", "", "nothing alike"]
    references = [["dogs bark", "The cat was running", "a cat"], ["Blue."], ["x"], ["y z", "z"]]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in targets)
        for p, targets in zip(predictions, references, strict=True)
    ]
    assert rouge_l(predictions, references) == pytest.approx(expected)
    # By hand: "the cat were run home" and "the cat wa run" share the, cat, run: P 3/5, R 3/4, F1 2/3.
    assert expected == pytest.approx([200 / 3, 100, 0, 0])


def test_exact_match_leaves_case_punctuation_and_spacing_aside():
    predictions = ["Blue !", "the  cat", "cat", "1.5"]
    assert exact_match(predictions, [["red", "blue"], ["The cat."], ["the cat"], ["2"]]) == [100, 100, 0, 0]


def test_measure_keeps_every_seed(jsonl, monkeypatch):
    scored = []
    monkeypatch.setattr(
        "squeezeheads.tasks.instruction_tuning.rouge_l", lambda p, r: scored.append((list(p), r)) or rouge_l(p, r)
    )
    third = {"instruction": "Not asked.", "output": "x"}
    task, splits = loaded(jsonl(DOLLY, ALPACA, third), generation_samples=2, generation_seeds=[7, 8, 9])
    model = model_of(task)
    found = task.measure(model, splits.test, batch_size=2)
    assert found == task.measure(model, splits.test, batch_size=1) | {"loss": pytest.approx(found["loss"], rel=1e-5)}
    assert found["loss"] == task.score(model, splits.test, 2)["loss"]
    for name in ("rouge_l", "exact_match"):
        assert len(found[f"{name}_seeds"]) == 3
        assert found[name] == pytest.approx(sum(found[f"{name}_seeds"]) / 3)
    assert 0 < found["tokens"] <= 6
    prompts = [s["input_ids"][: s["prompt_length"]] for s in splits.test[:2]]
    lengths = []
    for seed, (answers, references), value in zip((7, 8, 9), scored, found["rouge_l_seeds"], strict=False):
        tokens = sample_responses(model, prompts, eos_token_id=0, max_new_tokens=6, seed=seed)
        lengths += map(len, tokens)
        assert answers == [text(task, t).strip() for t in tokens]
        assert references == [["Blue"], ["3", "three"]]
        assert value == sum(rouge_l(answers, references)) / 2
    assert found["tokens"] == pytest.approx(sum(lengths) / 6)


def test_a_model_that_has_learned_its_answers_scores_100(jsonl):
    task, splits = loaded(jsonl(DOLLY, ALPACA), max_prompt_length=128, max_length=140)
    model = model_of(task, width=48).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = task.collate(splits.train)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    found = task.measure(model, splits.test, batch_size=2)
    assert found["loss"] < 0.05
    assert found["rouge_l"] == 100 and found["exact_match"] == 100
    assert found["tokens"] == pytest.approx(2.5)  # "Blue" and "3"


def test_the_tokenizer_is_saved_with_the_model(jsonl, tmp_path, chat_tokenizer):
    task, splits = loaded(jsonl(DOLLY), tokenizer=chat_tokenizer)
    task.save_companions(tmp_path / "student")
    again = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again.chat_template == TEMPLATE
    assert again.decode(splits.train[0]["input_ids"]) == text(task, splits.train[0]["input_ids"])


# Mistakes


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "x"}, r"line 2: the keys are 'prompt'\. Expected either 'instruction'.*'messages'"),
        ({**DOLLY, **CHAT}, r"line 2: the keys are .*'messages'\. Expected either"),
        ({"instruction": " ", "output": "x"}, r"line 2: instruction is ' ', expected a text that is not empty"),
        ({"instruction": "x"}, r"line 2: no reference given, expected 'output' or 'response'"),
        ({**DOLLY, "output": "x"}, r"output and response given, expected 'output' or 'response'"),
        ({**DOLLY, "response": []}, r"response is \[\], expected a text or a list of texts"),
        ({**DOLLY, "response": ["a", 1]}, r"response is \['a', 1\], expected a text or a list"),
        ({**DOLLY, "context": 5}, r"context is 5, expected a text"),
        ({**DOLLY, "context": "a", "input": "b"}, r"both 'input' and 'context' are given"),
        ({"messages": "hello"}, r"expected messages to be a list of objects with the texts 'role' and 'content'"),
        ({"messages": CHAT["messages"][:2]}, r"the roles are system, user; expected .* last, the assistant's"),
        ({"messages": CHAT["messages"][2:3]}, r"the roles are assistant; expected"),
    ],
)
def test_a_wrong_line_is_named(jsonl, item, message):
    with pytest.raises(RecipeError, match=message):
        read_requests(jsonl(DOLLY, item))


def test_a_blank_input_is_none_and_other_keys_do_not_matter(jsonl):
    for key, value in (("input", "  "), ("context", None), ("text", 3)):
        (request,) = read_requests(jsonl({"instruction": "x", "output": "y", key: value}))
        assert request.input == ""


def test_files_that_cannot_be_read_are_named(jsonl, tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.jsonl"):
        read_requests(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(RecipeError, match="holds no request"):
        read_requests(jsonl())
    (tmp_path / "broken.jsonl").write_text('{"instruction": "x"\n')
    with pytest.raises(RecipeError, match=r"broken\.jsonl, line 1.*JSON"):
        read_requests(str(tmp_path / "broken.jsonl"))


def test_conversations_need_a_chat_template(jsonl, chat_tokenizer):
    with pytest.raises(RecipeError, match=r"line 1: the messages before the response are of system, user, assistant"):
        task_of(jsonl(CHAT)).load_data(NEW)
    with pytest.raises(RecipeError, match=r"format=chat, but the tokenizer .* has no chat template"):
        task_of(jsonl(DOLLY), format="chat").load_data(NEW)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", r"line 1: the tokenizer's chat template refuses .*no system role"),
        (TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}", r"writes the prompt otherwise once the resp"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(jsonl, chat_tokenizer, template, message):
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat_tokenizer)
    with pytest.raises(RecipeError, match=message):
        task_of(jsonl(CHAT), tokenizer=chat_tokenizer).load_data(NEW)


def test_data_without_any_response_is_refused(jsonl):
    with pytest.raises(RecipeError, match="all responses are empty"):
        task_of(jsonl(EMPTY)).load_data(NEW)


def test_too_few_requests_to_hold_out(jsonl):
    with pytest.raises(RecipeError, match=r"train has 1 different .*hold out validation and test"):
        InstructionTuning(train=[jsonl(DOLLY)], vocabulary_size=BYTES).load_data(NEW)


def test_rouge_score_that_is_missing_is_named_before_anything_else(monkeypatch):
    monkeypatch.setattr("squeezeheads.tasks.instruction_tuning.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"rouge-score, which is not installed: pip install \"squeezeheads\[eval\]\""):
        InstructionTuning(train=["nowhere.jsonl"]).load_data(NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": []}, r"train=\[\]: expected at least one JSONL file"),
        ({"test": ["a"]}, "a is named twice"),
        ({"max_length": 256}, "max_length=256 leaves no room .*max_prompt_length=256"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
        ({"temperature": 0.0}, r"temperature=0\.0: expected a positive number"),
        ({"generation_seeds": []}, r"generation_seeds=\[\]: expected at least one"),
        ({"generation_seeds": [1, 1]}, "each once"),
        ({"generation_samples": 0}, "generation_samples=0"),
        ({"validation_share": 0.0}, r"validation_share=0\.0: expected a share"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave nothing of train"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"vocabulary_size": 256}, "vocabulary_size=256: expected at least 257"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InstructionTuning(**{"train": ["a"], **options})


def test_models_that_do_not_fit_are_named(jsonl):
    task, _ = loaded(jsonl(DOLLY), max_new_tokens=300)
    config = LlamaConfig(vocab_size=BYTES, max_position_embeddings=556)
    task.check_model(config, "the teacher")
    with pytest.raises(RecipeError, match=r"the teacher tells 40 tokens apart, the tokenizer has 257"):
        task.check_model(LlamaConfig(vocab_size=40), "the teacher")
    config.max_position_embeddings = 555
    with pytest.raises(RecipeError, match=r"the student takes 555 tokens at most, .* up to 556"):
        task.check_model(config, "the student")


def test_a_new_model_takes_the_larger_vocabulary_of_a_pretrained_one(jsonl, tmp_path):
    """Some checkpoints have more embeddings than tokens; logits compare only over equally many."""
    folder = tmp_path / "teacher"
    language_model(2, vocab_size=BYTES + 7).save_pretrained(folder)
    train_byte_bpe([], BYTES).save_pretrained(folder)
    task, _ = loaded(jsonl(DOLLY), pretrained=Pretrained(teachers={"teacher": str(folder)}))
    assert task.data_config()["vocab_size"] == BYTES + 7
    task, _ = loaded(jsonl(DOLLY))
    assert task.data_config()["vocab_size"] == BYTES


# Recipes


def test_a_recipe_names_the_task(jsonl, tmp_path):
    path = tmp_path / "recipe.yaml"
    page = (Path(__file__).parent.parent / "docs" / "instruction-tuning.md").read_text()
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    task = load_recipe(path).chosen_task
    assert isinstance(task, InstructionTuning) and task.generation_seeds == [10, 20, 30, 40, 50]
    assert task.test == [".assets/wordnet/test.jsonl"]
    with pytest.raises(RecipeError, match=r"max_prompt_length"):
        load_recipe(path, ["--task.instruction_tuning.max_prompt_length", "600"])


def test_every_option_is_explained():
    import inspect

    source = inspect.getsource(InstructionTuning)
    for field in dataclasses.fields(InstructionTuning):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), field.name


# WordNet as requests


def wordnet_folder(folder: Path, words: list[str]) -> Path:
    """A WordNet of nouns: each word has a sense of its own, and all share one."""
    licence = "  1 This software and database is being provided to you\n"
    shared = f'00000099 03 n 01 x 0 000 | what they share; "a {words[0]} is here"; "{words[1]}s; many"- Anon  \n'
    own = "".join(f"{i:08} 03 n 01 {w} 0 000 | meaning of {w}: its own  \n" for i, w in enumerate(words))
    index = "".join(f"{w} n 2 1 @ 2 0 {i:08} 00000099  \n" for i, w in enumerate(words))
    for part in wordnet.PARTS_OF_SPEECH:
        (folder / f"data.{part}").write_text(licence + (own + shared if part == "noun" else ""), encoding="latin-1")
        (folder / f"index.{part}").write_text(licence + (index if part == "noun" else ""), encoding="latin-1")
    return folder


def test_wordnet_becomes_requests_that_the_task_reads(tmp_path, jsonl):
    senses = wordnet.read_senses(wordnet_folder(tmp_path, ["crow", "owl", "New_York", "a-b"]))
    assert [word for word, _ in senses] == ["crow", "owl"]
    asked = [r for (word, part), s in senses.items() for r in wordnet.requests(word, part, s)]
    assert asked == [
        {
            "instruction": "Define the noun crow.",
            "context": "",
            "response": ["meaning of crow: its own", "what they share"],
            "category": "define",
        },
        {
            "instruction": "Use the noun crow in a sentence.",
            "context": "",
            "response": "a crow is here",
            "category": "use",
        },
        {
            "instruction": "Define the noun owl.",
            "context": "",
            "response": ["meaning of owl: its own", "what they share"],
            "category": "define",
        },
        {
            "instruction": "Use the noun owl in a sentence.",
            "context": "",
            "response": "owls; many",
            "category": "use",
        },
    ]
    assert [r.references[0] for r in read_requests(jsonl(*asked))][:2] == ["meaning of crow: its own", "a crow is here"]


def test_wordnet_splits_by_word_and_keeps_held_out_answers_out_of_train(tmp_path):
    words = [a + b for a in "abcdefgh" for b in "klmnopq"]
    senses = wordnet.read_senses(wordnet_folder(tmp_path, words))
    parts = wordnet.split_requests(senses, held_out=9)
    asked = {name: [r["instruction"].split()[3].strip(".") for r in items] for name, items in parts.items()}
    defined = {name: set(part) for name, part in asked.items()}
    assert [len(defined[n]) for n in ("test", "validation", "train")] == [9, 9, len(words) - 18]
    assert (
        not defined["train"] & (defined["test"] | defined["validation"]) and not defined["validation"] & defined["test"]
    )
    answers = {name: json.dumps([r["response"] for r in items]) for name, items in parts.items()}
    assert "what they share" in answers["test"] and "what they share" not in answers["train"] + answers["validation"]
    assert wordnet.split_requests(senses, held_out=9) == parts


def test_wordnet_that_is_missing_is_named(tmp_path):
    with pytest.raises(AssetError, match=r"data\.noun is not here .*wordnet-base.*make assets-data"):
        wordnet.read_senses(tmp_path)
