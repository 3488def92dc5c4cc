"""Posteriors in what encoders of other people's models return, and their exact divergences."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributions as D
from scipy.integrate import quad
from torch import Tensor

from lightning_gendiag.model.posterior import Posterior, is_of_real_numbers, kl_to_prior, posterior_in

N, L = 4, 3
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.randn(N, L, generator=GENERATOR, dtype=torch.float64)
LOGS = torch.randn(N, L, generator=GENERATOR, dtype=torch.float64)
"""Log variances of either sign."""

STD, VARIANCE = (LOGS / 2).exp(), LOGS.exp()
SAMPLE = MEAN + STD * torch.randn(N, L, generator=GENERATOR, dtype=torch.float64)
FEATURES = torch.rand(N, 7)
KL = 0.5 * (MEAN**2 + VARIANCE - 1 - LOGS)


class DiagonalGaussianDistribution:
    """The posterior of ldm, sgm and diffusers."""

    def __init__(self, moments: Tensor) -> None:
        self.parameters, self.deterministic = moments, False
        self.mean, self.logvar = moments.chunk(2, 1)
        self.std, self.var = (self.logvar / 2).exp(), self.logvar.exp()

    def sample(self) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


class Lazy:
    """A posterior that computes its moments when they are read."""

    @property
    def loc(self) -> Tensor:
        return MEAN

    @property
    def scale(self) -> Tensor:
        return STD


OWN = DiagonalGaussianDistribution(torch.cat([MEAN, LOGS], 1))
Moments = namedtuple("Moments", ["mu", "sigma"])

OUTPUTS: dict[str, tuple[Any, str]] = {
    "tuple": ((MEAN, LOGS), "log_variance"),
    "list": ([MEAN, LOGS], "log_variance"),
    "mu and logvar": ({"mu": MEAN, "logvar": LOGS}, "log_variance"),
    "log_var of z": ({"z": SAMPLE, "z_mean": MEAN, "z_log_var": LOGS}, "log_variance"),
    "pythae": (OrderedDict(embedding=MEAN, log_covariance=LOGS), "log_variance"),
    "mean and std": ({"mean": MEAN, "std": STD}, "std"),
    "mean and variance": ({"mean": MEAN, "variance": VARIANCE}, "variance"),
    "older scvi": ({"qz_m": MEAN, "qz_v": VARIANCE, "z": SAMPLE}, "variance"),
    "log_sigma": ({"mu": MEAN, "log_sigma": LOGS / 2}, "log_std"),
    "named tuple": (Moments(MEAN, STD), "std"),
    "names of a namespace": (SimpleNamespace(mu_z=MEAN, logvar_z=LOGS), "log_variance"),
    "properties": (Lazy(), "std"),
    "ldm": (OWN, "log_variance"),
    "diffusers": (OrderedDict(latent_dist=OWN), "log_variance"),
    "diffusers, attribute": (SimpleNamespace(latent_dist=OWN), "log_variance"),
    "sgm": ((SAMPLE, {"posterior": OWN}), "log_variance"),
    "pair in a pair": ((FEATURES, (MEAN, LOGS)), "log_variance"),
    "sample first": ((SAMPLE, MEAN, LOGS), "log_variance"),
    "mean again first": ((MEAN, MEAN, LOGS), "log_variance"),
    "mean again last": ((MEAN, LOGS, MEAN), "log_variance"),
    "features first": ((FEATURES, MEAN, LOGS), "log_variance"),
    "features last": ((MEAN, LOGS, FEATURES), "log_variance"),
    "and a loss": ((MEAN, LOGS, torch.zeros(())), "log_variance"),
    "normal": (D.Normal(MEAN, STD), "auto"),
    "independent": (D.Independent(D.Normal(MEAN, STD), 1), "auto"),
    "scvi": ({"z": SAMPLE, "ql": D.Normal(MEAN[:, :1], 1.0), "qz": D.Normal(MEAN, STD)}, "auto"),
    "distribution and sample": ((D.Normal(MEAN, STD), SAMPLE), "auto"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_posteriors_are_found(kind: str) -> None:
    output, spread = OUTPUTS[kind]
    posterior = posterior_in(output, N)
    assert posterior.spread == spread
    torch.testing.assert_close(posterior.mean, MEAN)
    torch.testing.assert_close(posterior.std, STD)
    torch.testing.assert_close(kl_to_prior(posterior), KL)


@pytest.mark.parametrize(
    ("spread", "values"), [("log_variance", LOGS), ("variance", VARIANCE), ("log_std", LOGS / 2), ("std", STD)]
)
def test_a_stated_spread_is_taken(spread: str, values: Tensor) -> None:
    outputs = [
        (MEAN, values),
        (FEATURES, MEAN, values),
        (SAMPLE, MEAN, values),
        {"mean": MEAN, "unknown": (MEAN, values)},
    ]
    for output in outputs + ([(MEAN, values, SAMPLE)] if not spread.startswith("log") else []):
        posterior = posterior_in(output, N, spread)
        assert posterior.spread == spread
        torch.testing.assert_close(posterior.std, STD)
        torch.testing.assert_close(kl_to_prior(posterior), KL)
        assert posterior.described.endswith(spread.replace("_", " "))


@pytest.mark.parametrize("values", [STD, VARIANCE, torch.ones(N, L), torch.rand(N, L).clamp(min=0.5) - 0.5])
def test_positive_spreads_are_not_guessed(values: Tensor) -> None:
    """A pair of a mean and a standard deviation was read as a log variance, which gave wrong nats in silence."""
    with pytest.raises(ValueError, match=r"spread must be known.*spread=\"std\".*spread=\"variance\"") as caught:
        posterior_in((MEAN, values), N)
    assert f"each of {N * L} values beside the mean is 0 or more, {float(values.min()):.3g} to" in str(caught.value)
    for output in ((SAMPLE, MEAN, values), (FEATURES, MEAN, values)):
        with pytest.raises(ValueError, match="spread must be known"):
            posterior_in(output, N)


@pytest.mark.parametrize("argument", ["encode", "posterior"])
def test_two_positive_parameters_are_no_mean_and_spread(argument: str) -> None:
    """Shape and rate of gamma distributions, as PyTorch-VAE's encoder returns them, have no spread= that fits."""
    alpha, beta = torch.rand(N, 8).softmax(1), torch.rand(N, 8).softmax(1)
    message = "both tensors of the pair are positive in each of 32 values.*distributions.Gamma.*prior"
    with pytest.raises(ValueError, match=message) as caught:
        posterior_in([alpha, beta], N, argument=argument)
    assert ("pass PosteriorKLMonitor(posterior=...)" in str(caught.value)) == (argument == "encode")
    # who knows that it is a Gaussian says so
    torch.testing.assert_close(posterior_in([alpha, beta], N, "std").std, beta.double())


