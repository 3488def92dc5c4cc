"""What the scores, gradients and weights of a discriminator say about the state of a GAN."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

LEAST_SIDE = 4
"""Smaller sides of matrices from which on a singular spectrum can collapse."""


@loggable
class AdversaryResult(NamedTuple):
    """Scores of N training images, M generated and H held-out ones, and what training did to both networks."""

    real: Tensor
    """(N,) scores of training images."""
    generated: Tensor
    """(M,) scores of generated images."""
    held_out: Tensor
    """(H,) scores of real images that are not trained on; (0,) where there are none."""
    generator_gradients: Tensor
    """(S,) norms of the generator's gradient at some steps; (0,) where none were read."""
    discriminator_gradients: Tensor
    """(T,) norms of the discriminator's gradient."""
    direction: Tensor
    """() 1 where larger scores mean real, -1 where smaller ones do."""
    threshold: Tensor
    """() score that separates real from generated images by the loss; nan where it is not known."""
    invalid: Tensor
    """() fraction of the scores that are nan or inf, and left out."""
    levels: Tensor
    """(2,) highest norms of the gradients of generator and discriminator before; nan where not known."""
    limits: Tensor
    """(2,) norms above which these gradients have exploded; inf while that is not known."""
    changes: Tensor
    """(2,) change of the weights of generator and discriminator since the evaluation before, relative to them; nan where not
    known."""
    unchanged: Tensor
    """(2,) number of steps of the other network since the weights last changed; 0 while they change."""
    has_changed: Tensor
    """(2,) booleans: whether the weights have changed at all since training began."""
    stable_ranks: Tensor
    """(W,) stable rank of each weight matrix of the discriminator; (0,) where none were measured."""

    @property
    def auc(self) -> Tensor:
        """() probability that a training image looks more real than a generated one, ties count half; nan without any."""
        return self._above(self.real, self.generated)

    @property
    def held_out_auc(self) -> Tensor:
        """() probability that a held-out real image looks more real than a generated one."""
        return self._above(self.held_out, self.generated)

    @property
    def train_auc(self) -> Tensor:
        """() probability that a training image looks more real than a held-out one; 0.5 without overfitting."""
        return self._above(self.real, self.held_out)

    @property
    def train_auc_error(self) -> Tensor:
        """() standard error of :attr:`train_auc`."""
        return auc_error(self.train_auc, len(self.real), len(self.held_out))

    def _above(self, x: Tensor, y: Tensor) -> Tensor:
        return greater_share(self.direction * x, self.direction * y)

    @property
    def accuracies(self) -> Tensor:
        """(3,) shares of training, generated and held-out images that are on the right side of the best threshold."""
        real, generated, held_out = (self.direction * scores for scores in (self.real, self.generated, self.held_out))
        best = best_threshold(real, generated)
        return torch.stack([_share(real > best), _share(generated <= best), _share(held_out > best)])

    @property
    def overfitting(self) -> Tensor:
        """() StyleGAN2-ADA's r_v: how far held-out images lie from training images towards generated ones, about 0 to 1."""
        return (self.real.mean() - self.held_out.mean()) / (self.real.mean() - self.generated.mean())

    @property
    def sign(self) -> Tensor:
        """() StyleGAN2-ADA's r_t: mean sign of the scores of training images beyond the threshold, -1 to 1."""
        mean: Tensor = (self.direction * (self.real - self.threshold)).sign().mean()
        return mean

    @property
    def generator_gradient(self) -> Tensor:
        """() median norm of the generator's gradient; nan where no finite one was read."""
        return _median(self.generator_gradients)

    @property
    def discriminator_gradient(self) -> Tensor:
        """() median norm of the discriminator's gradient; nan where no finite one was read."""
        return _median(self.discriminator_gradients)

    @property
    def invalid_gradients(self) -> Tensor:
        """() fraction of the gradients that were read and are nan or inf."""
        return _share(~torch.cat([self.generator_gradients, self.discriminator_gradients]).isfinite())

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of shape (), those that can be measured."""
        real, generated, held_out = self.accuracies
        values = {"invalid": self.invalid}
        if len(self.generated):
            values |= {"auc": self.auc, "accuracy_real": real, "accuracy_generated": generated}
        if len(self.held_out):
            values["train_auc"] = self.train_auc
        if len(self.held_out) and len(self.generated):
            values |= {
                "accuracy_held_out": held_out,
                "held_out_auc": self.held_out_auc,
                "overfitting": self.overfitting,
            }
        values |= {"sign": self.sign} if self.threshold.isfinite() else {}
        if len(self.generator_gradients):
            values["generator_gradient"] = self.generator_gradient
        if len(self.discriminator_gradients):
            values["discriminator_gradient"] = self.discriminator_gradient
        if len(self.generator_gradients) + len(self.discriminator_gradients):
            values["invalid_gradients"] = self.invalid_gradients
        for name, change in zip(("generator_change", "discriminator_change"), self.changes, strict=True):
            values |= {name: change} if change.isfinite() else {}
        if len(self.stable_ranks):
            values |= {
                "stable_rank": self.stable_ranks.log().mean().exp(),
                "lowest_stable_rank": self.stable_ranks.min(),
            }
        return values


def adversary(
    real: Tensor,
    generated: Tensor,
    held_out: Tensor | None = None,
    *,
    threshold: float | None = None,
    lower_is_real: bool = False,
) -> AdversaryResult:
    """Compares the scores that a discriminator gives to real and to generated images.

    All numbers but r_t are free of the scale of the scores, so they hold for logits, for probabilities and for critics of
    Wasserstein GANs alike. Scores that are nan or inf are left out and counted.

    Args:
        real: (N,) scores of images that the discriminator was trained on.
        generated: (M,) scores of generated images.
        held_out: (H,) scores of real images that it was not trained on.
        threshold: Score at which its loss takes an image for real, such as 0 for logits and 0.5 for probabilities; None where
            there is none, as for a Wasserstein critic.
        lower_is_real: Whether smaller scores mean real.

    Returns:
        The result, without gradients and weights.

    Raises:
        ValueError: if an argument is not of shape (N,).

    Example:
        >>> result = adversary(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), threshold=0.0)
        >>> result.auc, result.sign
        (tensor(0.8750, dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    given = {"real": real, "generated": generated, "held_out": real[:0] if held_out is None else held_out}
    for name, scores in given.items():
        if scores.ndim != 1:
            raise ValueError(
                f"{name} must be (N,), one score for each image, got {tuple(scores.shape)}. "
                "To fix this, pass the mean of a map of scores, such as scores.flatten(1).mean(1)."
            )
    doubles = {name: scores.double() for name, scores in given.items()}
    finite = {name: scores[scores.isfinite()] for name, scores in doubles.items()}
    count = sum(map(len, doubles.values()))
    nan = real.new_tensor(math.nan, dtype=torch.float64)
    return AdversaryResult(
        **finite,
        generator_gradients=real.new_empty(0, dtype=torch.float64),
        discriminator_gradients=real.new_empty(0, dtype=torch.float64),
        direction=torch.ones_like(nan) * (-1 if lower_is_real else 1),
        threshold=nan if threshold is None else torch.full_like(nan, threshold),
        invalid=torch.ones_like(nan) * (1 - sum(map(len, finite.values())) / count if count else math.nan),
        levels=nan.repeat(2),
        limits=torch.full_like(nan, math.inf).repeat(2),
        changes=nan.repeat(2),
        unchanged=torch.zeros_like(nan).repeat(2),
        has_changed=torch.zeros_like(nan).bool().repeat(2),
        stable_ranks=real.new_empty(0, dtype=torch.float64),
    )


def greater_share(x: Tensor, y: Tensor) -> Tensor:
    """Computes the probability () that one of x exceeds one of y, ties count half: the area under the ROC curve.

    Args:
        x: (N,) numbers.
        y: (M,) numbers.

    Returns:
        () in float64, 0 to 1; nan where either is empty.

    Example:
        >>> greater_share(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        tensor(0.6250, dtype=torch.float64)
    """
    if not len(x) or not len(y):
        return x.new_tensor(math.nan, dtype=torch.float64)
    ordered = y.double().sort().values
    below = torch.searchsorted(ordered, x.double(), right=False) + torch.searchsorted(ordered, x.double(), right=True)
    return below.double().mean() / (2 * len(y))


def auc_error(auc: Tensor, n: int, m: int) -> Tensor:
    """Returns the standard error () of an area under the ROC curve of n and m numbers, as Hanley and McNeil."""
    one, other = auc / (2 - auc), 2 * auc.square() / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (one - auc.square()) + (m - 1) * (other - auc.square())
    return (variance.clamp(min=0) / max(n * m, 1)).sqrt()


def best_threshold(real: Tensor, generated: Tensor) -> Tensor:
    """Returns the number () above which as many real and as few generated scores lie as possible, each side by its share.

    Args:
        real: (N,) scores.
        generated: (M,) scores.

    Returns:
        () between two scores, the lowest of several that are equally good; nan where either is empty.
    """
    if not len(real) or not len(generated):
        return real.new_tensor(math.nan)
    values = torch.cat([real, generated]).sort().values
    # below all of them, between neighbours, and above all
    between = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])
    misses = torch.searchsorted(real.sort().values, between, right=True) / len(real)
    hits = torch.searchsorted(generated.sort().values, between, right=True) / len(generated)
    return between[(hits - misses).argmax()]


def stable_rank(weight: Tensor) -> Tensor:
    """Computes the stable rank of a weight matrix, the sum of its squared singular values relative to the largest.

    Args:
        weight: (out, in, ...) weights of a layer, as one matrix of ``out`` rows.

    Returns:
        () in float64, 1 where one singular value is left, up to the smaller side; nan where all weights are 0.

    Example:
        >>> round(float(stable_rank(torch.eye(8))), 3)
        8.0
    """
    matrix = weight.detach().flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    # of the smaller side
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    if not gram.isfinite().all():
        return gram.new_tensor(math.nan, dtype=torch.float64)
    rank: Tensor = (gram.trace() / torch.linalg.eigvalsh(gram)[-1]).double()
    return rank.where(gram.trace() > 0, math.nan)


def _share(holds: Tensor) -> Tensor:
    return holds.double().mean()


def _median(values: Tensor) -> Tensor:
    """The median () of the finite values; nan where there are none."""
    finite = values[values.isfinite()]
    return finite.quantile(0.5) if len(finite) else values.new_tensor(math.nan)
