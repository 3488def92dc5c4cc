"""Finds posteriors in what encoders return, and computes their KL divergence from a prior."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    constraints,
    kl_divergence,
)

from lightning_gendiag.model.batches import shape_of
from lightning_gendiag.model.outputs import MAX_DEPTH, fields_of, moment_of, peeled

MEAN_NAMES = ("mean", "mu", "loc", "m", "embedding", "means", "mus")
"""Names of the mean, best first, in lower case, without underscores and without what marks the latents, such as ``z_``."""

SPREAD_NAMES = {
    "log_variance": ("logvar", "logvariance", "logcovariance", "logvars", "logsigma2", "logsigmasq", "lv"),
    "variance": ("var", "variance", "covariance", "v", "sigma2", "sigmasq"),
    "log_std": ("logstd", "logsigma", "logscale", "logs"),
    "std": ("std", "stddev", "sigma", "scale"),
    "softplus_std": (),
    "softplus_variance": (),
}
"""Names of each kind of spread, best first; no name states that the softplus of it is one."""

SPREADS = "'auto', 'log_variance', 'variance', 'log_std', 'std', 'softplus_std' or 'softplus_variance'"

POSTERIOR_NAMES = ("latent_dist", "posterior", "qz", "qz_x", "q_z", "q")
"""Fields that hold a posterior itself."""

OF_LATENTS = re.compile(r"^(qz|q|z|latent|posterior|encoder|enc)|z$")
"""What marks a name as one of the latents."""

STATES_STD = re.compile(r"Autoencoder_?KL", re.IGNORECASE)
"""Names of classes whose plain pair is a mean and a standard deviation, as MONAI's; others of these names return objects."""

POSTERIOR_ADVICE = "pass PosteriorKLMonitor(posterior=lambda module, images: (mean, log_variance))"
"""What a message advises where the encoder gives no posterior that can be used."""

FEWEST_POSITIVE = 16
"""Number of values from which on none being negative is evidence; by chance that has a probability of 2^-16."""


class Posterior(NamedTuple):
    """The posteriors of n inputs."""

    distribution: Distribution
    """Of batch and event shape (n, ...); a ``Normal`` in float64 where the encoder returned a mean and a spread."""
    described: str
    """What the encoder returned and how it was read, such as ``"a mean and its log variance"``."""
    spread: str = "auto"
    """How the spread was read, which is what ``posterior_in`` takes for further outputs of the same encoder."""

    @property
    def mean(self) -> Tensor | None:
        """(n, ...) mean in float64; None of a distribution that has none, such as one of categories."""
        return _double(moment_of(self.distribution, "mean"))

    @property
    def std(self) -> Tensor | None:
        """(n, ...) standard deviation in float64, 0 or more; None of a distribution that has none."""
        return _double(moment_of(self.distribution, "stddev"))


class _Pair(NamedTuple):
    """Tensors that are a mean and a spread."""

    mean: Tensor
    spread: Tensor
    kind: str
    """A key of ``SPREAD_NAMES``, or ``"auto"`` where no name states it."""
    described: str


