"""What a language model answers when it is sampled from, and how near that is to reference answers."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from squeezeheads.batches import evaluating
from squeezeheads.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[int]]:
    """One response to each prompt, drawn token by token from the model's whole distribution.

    Nothing but ``temperature`` shapes that distribution: what the model's ``generation_config`` asks for (top-k, top-p,
    repetition penalty …) is left aside, or models would be compared by their configurations. Each prompt has a random
    stream of its own, made from ``seed``, its tokens and how often they came before: a response depends neither on the
    other prompts nor on their order or number in a batch (but for rounding), and no global random state is touched.

    Args:
        model: a causal language model; run in eval mode, on its own device.
        prompts: token ids of each, at least one.
        eos_token_id: ends a response; the ends that the model's ``generation_config`` names do too.
        max_new_tokens: a response is cut there.
        temperature: divides the logits; 1 is the model's own distribution.
        seed: another seed draws other responses.
        batch_size: prompts at a time.

    Returns:
        New tokens of each response, without the end token, in the prompts' order.

    Raises:
        RecipeError: a model whose logits are not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ends = _end_tokens(model, eos_token_id)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the processor draws: what it leaves over is certain
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=eos_token_id,
    )
    seeds = _stream_seeds(prompts, seed)
    # Prompts of like length share a batch: less padding. Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), _generation_config(model, GenerationConfig()):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_padded([prompts[i] for i in chosen], eos_token_id)
            draw = _Draw(temperature, [seeds[i] for i in chosen], model.device)
            tokens = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
            for index, row in zip(chosen, tokens[:, ids.shape[1] :].tolist(), strict=True):
                end = next((position for position, token in enumerate(row) if token in ends), len(row))
                responses[index] = row[:end]
    return responses


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, N), padded on the left: generation goes on at the right."""
    ids = pad_sequence(
        [torch.tensor(p) for p in prompts], batch_first=True, padding_value=pad_token_id, padding_side="left"
    )
    mask = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], batch_first=True, padding_side="left")
    return ids, mask


class _Draw:
    """A logits processor that draws the next token of each row from the row's own stream and leaves no other."""

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores.float() / self.temperature).softmax(-1)
        if not torch.isfinite(probabilities).all():  # on a GPU, drawing from these would end the process's use of it
            raise RecipeError(
                "the model's next-token probabilities are not finite, so nothing can be sampled: its training has "
                "diverged, or its numbers overflow (try float32)."
            )
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, self.streams, strict=True)]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


def _stream_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    before: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(repr((seed, before[key], key)).encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)  # generators take 63 bits everywhere
        before[key] += 1
    return seeds


def _end_tokens(model: PreTrainedModel, eos_token_id: int) -> list[int]:
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({eos_token_id, *named})


@contextmanager
def _generation_config(model: PreTrainedModel, config: Any) -> Iterator[None]:
    """``generate`` fills in from the model's own whatever the given configuration leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F1 of each prediction against its best reference, 0 to 100; more is better.

    Longest common subsequence of words after Porter stemming, by ``rouge-score``. Its words are runs of a-z and 0-9 in
    lower case: texts in other scripts score 0.

    Args:
        predictions: one text each.
        references: one or more texts each.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; package ``rouge-score``.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100.0 * float(scorer.score_multi(list(targets), prediction)["rougeL"].fmeasure)
        for prediction, targets in zip(predictions, references, strict=True)
    ]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """100 for a prediction that equals one of its references, else 0; case, ASCII punctuation and spacing aside, as in
    the evaluation of Super-NaturalInstructions (SQuAD's leaves out articles besides)."""
    return [
        100.0 * (_plain(prediction) in {_plain(target) for target in targets})
        for prediction, targets in zip(predictions, references, strict=True)
    ]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
