from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    Evaluation,
    PosteriorKL,
    PosteriorKLMonitor,
    posterior_kl,
)
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator, SmallVAE
from tests.helpers.recorded_runs import RecordedPosteriors, Replay
from tests.helpers.running import batches, state_after_training, trainer


def updates(count: int = 10, n: int = 20, dims: int = 5) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "mean": torch.randn(n, dims, generator=generator) * torch.arange(dims),
            "log_variance": torch.randn(n, dims, generator=generator) - 1,
        }
        for _ in range(count)
    ]


CASE = Case(make=lambda: PosteriorKL(5, channels=5), updates=updates(), tolerance=1e-10)


def test_the_divergence_equals_that_of_torch_distributions(generator: torch.Generator) -> None:
    mean = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    log_variance = 2 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    expected = D.kl_divergence(D.Normal(mean, (log_variance / 2).exp()), D.Normal(torch.zeros(()).double(), 1.0))
    torch.testing.assert_close(posterior_kl(mean, log_variance), expected, rtol=1e-10, atol=1e-12)
    assert float(posterior_kl(torch.zeros(1), torch.full((1,), 1e-6))[0]) == pytest.approx(0.25e-12, rel=1e-3)


def test_results_are_means_over_all_rows() -> None:
    metric = PosteriorKL(5)
    for update in CASE.updates:
        metric.update(**update)
    mean, logs = (torch.cat([update[key] for update in CASE.updates]).double() for key in ("mean", "log_variance"))
    result = metric.compute()
    torch.testing.assert_close(result.per_dimension, posterior_kl(mean, logs).mean(0))
    torch.testing.assert_close(result.variance_of_mean, mean.var(0, correction=0))
    torch.testing.assert_close(result.total, result.per_dimension.sum())
    covariance = torch.cov(mean.T, correction=0) + logs.exp().mean(0).diag()
    torch.testing.assert_close(result.aggregate_variance, covariance.diagonal())
    prior = torch.distributions.MultivariateNormal(torch.zeros(5).double(), torch.eye(5).double())
    aggregate = torch.distributions.MultivariateNormal(mean.mean(0), covariance)
    torch.testing.assert_close(result.aggregate_kl, D.kl_divergence(aggregate, prior))
    # a dimension whose mean is always zero carries no information
    assert result.active.tolist() == [False, True, True, True, True]
    assert float(result.active_units) == 4
    assert float(result.dead_share) == pytest.approx(0.2)


def test_the_prior_itself_has_no_divergence_and_no_information() -> None:
    metric = PosteriorKL(3)
    metric.update(torch.zeros(10, 3), torch.zeros(10, 3))
    result = metric.compute()
    assert float(result.total) == 0
    assert float(result.aggregate_kl) == pytest.approx(0, abs=1e-12)
    assert float(result.active_units) == 0


def test_the_information_of_a_linear_gaussian_encoder_has_a_closed_form(generator: torch.Generator) -> None:
    """For x ~ N(0, 1) and z | x ~ N(a x, 1 - a^2), z has the prior, and I(x; z) = -log(1 - a^2) / 2."""
    x, a = torch.randn(200_000, 1, generator=generator, dtype=torch.float64), 0.9
    metric = PosteriorKL(1)
    metric.update(a * x, torch.full_like(x, 1 - a**2).log())
    expected = -0.5 * torch.log(torch.tensor(1 - a**2, dtype=torch.float64))
    torch.testing.assert_close(metric.compute().information, expected, rtol=0.01, atol=0.01)