@pytest.mark.parametrize("spread", ["auto", "log_variance"])
def test_a_standard_deviation_is_known_beside_its_log_variance(spread: str) -> None:
    for output in ((MEAN, STD, 2 * STD.log()), (MEAN, 2 * STD.log(), STD)):
        posterior = posterior_in(output, N, spread)
        torch.testing.assert_close(posterior.std, STD.double())
        torch.testing.assert_close(posterior.mean, MEAN.double())


def test_what_was_given_as_the_posterior_is_not_suggested_again() -> None:
    with pytest.raises(
        ValueError, match=r"posterior must return a pair .* got \(4, 3\). To fix this, let it return one"
    ):
        posterior_in(MEAN, N, argument="posterior")


def test_distributions_of_all_real_numbers_are_told_from_others() -> None:
    two = torch.ones(N, 2)
    real = [D.Normal(two, 1.0), D.Independent(D.Laplace(two, 1.0), 1), D.MultivariateNormal(two, torch.eye(2))]
    assert all(is_of_real_numbers(distribution) for distribution in real)
    others = [D.Gamma(two, 1.0), D.Independent(D.Beta(two, two), 1), D.Dirichlet(two), D.OneHotCategorical(two)]
    assert not any(is_of_real_numbers(distribution) for distribution in others)


def test_variances_before_a_sample_are_not_taken_for_means() -> None:
    """scvi's older encoders return (mean, variance, sample), and a sample has negative values as logarithms have."""
    mean, variance = MEAN.repeat(1, 4), VARIANCE.repeat(1, 4)
    with pytest.raises(ValueError, match="spread must be known"):
        posterior_in((mean, variance, SAMPLE.repeat(1, 4)), N)