def posterior_in(
    output: Any, n: int, spread: str = "auto", mean_dim: int | None = None, owner: str = "", argument: str = "encode"
) -> Posterior:
    """Returns the posterior in what an encoder returned.

    It is a distribution, an object or a dictionary with usual names, or a mean beside a spread of the same shape, with
    features before or a sample before or after them, or beside a standard deviation and its log variance. What the spread
    is, names state; of a plain pair, negative values state a logarithm, which is taken for that of the variance, as are
    zeros alone, an encoder's usual start.

    Args:
        output: What the encoder returned.
        n: Number of inputs.
        spread: A key of :data:`SPREAD_NAMES` where it is known, else ``"auto"``.
        mean_dim: L where one tensor (n, 2L, ...) holds mean and spread one after the other.
        owner: Name of the encoder's class, by which MONAI's pairs of a mean and a standard deviation are known.
        argument: What an error calls the encoder; ``"posterior"`` where the user gave it, which no error advises again.

    Returns:
        The posterior, in float64.

    Raises:
        ValueError: If there is no posterior, or several, or two kinds of spread are possible, or the two tensors of a pair
            are positive throughout, as the parameters of a gamma or beta distribution are.

    Example:
        >>> posterior_in((torch.zeros(1, 2), torch.full((1, 2), -2.0)), 1).std
        tensor([[0.3679, 0.3679]], dtype=torch.float64)
    """
    if spread not in ("auto", *SPREAD_NAMES):
        raise ValueError(f"spread must be {SPREADS}, got {spread!r}. To fix this, pass one of them.")
    found = _found(output, n, spread, mean_dim)
    if len(found) != 1:
        got = f"{len(found)} posteriors" if found else shape_of(output)
        fix = "let it return one of them" if argument == "posterior" else POSTERIOR_ADVICE
        raise ValueError(
            f"{argument} must return a pair of mean and log variance, or a distribution, of {n} inputs, got {got}. "
            f"To fix this, {fix}."
        )
    (posterior,) = found
    if isinstance(posterior, Distribution):
        return Posterior(posterior, f"a {type(peeled(posterior)).__name__}")
    kind = spread if spread != "auto" else posterior.kind
    if kind == "auto":
        kind = "std" if STATES_STD.search(owner) else _kind_of(posterior.mean, posterior.spread, argument)
    std = std_of(posterior.spread, kind).expand_as(posterior.mean)
    gaussian = Normal(posterior.mean.double(), std, validate_args=False)
    return Posterior(gaussian, f"{posterior.described} {kind.replace('_', ' ')}", kind)


def unstated_spread(output: Any, n: int, mean_dim: int | None = None, owner: str = "") -> Tensor | None:
    """Returns the values beside the mean in what an encoder returned, where no name states what they are; else None.

    Example:
        >>> unstated_spread((torch.zeros(1, 2), torch.ones(1, 2)), 1)
        tensor([[1., 1.]])
    """
    found = [] if STATES_STD.search(owner) else _found(output, n, "auto", mean_dim)
    (pair,) = found if len(found) == 1 else (None,)
    return pair.spread if isinstance(pair, _Pair) and pair.kind == "auto" else None


def kl_to_prior(posterior: Posterior, prior: Distribution | None = None) -> Tensor:
    """Computes the KL divergence of posteriors from a prior by latent dimension, in nats.

    It is exact. Of Gaussians it is computed in float64. Of Gaussians with a full covariance, dimension i has the
    divergence of its conditional distribution given the dimensions before it, so that the dimensions add up to the total
    and a dimension that follows from earlier ones carries what it shares with them. Everything else is left to
    ``torch.distributions.kl_divergence``; what is no product over dimensions has a single column, the total.

    Args:
        posterior: The posteriors of n inputs.
        prior: The prior of one input's latents; N(0, 1) in each dimension by default.

    Returns:
        (n, L) divergences in float64, 0 or more; of spatial latents (n, c, h, w), L is c*h*w.

    Raises:
        ValueError: If torch has no closed form for the posterior and the prior.

    Example:
        >>> kl_to_prior(posterior_in((torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)), 1))
        tensor([[0., 2.]], dtype=torch.float64)
    """
    q, mean = peeled(posterior.distribution), posterior.mean
    p = _factorized(Normal(0.0, 1.0) if prior is None else prior, torch.device("cpu") if mean is None else mean.device)
    if isinstance(p, Normal) and isinstance(q, Normal):
        return _gaussian((q.loc.double() - p.loc) / p.scale, 2 * (q.scale.double() / p.scale).log()).flatten(1)
    if isinstance(p, Normal) and isinstance(q, (MultivariateNormal, LowRankMultivariateNormal)):
        factor = q.scale_tril.double() / p.scale.expand_as(q.loc)[..., None]
        conditional = _gaussian((q.loc.double() - p.loc) / p.scale, 2 * factor.diagonal(dim1=-2, dim2=-1).log())
        # the variance of the conditional mean, which is what the earlier dimensions say about this one
        return (conditional + 0.5 * factor.tril(-1).square().sum(-1)).flatten(1)
    try:
        divergence = kl_divergence(q, p)
    except NotImplementedError as error:
        against = "N(0, 1)" if prior is None else type(peeled(prior)).__name__
        raise ValueError(
            f"posterior must have a closed divergence to the prior, got {type(q).__name__} and {against}. "
            "To fix this, return distributions for whose pair torch.distributions.kl_divergence has a closed form."
        ) from error
    return divergence.double().reshape(len(divergence), -1)