def test_of_many_dimensions_only_the_variances_are_stored(generator: torch.Generator) -> None:
    metric = PosteriorKL(600)
    metric.update(torch.randn(50, 600, generator=generator), torch.zeros(50, 600))
    assert metric.products.shape == (600,)
    assert metric.compute().aggregate_kl.isfinite()


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    metric = PosteriorKL(2)
    metric.update(
        torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0]] * 2 + [[torch.inf, 0.0]])
    )
    result = metric.compute()
    assert float(result.invalid) == pytest.approx(2 / 3)
    assert result.per_dimension.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PosteriorKL(0), "latent_dim must be at least 1, got 0"),
        (lambda: PosteriorKL(2, threshold=-1), "threshold must be 0 or more, got -1"),
        (lambda: PosteriorKL(2).update(torch.zeros(3, 4), torch.zeros(3, 4)), r"mean must be \(N, 2\) of floats, got"),
        (lambda: PosteriorKL(2).update(torch.zeros(3, 2), torch.zeros(3)), r"log_variance must be \(N, 2\) of floats"),
        (lambda: posterior_kl(torch.zeros(3), torch.zeros(4)), "log_variance must have the shape of mean"),
        (lambda: PosteriorKLMonitor(spread="sigma"), "spread must be 'auto', 'log_variance'"),  # type: ignore[arg-type]
        (lambda: PosteriorKLMonitor(patience=0), "patience must be at least 1"),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- the monitor ----


class Posterior(ScriptedGenerator):
    """An encoder with known divergences that change a little each epoch; ``off(epoch)`` lists dimensions that are unused."""

    def __init__(self, off: Any = lambda epoch: [], kind: str = "pair", dims: int = 6) -> None:
        super().__init__()
        self.off, self.kind, self.dims = off, kind, dims

    def encode(self, images: Tensor) -> Any:
        generator = torch.Generator().manual_seed(self.current_epoch)
        mean = images.flatten(1)[:, 40 : 40 + self.dims] * 2 + 0.05 * torch.randn(1, self.dims, generator=generator)
        std = torch.full_like(mean, 0.2)
        for dim in self.off(self.current_epoch):
            mean[:, dim], std[:, dim] = 0, 1
        if self.kind == "normal":
            return D.Normal(mean, std)
        if self.kind == "independent":
            return D.Independent(D.Normal(mean, std), 1)
        if self.kind == "three":
            return mean, mean, std
        second = {"pair": 2 * std.log(), "std": std, "variance": std**2, "log_std": std.log()}[self.kind]
        return mean, second


@pytest.mark.parametrize("kind", ["pair", "std", "variance", "log_std", "normal", "independent"])
def test_every_form_of_a_posterior_gives_the_same_result(kind: str) -> None:
    spread = kind if kind in ("std", "variance", "log_std") else "log_variance"
    monitor = PosteriorKLMonitor(spread=spread, on_error="raise")  # type: ignore[arg-type]
    trainer(monitor, max_epochs=1).fit(Posterior(kind=kind), batches(16))
    expected = PosteriorKLMonitor(on_error="raise")
    trainer(expected, max_epochs=1).fit(Posterior(), batches(16))
    torch.testing.assert_close(monitor.result.per_dimension, expected.result.per_dimension, rtol=1e-4, atol=1e-4)
    assert float(monitor.result.total) > 3


class OneTensor(SmallVAE):
    """A VAE whose encoder returns mean and spread in one tensor, which the training step reads in its own way."""

    def __init__(self, kind: str, how: str = "times", is_augmented: bool = False) -> None:
        super().__init__()
        self.kind, self.how, self.is_augmented = kind, how, is_augmented

    def std(self, spread: Tensor) -> Tensor:
        offset = 1e-4 if self.how == "offset" else 0.0
        std = {
            "log_variance": lambda: (spread * 0.5).exp(),
            "log_std": spread.exp,
            "softplus_std": lambda: F.softplus(spread),
            "softplus_variance": lambda: F.softplus(spread).sqrt(),
            "unknown": lambda: spread.sigmoid(),
        }[self.kind]()
        return std + offset

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0] * 0.5 if self.is_augmented else batch[0]
        mean, spread = self.encode(images)
        std = self.std(spread)
        if self.how == "normal":
            z = D.Normal(mean, std).rsample()
        elif self.how == "function":
            z = torch.normal(mean.detach(), std.detach())
        else:
            z = torch.empty_like(std).normal_().mul(std).add_(mean)
        kl = D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum(1).mean()
        return (self.decode(z) - images).square().flatten(1).sum(1).mean() + 0.05 * kl


KINDS = ["log_variance", "log_std", "softplus_std", "softplus_variance"]