def test_names_of_classes_whose_pairs_hold_standard_deviations() -> None:
    for owner in ("AutoencoderKL", "SPADEAutoencoderKL", "AutoencoderKlMaisi"):
        torch.testing.assert_close(posterior_in((MEAN, STD), N, owner=owner).std, STD)
    torch.testing.assert_close(posterior_in((MEAN, LOGS), N, "log_variance", owner="AutoencoderKL").std, STD)
    torch.testing.assert_close(posterior_in(OWN, N, owner="AutoencoderKL").std, STD)


@pytest.mark.parametrize("values", [torch.zeros(N, L), torch.full((N, L), -2.0), torch.full((N, L), math.nan)])
def test_constant_log_variances_are_a_start(values: Tensor) -> None:
    posterior = posterior_in((MEAN, values), N)
    torch.testing.assert_close(posterior.std, (values / 2).exp().double(), equal_nan=True)
    expected = 0.5 * (MEAN**2 + values.exp() - 1 - values)
    torch.testing.assert_close(kl_to_prior(posterior), expected.double(), equal_nan=True)


def test_one_tensor_is_split_where_its_length_is_known() -> None:
    both = torch.cat([MEAN, LOGS], 1)
    torch.testing.assert_close(kl_to_prior(posterior_in(both, N, mean_dim=L)), KL)
    spatial = both[:, :, None, None].expand(N, 2 * L, 2, 2)
    torch.testing.assert_close(kl_to_prior(posterior_in(spatial, N, mean_dim=L)), KL.repeat_interleave(4, 1))
    for length in (None, 2 * L):
        with pytest.raises(ValueError, match=r"encode must return a pair .* got \(4, 6\)"):
            posterior_in(both, N, mean_dim=length)