def is_of_real_numbers(distribution: Distribution) -> bool:
    """Returns whether a distribution is one of all real numbers; others, such as gamma distributions, have other priors."""
    support = None
    # a distribution of someone's own may state none
    with suppress(NotImplementedError):
        support = peeled(distribution).support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is None or isinstance(support, type(constraints.real))


def _gaussian(distance: Tensor, log_variance: Tensor) -> Tensor:
    """Returns KL(N(distance, variance) | N(0, 1)) of each element."""
    # expm1 keeps the digits of posteriors that are close to the prior
    return 0.5 * (distance.square() + torch.expm1(log_variance) - log_variance)


def _factorized(prior: Distribution, device: torch.device) -> Distribution:
    """Returns a prior as a product over dimensions where it is one; Gaussians in float64 on a device."""
    prior = peeled(prior)
    if isinstance(prior, MultivariateNormal) and not bool(prior.scale_tril.tril(-1).any()):
        prior = Normal(prior.loc, prior.stddev)
    if isinstance(prior, Normal):
        return Normal(prior.loc.to(device, torch.float64), prior.scale.to(device, torch.float64))
    return prior


def _found(output: Any, n: int, spread: str, mean_dim: int | None, depth: int = 0) -> list[Distribution | _Pair]:
    """Returns the posteriors in an output."""
    if isinstance(output, Distribution):
        return [output] if (*output.batch_shape, *output.event_shape)[:1] == (n,) else []
    if isinstance(output, Tensor):
        if mean_dim is None or output.shape[:2] != (n, 2 * mean_dim):
            return []
        mean, values = output.chunk(2, 1)
        return [_Pair(mean, values, "auto", "one tensor of a mean and its")]
    if depth == MAX_DEPTH or output is None:
        return []
    fields = fields_of(output)
    if pair := _named(fields, n):
        return [pair]
    objects = {name: value for name, value in fields.items() if value is not None and not isinstance(value, Tensor)}
    parts = [objects[name] for name in POSTERIOR_NAMES if name in objects][:1] or list(objects.values())
    plain = isinstance(output, (tuple, list)) and not fields
    found = [
        posterior
        for part in (output if plain else parts)
        if not isinstance(part, Tensor)
        for posterior in _found(part, n, spread, mean_dim, depth + 1)
    ]
    if plain and not found and (pair := _positional(output, n, spread)):
        return [pair]
    return found


def _named(fields: Mapping[str, Any], n: int) -> _Pair | None:
    """Returns the mean and the spread among named values."""
    tensors = {_plain(name): (name, value) for name, value in reversed([*fields.items()]) if isinstance(value, Tensor)}
    mean_name, mean = next((tensors[name] for name in MEAN_NAMES if name in tensors), ("", None))
    if mean is None or mean.ndim < 2 or len(mean) != n:
        return None
    for kind, names in SPREAD_NAMES.items():
        for name in names:
            spread_name, spread = tensors.get(name, ("", None))
            if spread is not None and spread.shape in (mean.shape, mean.shape[1:], ()):
                return _Pair(mean, spread, kind, f"{mean_name} and {spread_name}, a mean and its")
    return None


def _plain(name: str) -> str:
    """Returns a name as the tables spell it; ``"z_log_var"`` gives ``"logvar"``."""
    return OF_LATENTS.sub("", name.lower().replace("_", ""))