@pytest.mark.parametrize("how", ["times", "normal", "function", "offset"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_shows_what_the_spread_is(kind: str, how: str) -> None:
    monitor = PosteriorKLMonitor(on_error="raise", max_overhead=None)
    module = OneTensor(kind, how)
    trainer(monitor, max_epochs=2).fit(module, batches(8))
    images = monitor.view.reference.images
    with torch.no_grad():
        mean, spread = module.encode(images)
        posterior = D.Normal(mean, module.std(spread))
    expected = D.kl_divergence(posterior, D.Normal(torch.zeros(3), torch.ones(3))).mean(0)
    torch.testing.assert_close(monitor.result.per_dimension.float(), expected, rtol=2e-3, atol=1e-3)


def test_a_training_step_shows_it_where_encoder_and_decoder_are_layers() -> None:
    class OfLayers(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
            self.decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mean, scale = self.encoder(batch[0]).chunk(2, 1)
            std = F.softplus(scale) + 1e-4
            loss = (self.decoder(mean + torch.randn_like(std) * std) - batch[0]).square().sum()
            return loss + D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    monitor, module = PosteriorKLMonitor(on_error="raise"), OfLayers()
    trainer(monitor, max_epochs=2).fit(module, batches(8))
    with torch.no_grad():
        mean, scale = module.encoder(monitor.view.reference.images).chunk(2, 1)
    posterior = D.Normal(mean, F.softplus(scale) + 1e-4)
    expected = D.kl_divergence(posterior, D.Normal(torch.zeros(4), torch.ones(4))).mean(0)
    torch.testing.assert_close(monitor.result.per_dimension.float(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["log_variance", "softplus_std"])
def test_a_training_step_that_augments_its_images_shows_it_too(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Augmenting(OneTensor):
        def encode(self, images: Tensor) -> Any:
            return self.encoder_net(images).chunk(2, 1)

    with caplog.at_level("INFO"):
        monitor = PosteriorKLMonitor(on_error="raise")
        trainer(monitor, max_epochs=1).fit(Augmenting(kind, is_augmented=True), batches(8))
    assert "training does not show" not in caplog.text
    assert ("whose softplus is the std" in caplog.text) == (kind == "softplus_std")


@pytest.mark.parametrize("spread", ["auto", "log_variance"])
def test_a_spread_that_is_assumed_is_said_once(spread: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        monitor = PosteriorKLMonitor(spread=spread, on_error="raise")
        trainer(monitor, max_epochs=3).fit(OneTensor("unknown"), batches(8))
    assert caplog.text.count("taken for a log variance, which training does not show") == (spread == "auto")


@pytest.mark.parametrize(("spread", "alarms"), [("auto", False), ("log_variance", True)])
def test_an_unused_latent_whose_divergence_contradicts_it_is_none_where_the_spread_is_assumed(
    spread: Any, alarms: bool
) -> None:
    class Far(ScriptedGenerator):
        def encode(self, images: Tensor) -> Any:
            return torch.zeros(len(images), 4), torch.full((len(images), 4), -6.0)

    monitor, stopping = PosteriorKLMonitor(spread=spread, on_error="raise"), CollapseStopping(action="warn")
    with pytest.warns(CollapseWarning, match="none of 4") if alarms else nullcontext():
        trainer(monitor, stopping, max_epochs=8).fit(Far(), batches(16))
    assert float(monitor.result.total) > 5
    assert bool(stopping.alarms) == alarms


def test_training_is_bit_identical_where_a_training_step_shows_the_spread() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: OneTensor("softplus_std"))

    torch.testing.assert_close(run(PosteriorKLMonitor(on_error="raise")), run(), rtol=0, atol=0)


def test_an_encoder_with_three_outputs_of_a_positive_spread_raises_a_warning_with_the_fix() -> None:
    monitor = PosteriorKLMonitor()
    with pytest.warns(DiagnosticWarning, match=r"spread must be known.*pass PosteriorKLMonitor\(spread=\"std\"\)"):
        trainer(monitor, max_epochs=1).fit(Posterior(kind="three"), batches(16))
    own = PosteriorKLMonitor(spread="std", on_error="raise")
    trainer(own, max_epochs=1).fit(Posterior(kind="three"), batches(16))
    cut = PosteriorKLMonitor(lambda module, images: module.encode(images)[1:], spread="std", on_error="raise")
    trainer(cut, max_epochs=1).fit(Posterior(kind="three"), batches(16))
    assert own.result is not None
    assert cut.result is not None
    torch.testing.assert_close(own.result.per_dimension, cut.result.per_dimension, rtol=1e-4, atol=1e-4)


class GammaPosterior(ScriptedGenerator):
    """As PyTorch-VAE's model of gamma distributions."""

    def encode(self, images: Tensor) -> list[Tensor]:
        pixels = images.flatten(1)
        return [pixels[:, :16].softmax(1), pixels[:, 16:32].softmax(1)]


class GammaPrior(GammaPosterior):
    prior = D.Gamma(2.0, 1.0)


def test_a_gamma_posterior_is_left_out_until_it_and_its_prior_are_stated() -> None:
    def gamma(module: Any, images: Tensor) -> D.Distribution:
        return D.Gamma(*module.encode(images))

    for monitor, message in (
        (PosteriorKLMonitor(), "the parameters of a gamma or beta distribution"),
        (
            PosteriorKLMonitor(gamma),
            r"the posterior is a Gamma and N\(0, 1\) is not its prior.*as GammaPosterior.prior",
        ),
    ):
        with pytest.warns(DiagnosticWarning, match=message):
            trainer(monitor, max_epochs=1).fit(GammaPosterior(), batches(16))
    own = PosteriorKLMonitor(gamma, on_error="raise")
    trainer(own, max_epochs=1).fit(GammaPrior(), batches(16))
    with torch.no_grad():
        alpha, beta = GammaPosterior().encode(own.view.reference.images)
    expected = D.kl_divergence(D.Gamma(alpha, beta), GammaPrior.prior).mean(0)
    assert own.result is not None
    torch.testing.assert_close(own.result.per_dimension, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_stated", [True, False])
def test_the_prior_that_is_assumed_of_other_posteriors_than_gaussians_is_said(
    is_stated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class OfLaplace(ScriptedGenerator):
        prior = D.Normal(0.0, 1.0) if is_stated else None

        def encode(self, images: Tensor) -> D.Distribution:
            return D.Laplace(images.flatten(1)[:, :4], torch.ones(len(images), 4))

    with caplog.at_level("INFO"):
        own = PosteriorKLMonitor(on_error="raise")
        trainer(own, max_epochs=2).fit(OfLaplace(), batches(16))
    assert own.result is not None
    assert caplog.text.count("whose prior is taken to be N(0, 1)") == (0 if is_stated else 1)


def test_a_module_without_an_encoder_raises_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="encode must be known"):
        trainer(PosteriorKLMonitor(), max_epochs=1).fit(ScriptedGenerator(), batches(16))
    with pytest.raises(ValueError, match="posterior must be a callable or name a method of Posterior, got 'inference'"):
        trainer(PosteriorKLMonitor("inference"), max_epochs=1).fit(Posterior(), batches(16))


def test_a_dimension_that_dies_is_found_and_named() -> None:
    monitor, stopping = PosteriorKLMonitor(on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="dimension 3 died: KL in nats fell from"):
        own = trainer(monitor, stopping, max_epochs=18)
        own.fit(Posterior(lambda epoch: [3] if epoch >= 12 else []), batches(16))
    assert stopping.alarms[0].names == ["dimension 3"]
    assert stopping.alarms[0].epoch < 17
    # the other dimensions still hold more than enough
    assert own.current_epoch == 18
    assert stopping.report()["state"] == "getting worse"


def test_a_posterior_that_collapses_is_reported_as_a_whole() -> None:
    monitor, stopping = PosteriorKLMonitor(on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="the latent vanished: KL in nats fell from"):
        trainer(monitor, stopping, max_epochs=30).fit(
            Posterior(lambda epoch: range(6) if epoch >= 12 else []), batches(16)
        )
    assert stopping.alarms[0].epoch < 16


def test_a_latent_that_was_never_used_is_reported() -> None:
    monitor, stopping = PosteriorKLMonitor(on_error="raise", patience=5), CollapseStopping()
    with pytest.warns(
        CollapseWarning, match=r"the latent collapsed: KL is 0.000 nats and none of 6 dimensions has been active for 5"
    ):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(Posterior(lambda epoch: range(6)), batches(16))
    # a model that is not trained yet may begin to use it
    assert own.current_epoch == 24


@pytest.mark.parametrize(("kl", "expected"), [([0.001] * 30, 20), ([0.001 + 0.004 * i for i in range(30)], None)])
def test_an_unused_latent_is_reported_after_patience_unless_it_is_filling(
    kl: list[float], expected: int | None
) -> None:
    # more evaluations in a row than the detector of other series compares
    monitor, replay = PosteriorKLMonitor(patience=20), Replay()
    result = PosteriorKL(2)
    result.update(torch.zeros(8, 2), torch.zeros(8, 2))
    for number, total in enumerate(kl, start=1):
        row = result.compute()._replace(per_dimension=torch.tensor([total / 2, total / 2]))
        replay.add(monitor, Evaluation(number, number, 0, monitor.observations(row)))
    assert [alarm.number for alarm in replay.judge.alarms] == ([expected] if expected else [])


def test_a_healthy_run_raises_no_alarm() -> None:
    monitor, stopping = PosteriorKLMonitor(on_error="raise"), CollapseStopping()
    trainer(monitor, stopping, max_epochs=25).fit(Posterior(), batches(16))
    assert stopping.alarms == []


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(PosteriorKLMonitor(on_error="raise"), max_epochs=2, logger=logger).fit(Posterior(), batches(16))
    seen = events(logger.log_dir)
    assert {
        "gendiag/posterior_kl/total",
        "gendiag/posterior_kl/active_units",
        "gendiag/posterior_kl/dimension_5",
    } <= set(seen.Tags()["scalars"])
    assert "gendiag/posterior_kl/panel" in seen.Tags()["images"]


def test_training_is_bit_identical_with_and_without_the_monitor() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    torch.testing.assert_close(run(PosteriorKLMonitor(on_error="raise")), run(), rtol=0, atol=0)


# ---- recorded runs ----

RUNS = RecordedPosteriors.read()
HEALTHY = sorted({run.model for run in RUNS if "healthy" in run.series})
FAULTS = sorted({fault for run in RUNS for fault in run.series} - {"healthy"})


def test_there_are_recordings_of_each_kind() -> None:
    assert (len(HEALTHY), len(FAULTS)) == (4, 5)


@pytest.mark.parametrize("model", HEALTHY)
def test_recorded_healthy_runs_raise_no_alarm(model: str) -> None:
    runs = [run for run in RUNS if run.model == model and "healthy" in run.series]
    assert len(runs) == 10
    assert [str(alarm) for run in runs for alarm in run.alarms()] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_recorded_collapse_is_found_and_named_in_time(fault: str) -> None:
    runs = [run for run in RUNS if fault in run.series]
    assert len(runs) == 10
    for run in runs:
        first = run.alarms(fault)[0]
        assert run.is_right(fault, first)
        # without gradients of the decoder, one dimension alone loses its divergence slowly
        assert first.epoch - run.begin(fault) < (16 if fault.startswith("dimension") else 9)


def test_of_very_many_dimensions_only_the_total_is_observed() -> None:
    metric = PosteriorKL(300)
    metric.update(torch.randn(20, 300), torch.zeros(20, 300))
    names = [observation.series.name for observation in PosteriorKLMonitor().observations(metric.compute())]
    assert names == ["the latent", "all of the latent"]


def test_posteriors_that_are_all_nan_are_not_reported_as_a_collapse() -> None:
    metric, monitor = PosteriorKL(2), PosteriorKLMonitor(patience=1)
    metric.update(torch.full((5, 2), torch.nan), torch.zeros(5, 2))
    result = metric.compute()
    assert float(result.invalid) == 1
    severity = {observation.series.name: observation.severity for observation in monitor.observations(result)}
    assert severity["all of the latent"] == 0
    assert math.isnan(severity["the latent"])
