"""A teacher's stored predictions for a batch: all logits, or the greatest with the mass of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredLogits:
    """What is known of the logits (…, V) that a teacher gave.

    With ``indices`` the k greatest are known, and for each of ``temperatures`` the sum over the rest: the teacher's
    distribution over k + 1 outcomes, these classes and "another one". How the rest is divided is not known and is not
    invented: ``log_probabilities`` divides it as the student does. Of all teachers that agree with what is stored this
    one is nearest to the student, so the divergences of this package (forward and reverse KL, Jensen-Shannon) and their
    gradients are exactly those between distributions over the k + 1 outcomes.
    """

    values: Tensor
    """(…, k) logits, up to a constant of each prediction; without ``indices`` all V, in the order of the classes."""
    vocabulary: int
    """V."""
    indices: Tensor | None = None
    """(…, k) int64: the classes of ``values``, the likeliest first. ``None`` where all are stored."""
    rest: Tensor | None = None
    """(…, temperatures): log Σ exp(logit / τ) over the classes that are not stored, up to the same constant / τ."""
    temperatures: tuple[float, ...] = ()
    """τ of each entry of ``rest``."""
    known: Tensor | None = None
    """(…) bool: predictions that are stored. Padding is not. ``None``: all are."""

    @property
    def shape(self) -> torch.Size:
        """(…, V), as of the logits."""
        return torch.Size((*self.values.shape[:-1], self.vocabulary))

    @property
    def complete(self) -> bool:
        """Whether all V logits are stored."""
        return self.indices is None

    def logits(self, where: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """(n, V) logits of the predictions at ``where`` (index tensors of all dimensions but the last).

        Raises:
            ValueError: not all logits are stored, or a prediction is not.
        """
        if not self.complete:
            raise ValueError(
                f"the mean of several teachers' logits needs all {self.vocabulary} of each, but a cache holds the "
                f"{self.values.shape[-1]} greatest: write it with k={self.vocabulary}, or give each teacher its own "
                "objective."
            )
        self._check(where)
        return self.values[where].to(dtype)

    def log_probabilities(self, where: tuple[Tensor, ...], log_student: Tensor, temperature: float) -> Tensor:
        """(n, V) log-probabilities of the teacher at a temperature, what is not stored in the student's proportions.

        Args:
            where: as for ``logits``.
            log_student: (n, V) log-probabilities of the student there, at the same temperature; they are only read.
            temperature: τ; where not all logits are stored, one of ``temperatures``.

        Raises:
            ValueError: another temperature, or a prediction that is not stored.
        """
        dtype = log_student.dtype
        if self.indices is None or self.rest is None:
            return self.logits(where, dtype).div_(temperature).log_softmax(-1)
        if temperature not in self.temperatures:
            raise ValueError(other_temperature(temperature, self.temperatures))
        self._check(where)
        chosen = self.indices[where]
        # Sums within the rest itself: 1 − (mass of the others) would lose a small rest to rounding.
        within = log_student.scatter(-1, chosen, -math.inf)
        student_rest = within.logsumexp(-1, keepdim=True)
        unspoken = self.vocabulary - chosen.shape[-1]
        within = torch.where(student_rest == -math.inf, -math.log(unspoken), log_student - student_rest)
        scores = self.values[where].to(dtype).div_(temperature)
        rest = self.rest[where][:, self.temperatures.index(temperature), None].to(dtype)
        total = torch.cat([scores, rest], -1).logsumexp(-1, keepdim=True)
        return within.add_(rest - total).scatter_(-1, chosen, scores - total)

    def decisions(self) -> Tensor:
        """(…) int64: the likeliest class.

        Raises:
            ValueError: a prediction that is not stored.
        """
        if self.known is not None and not bool(self.known.all()):
            raise ValueError(_NOT_STORED)
        return self.values.argmax(-1) if self.indices is None else self.indices[..., 0]

    def _check(self, where: tuple[Tensor, ...]) -> None:
        if self.known is not None and not bool(self.known[where].all()):
            raise ValueError(_NOT_STORED)


_NOT_STORED = (
    "predictions made at padding count, and a teacher cache holds none of these: let `targets` leave padding out, or "
    "learn from the live teacher."
)


def other_temperature(wanted: float, stored: tuple[float, ...]) -> str:
    """What is said where the rest's mass is not known at a temperature."""
    return (
        f"temperature={wanted} is none of those for which the teacher cache knows the mass of what it left out "
        f"({', '.join(map(str, stored))}): write the cache with temperatures=({wanted},), or with k=None, which keeps "
        "all logits and serves every temperature."
    )
