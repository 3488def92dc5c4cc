"""How evenly a quantizer uses the codes of its codebook, from the number of times that each code is chosen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

CARRIED = 0.9
"""Share of the assignments that the most frequent codes carry together."""

CONFIDENCE = 0.95
"""With which the share of a code that was not seen is below its bound."""

SURELY_SEEN = 7.0
"""A code that is expected so many times is seen, except once in a thousand samples."""

MAX_CODEBOOK_TAGS = 20
"""Largest number of codebooks for which each one has scalars."""


@loggable
class CodebookUsageResult(NamedTuple):
    """How often each code of Q codebooks of up to K codes was chosen, and what follows from it."""

    counts: Tensor
    """(Q, K) number of assignments to each code; 0 beyond the size of a codebook."""
    sizes: Tensor
    """(Q,) number of codes of each codebook."""
    perplexity: Tensor
    """(Q,) number of codes that would be used if all were used evenly, 1 to the size; corrected for codes that are not seen."""
    observed_perplexity: Tensor
    """(Q,) the same of the shares as they are, which is too low where few positions meet many codes."""
    invalid: Tensor
    """() fraction of the indices that name no code and are left out."""
    compared: Tensor
    """(Q,) number of positions with a code from before to compare with."""
    changed: Tensor
    """(Q,) number of these that have another code than before."""
    recent: Tensor
    """(Q, K) share of each code a short time before, 0 where it is not known."""

    @property
    def positions(self) -> Tensor:
        """(Q,) number of assignments."""
        return self.counts.sum(1)

    @property
    def shares(self) -> Tensor:
        """(Q, K) share of the assignments to each code; nan where there are none."""
        return self.counts / self.positions[:, None]

    @property
    def exists(self) -> Tensor:
        """(Q, K) booleans, false beyond the size of a codebook."""
        return torch.arange(self.counts.shape[1], device=self.counts.device) < self.sizes[:, None]

    @property
    def seen(self) -> Tensor:
        """(Q,) number of codes that were chosen."""
        return (self.counts > 0).sum(1)

    @property
    def usage(self) -> Tensor:
        """(Q,) fraction of the codes that were chosen, 0 to 1."""
        return self.seen / self.sizes.double()

    @property
    def estimated_usage(self) -> Tensor:
        """(Q,) fraction of the codes that more positions would choose, at least: Chao's estimate, 0 to 1."""
        once, twice = ((self.counts == number).sum(1).double() for number in (1, 2))
        n = self.positions.clamp(min=1)
        unseen = (n - 1) / n * once * (once - 1) / (2 * (twice + 1))
        return ((self.seen + unseen) / self.sizes).clamp(max=1)

    @property
    def dead(self) -> Tensor:
        """(Q, K) booleans, true for codes that were not chosen."""
        return (self.counts == 0) & self.exists

    @property
    def unseen_bound(self) -> Tensor:
        """(Q,) share below which that of any one code lies that was not seen, with 95 % confidence."""
        return 1 - (math.log(1 - CONFIDENCE) / self.positions).exp()

    @property
    def nine_tenths(self) -> Tensor:
        """(Q,) smallest fraction of the codes that carries nine tenths of the assignments, 0 to 1."""
        carried = self.counts.sort(1, descending=True).values.cumsum(1)
        # as many as do not reach it, and one more
        short = (carried < CARRIED * self.positions[:, None]).sum(1)
        return ((short + 1) / self.sizes.double()).where(self.positions > 0, math.nan)

    @property
    def drift(self) -> Tensor:
        """(Q,) fraction of the positions whose code changed since before; nan where nothing is compared."""
        return self.changed / self.compared

    @property
    def died(self) -> Tensor:
        """(Q, K) booleans, true for codes that were not chosen though they surely would have been with their recent share."""
        return self.dead & (self.recent * self.positions[:, None] > SURELY_SEEN)

    @property
    def is_collapsed(self) -> Tensor:
        """(Q,) booleans: whether a codebook carries less than a third of its bits, by no more codes than half of them name.

        Of K codes and n positions, at most log2 of the smaller number can be carried.
        """
        most = torch.minimum(self.sizes.double(), self.positions)
        return (self.perplexity < most ** (1 / 3)) & (self.seen <= most.sqrt()) & (most > 1)

    def most_used(self, codebook: int) -> list[int]:
        """Returns the codes that carry nine tenths of the assignments, the most frequent first."""
        number = (self.nine_tenths[codebook] * self.sizes[codebook]).nan_to_num(0.0).round().long()
        return self.counts[codebook].argsort(descending=True, stable=True)[:number].tolist()

    def died_codes(self, codebook: int) -> list[int]:
        """Returns the codes that died, those with the largest share before first."""
        order = self.recent[codebook].argsort(descending=True, stable=True)
        return order[self.died[codebook][order]].tolist()

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all codebooks together and, of 2 to 20 codebooks, of each, of shape ()."""
        values = {
            "perplexity": self.perplexity.log().mean().exp(),
            "usage": self.usage.mean(),
            "estimated_usage": self.estimated_usage.mean(),
            "nine_tenths": self.nine_tenths.mean(),
            "dead_codes": self.dead.sum().double(),
            "died_codes": self.died.sum().double(),
            "unseen_bound": self.unseen_bound.max(),
            "invalid": self.invalid,
        }
        if (self.compared > 0).all():
            values["drift"] = self.drift.mean()
        if 1 < len(self.sizes) <= MAX_CODEBOOK_TAGS:
            values |= {f"perplexity_{q}": value for q, value in enumerate(self.perplexity)}
            values |= {f"usage_{q}": value for q, value in enumerate(self.usage)}
        return values


def codebook_usage(counts: Tensor, sizes: Tensor | None = None) -> CodebookUsageResult:
    """Computes how evenly codes are used from the number of times that each was chosen.

    Perplexity is the exponential of the Shannon entropy, here by the estimate of Chao and Shen: shares are multiplied by the
    coverage ``C = 1 - f1 / n``, the share of all codes that are seen at all, and each term is divided by the probability that
    its code is seen, ``-sum C p log(C p) / (1 - (1 - C p)^n)``. With many positions for each code it is that of the shares as
    they are. Positions are taken to be independent.

    Args:
        counts: (K,) numbers of one codebook, or (Q, K) of several.
        sizes: (Q,) number of codes of each; by default K.

    Returns:
        The usage, of Q codebooks; nan where a codebook has no assignments.

    Raises:
        ValueError: if the shape of an argument is another one.

    Example:
        >>> result = codebook_usage(torch.tensor([50, 50, 0, 0]))
        >>> result.perplexity, result.usage
        (tensor([2.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    if counts.ndim not in (1, 2) or not counts.numel():
        raise ValueError(
            f"counts must be (K,) or (Q, K), got {tuple(counts.shape)}. "
            "To fix this, pass how often each code was chosen, such as torch.bincount(indices.flatten(), minlength=K)."
        )
    counts = counts.double().view(-1, counts.shape[-1])
    if sizes is None:
        sizes = torch.full((len(counts),), counts.shape[1], device=counts.device)
    if sizes.shape != counts.shape[:1]:
        raise ValueError(f"sizes must be ({len(counts)},), one for each codebook, got {tuple(sizes.shape)}.")
    none = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    n = counts.sum(1)
    entropy = _entropy(counts, n).minimum(sizes.double().log())
    return CodebookUsageResult(
        counts=counts,
        sizes=sizes,
        perplexity=entropy.exp().where(n > 0, math.nan),
        observed_perplexity=torch.special.entr(counts / n[:, None]).sum(1).exp(),
        invalid=none.sum(),
        compared=none,
        changed=none,
        recent=torch.zeros_like(counts),
    )


def _entropy(counts: Tensor, n: Tensor) -> Tensor:
    """Returns the entropy (Q,) in nats of counts (Q, K) by the estimate of Chao and Shen, 0 where there are none."""
    once = (counts == 1).sum(1).double()
    # where every position has a code of its own, the coverage would be 0
    once = once.minimum((n - 1).clamp(min=0))
    n = n.clamp(min=1)[:, None]
    p = (1 - once[:, None] / n) * counts / n
    # log1p and expm1 keep the digits of rare codes; a code that has all is always seen
    seen = -torch.expm1(n * torch.log1p(-p))
    terms: Tensor = torch.special.entr(p) / seen
    return terms.where(counts > 0, 0.0).sum(1)
