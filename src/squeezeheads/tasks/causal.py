"""What the tasks of causal language models have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from squeezeheads.batches import evaluating, next_token_targets
from squeezeheads.errors import RecipeError, in_short
from squeezeheads.named_models import find_config
from squeezeheads.tasks.base import Pretrained
from squeezeheads.tasks.sketch import Sketch
from squeezeheads.tasks.tokenization import (
    SMALLEST_VOCABULARY,
    choose_tokenizer,
    makes_tokenizer,
    model_vocabulary,
    train_byte_bpe,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def token_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer fixes in the configuration of a new model: vocabulary and special tokens.

    A padding token that also ends or begins texts is left out: several models (LLaMA among them) hold the padding
    token's embedding at zero, and texts that begin behind it would begin behind nothing. Nor are predictions of padding
    taught, whatever the number: masks and labels say what counts.
    """
    pad = tokenizer.pad_token_id
    return {
        "vocab_size": model_vocabulary(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) else pad,
    }


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, pretrained: Pretrained) -> int:
    """How many tokens a new model tells apart, so that its logits compare with those of pretrained ones: the
    tokenizer's, or more where a pretrained model's vocabulary is padded to a round number.

    Raises:
        RecipeError: a pretrained model whose configuration cannot be loaded.
    """
    sizes = [model_vocabulary(tokenizer)]
    for path in (*pretrained.teachers.values(), pretrained.student):
        if path is not None:
            try:
                config = find_config(path)
            except (OSError, ValueError, ImportError) as error:
                raise RecipeError(f"{path} cannot be loaded: {in_short(error)}") from error
            sizes.append(getattr(config.get_text_config(), "vocab_size", 0))
    return max(sizes)


def sketch_tokenizer(
    own: str | None, pretrained: Pretrained, vocabulary_size: int, sketch: Sketch
) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a task before any text is read, and for how many tokens new models are made. In place of one
    that is still to be learned, or that is not there, stands one of plain bytes, and ``vocabulary_size`` at most."""
    found = None
    if makes_tokenizer(own, pretrained) and pretrained.missing:
        # That a model is not there is told with the models; its tokenizer may be beside it.
        sketch.notes.append(
            f"The tokenizer is that of a model that is not there: {vocabulary_size} tokens are assumed."
        )
        sketch.assumed = True
    elif makes_tokenizer(own, pretrained) and pretrained.made is None:
        sketch.notes.append(f"The tokenizer is learned when the run starts: {vocabulary_size} tokens at most.")
    else:
        with sketch.noting("tokenizer" if own is not None else ""):
            tokenizer = choose_tokenizer(own, pretrained, lambda: (), vocabulary_size)
            found = tokenizer, shared_vocabulary(tokenizer, pretrained)
        sketch.assumed = found is None
    return found or (train_byte_bpe((), SMALLEST_VOCABULARY), vocabulary_size)


def check_token_model(config: PreTrainedConfig, whose: str, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Whether a model has embeddings for the tokenizer's tokens, and for ``length`` positions.

    Raises:
        RecipeError: it does not; names both.
    """
    vocabulary = config.get_text_config().vocab_size
    if vocabulary < model_vocabulary(tokenizer):
        raise RecipeError(
            f"{whose} tells {vocabulary} tokens apart, the tokenizer has {model_vocabulary(tokenizer)}: leave "
            "vocab_size out of a new model's config, or choose the tokenizer that the model was trained with."
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise RecipeError(
            f"{whose} takes {positions} tokens at most, the task has sequences of up to {length}: shorten them, or "
            "raise max_position_embeddings in a new model's config."
        )


def token_example(count: int, length: int) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` (count, length) without padding."""
    ids = torch.zeros(count, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


PROBE_LENGTH = 16


def check_causal(model: PreTrainedModel, batch: Mapping[str, Tensor], whose: str) -> None:
    """Whether a causal language model (by its class) predicts each token from earlier ones alone. transformers builds
    BERT and its kin as language models that attend in both directions, unless their configuration says is_decoder.

    The first ``PROBE_LENGTH`` tokens of the batch's first text go through the model, in eval mode, without gradients.

    Raises:
        RecipeError: it sees later tokens.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    if type(bare).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return
    ids = batch["input_ids"][0]
    if "attention_mask" in batch:
        ids = ids[batch["attention_mask"][0].bool()]
    ids = ids[None, :PROBE_LENGTH]
    if ids.shape[1] > 1 and _sees_later_tokens(model, ids):
        way_out = "set is_decoder: true in its config" if hasattr(model.config, "is_decoder") else "choose another"
        raise RecipeError(
            f"{whose}: {type(bare).__name__} sees later tokens, so it would be given the token that it predicts: "
            f"{way_out}."
        )


def _sees_later_tokens(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether any logits but the last depend on the last token."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    with evaluating(model):
        with torch.no_grad():
            one, two = (model(input_ids=i, attention_mask=torch.ones_like(i)).logits[:, :-1] for i in (ids, other))
        if torch.equal(one, two):
            return False
        # Rounding may differ too, where experts are given other numbers of tokens. A gradient that must be 0 is 0.
        leaves: list[Tensor] = []

        def catch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1].clone()

        with model.get_input_embeddings().register_forward_hook(catch), torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
            gradients = torch.autograd.grad(logits.float().square().sum(), leaves)
    return any(bool((gradient[:, -1] != 0).any()) for gradient in gradients)


def padded(samples: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each (B, N), padded on the right to the longest sample; padding
    has label -100."""
    ids, labels = ([torch.tensor(sample[key]) for sample in samples] for key in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@torch.no_grad()
def mean_token_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Cross-entropy in nats per labelled token over all batches; 0 where there is none. Runs the model as it is: set
    eval mode before."""
    total, count = 0.0, 0
    for batch in batches:
        targets = next_token_targets(batch)
        assert targets is not None  # the batches have labels
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"].roll(-1, dims=1)[targets]
        total += torch.nn.functional.cross_entropy(logits[targets].float(), labels, reduction="sum").item()
        count += labels.numel()
    return total / max(count, 1)