def _positional(parts: tuple[Any, ...] | list[Any], n: int, spread: str) -> _Pair | None:
    """Returns the mean and the spread of a plain tuple or list: the only neighbours of one shape, or two of three."""
    rows = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point() and p.ndim > 1 and len(p) == n]
    pairs = [(first, second) for first, second in pairwise(rows) if first.shape == second.shape]
    if len(pairs) == 2 and len(rows) == 3:
        # a logarithm of the other spread itself could be one of variances as well as of standard deviations
        for std, logs in (rows[1:], rows[:0:-1]):
            if spread in ("auto", "log_variance") and _is_log_variance(logs, std):
                return _Pair(rows[0], logs, "log_variance", "a mean beside a standard deviation and its")
        if _sample_is_last(*rows, spread=spread):
            return _Pair(*pairs[0], "auto", "a sample after a mean and its")
        return _Pair(*pairs[1], "auto", "a sample before a mean and its")
    return _Pair(*pairs[0], "auto", "a mean and its") if len(pairs) == 1 else None


def _is_log_variance(values: Tensor, std: Tensor) -> bool:
    """Returns whether values are the logarithm of the square of others, number by number."""
    return bool((std > 0).all()) and torch.allclose(2 * std.double().log(), values.double(), rtol=1e-3, atol=1e-4)


def _sample_is_last(first: Tensor, second: Tensor, third: Tensor, *, spread: str) -> bool:
    """Returns whether three tensors are a mean, a spread and a sample, and not a sample, a mean and a spread."""
    positive = bool((second >= 0).all() and (third < 0).any())
    if spread in ("std", "variance"):
        return positive
    # what is sampled in evaluation mode may be the mean itself
    repeated = torch.equal(first, third) and not torch.equal(first, second)
    return repeated or (spread == "auto" and positive and second.numel() >= FEWEST_POSITIVE)


def all_positive(values: Tensor) -> bool:
    """Returns whether so many values are all above 0 that they are hardly means of Gaussians."""
    return values.numel() >= FEWEST_POSITIVE and bool((values > 0).all())


def _kind_of(mean: Tensor, values: Tensor, argument: str) -> str:
    """Returns ``"log_variance"`` where the values show that they are logarithms; raises a ValueError where they do not."""
    known = values[~values.isnan()]
    if not len(known) or bool((known < 0).any()) or not bool(known.any()):
        return "log_variance"
    if all_positive(mean):
        fix = (
            f"let {argument} return"
            if argument == "posterior"
            else "pass PosteriorKLMonitor(posterior=...) with a callable for"
        )
        raise ValueError(
            f"the posterior must be known, since both tensors of the pair are positive in each of {mean.numel()} values, as "
            "the parameters of a gamma or beta distribution are, and a mean and a log variance are not. To fix this, "
            f"{fix} the distribution itself, such as torch.distributions.Gamma(alpha, beta), and define its prior as the "
            "module's attribute prior; or pass PosteriorKLMonitor(spread=...) if it is a Gaussian with positive means."
        )
    raise ValueError(
        f"spread must be known, since each of {len(known)} values beside the mean is 0 or more, {float(known.min()):.3g} "
        f"to {float(known.max()):.3g}, which fits standard deviations and variances alike. To fix this, pass "
        'PosteriorKLMonitor(spread="std"), or spread="variance", or spread="log_variance" if they are logarithms.'
    )


def std_of(values: Tensor, kind: str) -> Tensor:
    """Returns the standard deviations, in float64, that values of a kind of spread stand for.

    Raises:
        ValueError: If a standard deviation or a variance is negative.
    """
    values = values.double()
    if kind.startswith("softplus"):
        values, kind = torch.nn.functional.softplus(values), kind.removeprefix("softplus_")
    if kind.startswith("log"):
        return (values if kind == "log_std" else values / 2).exp()
    if bool((values < 0).any()):
        raise ValueError(
            f"{kind} must be 0 or more, got {float(values.min()):.3g}. "
            'To fix this, pass PosteriorKLMonitor(spread="log_variance") or PosteriorKLMonitor(spread="log_std").'
        )
    return values if kind == "std" else values.sqrt()


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()