def test_shared_spreads_hold_for_all() -> None:
    for values in (torch.tensor(0.5), torch.full((L,), 0.5)):
        assert torch.equal(kl_to_prior(posterior_in({"mu": MEAN, "std": values}, N)), kl_to_prior(
            posterior_in({"mu": MEAN, "std": torch.full((N, L), 0.5)}, N)
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (MEAN, r"got \(4, 3\)"),
        ((MEAN,), r"got \(\(4, 3\)\)"),
        ((MEAN, LOGS[:, :2]), r"got \(\(4, 3\), \(4, 2\)\)"),
        ((MEAN[:2], LOGS[:2]), "of 4 inputs"),
        (D.Normal(MEAN[:2], 1.0), "got Normal"),
        (SimpleNamespace(mean=MEAN), "got SimpleNamespace"),
        ({"embedding": MEAN, "log_concentration": LOGS[:, :1]}, "log_concentration"),
        ((MEAN, torch.zeros(N, L, dtype=torch.long), torch.zeros(())), "encode must return a pair"),
        ([(MEAN, LOGS), (MEAN, LOGS)], "got 2 posteriors"),
        ([D.Normal(MEAN, STD)] * 3, "got 3 posteriors"),
        ((MEAN, LOGS, SAMPLE, SAMPLE), "encode must return a pair"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_posterior_is_refused(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior_in(output, N)


@pytest.mark.parametrize(
    ("output", "spread", "message"),
    [
        ((MEAN, LOGS), "sigma", "spread must be 'auto', 'log_variance'"),
        ((MEAN, LOGS), "std", r"std must be 0 or more, got -.*spread=\"log_variance\""),
        ({"mean": MEAN, "variance": LOGS}, "auto", "variance must be 0 or more, got -"),
    ],
)
def test_a_wrong_spread_is_refused(output: Any, spread: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior_in(output, N, spread)


def of(distribution: D.Distribution) -> Posterior:
    return posterior_in(distribution, distribution.batch_shape[0])


def test_tiny_divergences_and_half_precision_keep_their_digits() -> None:
    tiny = torch.full((1, 1), 1e-6, dtype=torch.float64)
    for output in ((0 * tiny, -tiny), (0 * tiny.float(), -tiny.float())):
        assert float(kl_to_prior(posterior_in(output, 1))) == pytest.approx(0.25e-12, rel=1e-3)
    half = posterior_in((MEAN.bfloat16(), LOGS.bfloat16()), N)
    torch.testing.assert_close(kl_to_prior(half), KL, rtol=0.02, atol=0.02)


def test_a_deviation_of_zero_has_an_infinite_divergence() -> None:
    divergence = kl_to_prior(posterior_in((MEAN, 0 * STD), N, "std"))
    assert divergence.isinf().all()


@pytest.mark.parametrize(
    "distribution",
    [
        D.Normal(torch.tensor([[0.7]]).double(), 0.4),
        D.Laplace(torch.tensor([[0.7]]).double(), 0.4),
        D.Beta(torch.tensor([[2.0]]).double(), 3.0),
        D.Gamma(torch.tensor([[2.0]]).double(), 3.0),
        D.Gumbel(torch.tensor([[0.7]]).double(), 0.4),
        D.Exponential(torch.tensor([[2.0]]).double()),
        D.Uniform(torch.tensor([[-0.5]]).double(), 1.5),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_divergences_from_the_normal_equal_integrals(distribution: D.Distribution) -> None:
    """Numerical integration of q log (q / p), whose own error is below 1e-6."""

    def integrand(z: float) -> float:
        value = torch.tensor(z, dtype=torch.float64)
        log_q = float(distribution.log_prob(value))
        return math.exp(log_q) * (log_q + z * z / 2 + math.log(2 * math.pi) / 2)

    low, high = {"Beta": (0, 1), "Gamma": (0, 12), "Exponential": (0, 12), "Uniform": (-0.5, 1.5 - 1e-9)}.get(
        type(distribution).__name__, (-12, 12)
    )
    points = [0.7] if low < 0.7 < high else None
    expected = quad(integrand, low + 1e-12, high, points=points, limit=200)[0]
    found = kl_to_prior(of(distribution))
    assert found.shape == (1, 1)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-4)


def full_covariance(n: int = N, dims: int = L) -> D.MultivariateNormal:
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(n, dims, dims, generator=generator, dtype=torch.float64).tril(-1)
    scale = torch.rand(n, dims, generator=generator, dtype=torch.float64) + 0.3
    return D.MultivariateNormal(MEAN[:n, :dims], scale_tril=factor + scale.diag_embed())


def test_a_full_covariance_divides_the_exact_total_by_the_chain_rule() -> None:
    """Each dimension's conditional comes from regressing it on the earlier ones."""
    posterior = full_covariance()
    found = kl_to_prior(of(posterior))
    standard = D.MultivariateNormal(torch.zeros(L).double(), torch.eye(L).double())
    torch.testing.assert_close(found.sum(1), D.kl_divergence(posterior, standard))
    for i in range(L):
        covariance = posterior.covariance_matrix
        cross = covariance[:, i, :i]
        explained = (cross[:, None] @ torch.linalg.inv(covariance[:, :i, :i]) @ cross[:, :, None]).view(N)
        left = covariance[:, i, i] - explained
        expected = 0.5 * (MEAN[:, i] ** 2 + explained + left - 1 - left.log())
        torch.testing.assert_close(found[:, i], expected)
    assert (found >= 0).all()


def test_low_rank_and_diagonal_covariances_are_those_of_full_ones() -> None:
    factor = torch.randn(N, L, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = D.LowRankMultivariateNormal(MEAN, factor, VARIANCE)
    torch.testing.assert_close(kl_to_prior(of(low)), kl_to_prior(of(D.MultivariateNormal(MEAN, low.covariance_matrix))))
    torch.testing.assert_close(kl_to_prior(of(D.MultivariateNormal(MEAN, scale_tril=STD.diag_embed()))), KL)


LOC, SCALE = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 1.0, 2.0])
PRIORS = [
    D.Normal(LOC, SCALE),
    D.Independent(D.Normal(LOC, SCALE), 1),
    D.MultivariateNormal(LOC, scale_tril=SCALE.diag()),
    D.Normal(LOC[None], SCALE[None]),
]


@pytest.mark.parametrize("prior", PRIORS, ids=["normal", "independent", "multivariate", "one row"])
def test_a_gaussian_prior_of_the_module_takes_the_place_of_the_standard_one(prior: D.Distribution) -> None:
    expected = D.kl_divergence(D.Normal(MEAN, STD), D.Normal(LOC.double(), SCALE.double()))
    torch.testing.assert_close(kl_to_prior(posterior_in((MEAN, LOGS), N), prior), expected)
    total = D.kl_divergence(full_covariance(), D.MultivariateNormal(LOC.double(), scale_tril=SCALE.diag().double()))
    torch.testing.assert_close(kl_to_prior(of(full_covariance()), prior).sum(1), total)


def test_a_prior_that_is_no_product_gives_the_total() -> None:
    prior = D.MultivariateNormal(torch.zeros(L).double(), torch.eye(L).double() + 0.5)
    found = kl_to_prior(of(full_covariance()), prior)
    torch.testing.assert_close(found, D.kl_divergence(full_covariance(), prior)[:, None])


LOGITS = torch.randn(N, 2, 5, generator=torch.Generator().manual_seed(3)).double()


ENTROPY_LOST = math.log(5) + (LOGITS.softmax(2) * LOGITS.log_softmax(2)).sum(2)
"""Divergence from 5 equal categories."""

ZEROS = torch.zeros(L).double()
FAMILIES: dict[str, tuple[D.Distribution, D.Distribution, Tensor]] = {
    "categorical": (D.Categorical(logits=LOGITS), D.Categorical(torch.ones(5)), ENTROPY_LOST),
    "one-hot": (D.OneHotCategorical(logits=LOGITS), D.OneHotCategorical(torch.ones(2, 5)), ENTROPY_LOST),
    "log-normal": (D.LogNormal(MEAN, STD), D.LogNormal(ZEROS, 1.0), KL),
    "laplace": (
        D.Independent(D.Laplace(MEAN, 1.0), 1),
        D.Independent(D.Laplace(ZEROS, 1.0), 1),
        MEAN.abs() + (-MEAN.abs()).exp() - 1,
    ),
    "bernoulli": (
        D.Bernoulli(torch.full((N, L), 0.25).double()),
        D.Bernoulli(0.5),
        torch.full((N, L), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)).double(),
    ),
    # of log(x) the mean is the digamma function of 1 less that of 3, which is -3/2, and 60 is 5! / 2!
    "dirichlet": (
        D.Dirichlet(torch.ones(N, L)),
        D.Dirichlet(torch.full((L,), 2.0)),
        torch.full((N, 1), 4.5 - math.log(60)).double(),
    ),
}


@pytest.mark.parametrize(("posterior", "prior", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_other_families_have_the_divergence_from_their_own_prior(
    posterior: D.Distribution, prior: D.Distribution, expected: Tensor
) -> None:
    torch.testing.assert_close(kl_to_prior(of(posterior), prior), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "posterior",
    [
        D.Categorical(logits=LOGITS),
        D.OneHotCategorical(logits=LOGITS),
        D.RelaxedOneHotCategorical(torch.tensor(0.5), logits=LOGITS),
        D.Bernoulli(logits=MEAN),
        D.VonMises(MEAN, STD),
        D.StudentT(2.0, MEAN, STD),
        D.LogNormal(MEAN, STD),
        D.MixtureSameFamily(D.Categorical(torch.ones(N, 2)), D.Normal(MEAN[:, :2], 1.0)),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_without_a_closed_form_there_are_no_nats(posterior: D.Distribution) -> None:
    name = type(posterior).__name__
    with pytest.raises(
        ValueError, match=rf"posterior must have a closed divergence to the prior, got {name} and N\(0, 1\)"
    ):
        kl_to_prior(of(posterior))
    with pytest.raises(ValueError, match=f"got {name} and HalfCauchy"):
        kl_to_prior(of(posterior), D.Independent(D.HalfCauchy(torch.ones(L)), 1))


def test_moments_are_those_of_the_distribution_or_none() -> None:
    posterior = of(D.Laplace(MEAN.float(), STD.float()))
    torch.testing.assert_close(posterior.std, math.sqrt(2) * STD, rtol=1e-6, atol=0)
    assert posterior.mean is not None
    assert posterior.mean.dtype == torch.float64
    assert posterior.described == "a Laplace"
    for without in (D.Categorical(logits=LOGITS), D.RelaxedOneHotCategorical(torch.tensor(0.5), logits=LOGITS)):
        assert of(without).mean is None
        assert of(without).std is None
    diverged = posterior_in((MEAN * math.nan, LOGS), N)
    assert diverged.mean is not None
    assert diverged.mean.isnan().all()


def test_spatial_latents_are_flattened() -> None:
    mean, logs = (rows[:, :, None, None].repeat(1, 1, 2, 5) for rows in (MEAN, LOGS))
    assert torch.equal(kl_to_prior(posterior_in((mean, logs), N)), kl_to_prior(
        posterior_in((mean.flatten(1), logs.flatten(1)), N)
    ))  # fmt: skip
    assert kl_to_prior(of(D.Independent(D.Normal(mean, 1.0), 3))).shape == (N, 30)
