from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from example_models.diffusion import Diffusion
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
    TimestepLoss,
    TimestepLossMonitor,
    band_edges,
    timestep_loss,
)
from lightning_gendiag.model.batches import first_rows
from lightning_gendiag.model.denoising import TrainingStep, find_denoiser, predict, record, takes_times
from lightning_gendiag.model.generators import seed_all
from tests.helpers.cases import Case
from tests.helpers.denoisers import (
    DDPM,
    EDM,
    Flow,
    Latent,
    LearnedVariance,
    Manual,
    OneLevel,
    Rows,
    WithAverage,
)
from tests.helpers.logs import events
from tests.helpers.models import SmallVAE, TinyGAN
from tests.helpers.running import batches, loading, state_after_training, trainer


def updates(count: int = 10, n: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    sides = ("train", "held_out", "raw")
    given = []
    for index in range(count):
        inputs, targets = torch.randn(2, n, 1, 4, 4, generator=generator)
        levels, errors = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
        weights = torch.rand(n, generator=generator)
        given.append(
            {"errors": errors, "levels": levels, "inputs": inputs, "targets": targets, "weights": weights,
             "side": sides[index % 3]}
        )  # fmt: skip
    return given


CASE = Case(make=lambda: TimestepLoss([-3.0, -0.5, 0.5, 3.0]), updates=updates(), tolerance=1e-9)


# ---- the numbers ----


def test_the_loss_of_each_band_equals_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets, inputs = torch.randn(3, 300, 2, 5, generator=generator)
    levels = torch.randn(300, generator=generator).double()
    result = timestep_loss(predictions, targets, levels, inputs, edges=5)
    edges = np.quantile(levels.numpy(), np.linspace(0, 1, 6))
    assert result.edges.numpy() == pytest.approx(edges, rel=1e-12)
    for b in range(5):
        # an edge belongs to the band below it
        rows = [i for i in range(300) if (b == 0 or levels[i] > edges[b]) and (b == 4 or levels[i] <= edges[b + 1])]
        errors = [float((predictions[i].double() - targets[i].double()).square().mean()) for i in rows]
        assert float(result.loss[b]) == pytest.approx(np.mean(errors), rel=1e-9)
        assert float(result.errors[0, b]) == pytest.approx(np.std(errors, ddof=1) / math.sqrt(len(rows)), rel=1e-9)
        t, x = (rows_of[rows].numpy().astype(float).ravel() for rows_of in (targets, inputs))
        design = np.stack([x, np.ones_like(x)], 1)
        fit = design @ np.linalg.lstsq(design, t, rcond=None)[0]
        assert float(result.linear[b]) == pytest.approx(np.mean((t - fit) ** 2), rel=1e-9)
        assert float(result.power[b]) == pytest.approx(np.mean(t**2), rel=1e-9)


@pytest.mark.parametrize("angle", [0.2, 0.8, 1.4])
def test_the_best_multiple_of_the_input_is_that_of_wiener(angle: float) -> None:
    """For data N(0, s²) at scales a and b, the best prediction of the noise leaves a²s² / (a²s² + b²)."""
    generator = torch.Generator().manual_seed(1)
    data, noise = 0.5 * torch.randn(2000, 50, generator=generator), torch.randn(2000, 50, generator=generator)
    a, b = math.cos(angle), math.sin(angle)
    levels = torch.linspace(0, 1, 2000)
    result = timestep_loss(torch.zeros_like(noise), noise, levels, a * data + b * noise, edges=1)
    assert float(result.linear) == pytest.approx(0.25 * a * a / (0.25 * a * a + b * b), rel=0.02)
    # predicting zero is that much worse
    assert float(result.excess) == pytest.approx(1 - float(result.linear / result.power), rel=1e-9)


def test_a_perfect_prediction_has_no_loss_and_zeros_have_a_relative_loss_of_one() -> None:
    targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(40.0)
    assert timestep_loss(targets, targets, levels).loss.tolist() == [0] * 8
    assert timestep_loss(torch.zeros_like(targets), targets, levels).relative.tolist() == pytest.approx([1] * 8)


def test_rows_with_nan_are_counted_and_a_band_without_others_fails() -> None:
    levels = torch.tensor([0.1, 0.2, 0.8, 0.9, math.nan])
    metric = TimestepLoss([0.0, 0.5, 1.0])
    metric.update(torch.tensor([1.0, 3.0, math.nan, math.inf, 7.0]), levels)
    result = metric.compute()
    assert result.losses[0].tolist() == pytest.approx([2.0, math.nan], nan_ok=True)
    assert float(result.invalid) == 0.5
    assert result.fails.tolist() == [False, True]
    # nothing at all is no fault
    assert not TimestepLoss([0.0, 1.0]).compute().fails.any()


def test_bands_hold_equally_many_levels_and_constant_levels_are_refused() -> None:
    levels = torch.randn(800, generator=torch.Generator().manual_seed(0))
    counts = torch.histogram(levels.double(), band_edges(levels, 8)).hist
    assert counts.tolist() == pytest.approx([100] * 8, abs=1)
    with pytest.raises(ValueError, match="levels must hold at least two different numbers, got 1"):
        band_edges(torch.ones(10), 4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TimestepLoss([1.0, 0.0]), r"edges must be \(B \+ 1,\) rising numbers, got \[1.0, 0.0\]"),
        (lambda: TimestepLoss([0.0, math.nan]), "edges must be"),
        (lambda: TimestepLoss([0.0, 1.0]).update(torch.zeros(2, 3), torch.zeros(2)), r"errors must be \(N,\)"),
        (lambda: TimestepLoss([0.0, 1.0]).update(torch.zeros(2), torch.zeros(3)), r"levels must be \(2,\)"),
        (
            lambda: TimestepLoss([0.0, 1.0]).update(torch.zeros(2), torch.zeros(2), inputs=torch.zeros(3, 4)),
            r"inputs must be \(2, \.\.\.\)",
        ),
        (lambda: TimestepLoss([0.0, 1.0]).update(torch.zeros(2), torch.zeros(2), side="test"), "side must be one of"),
        (lambda: timestep_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), r"predictions must be \(2, 4\)"),
        (lambda: TimestepLossMonitor(num_bands=1), "num_bands must be at least 2, got 1"),
        (lambda: TimestepLossMonitor(loss=3), "loss must be a callable or name a method, got 3"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- what is found in a training step ----


def step_of(module: LightningModule, size: int = 8, n: int = 64) -> TrainingStep:
    images, labels = (rows[:n] for rows in digits(size))
    module.eval()
    vars(module)["log"] = lambda *args, **kwargs: None
    return TrainingStep(module, (images, labels), n, lambda seed: seed_all(seed, torch.device("cpu")))


def cosine(times: Tensor) -> Tensor:
    return 2 * (times * math.pi / 2).tan().log()


def of_ddpm(times: Tensor) -> Tensor:
    signal = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[times.long()].double()
    return ((1 - signal) / signal).log()


MODELS: dict[str, tuple[Any, str, str, str, Any]] = {
    "noise": (DDPM, "unet", "the noise", "variance-preserving", of_ddpm),
    "data": (lambda: DDPM("data"), "unet", "the data", "variance-preserving", of_ddpm),
    "velocity": (lambda: DDPM("velocity"), "unet", "the velocity", "variance-preserving", of_ddpm),
    "min-SNR": (lambda: DDPM("velocity", "min-SNR"), "unet", "the velocity", "variance-preserving", of_ddpm),
    "half": (lambda: DDPM("noise", "half"), "unet", "the noise", "variance-preserving", of_ddpm),
    "huber": (lambda: DDPM("velocity", "huber"), "unet", "the velocity", "variance-preserving", of_ddpm),
    "absolute": (lambda: DDPM("data", "absolute"), "unet", "the data", "variance-preserving", of_ddpm),
    "variance": (LearnedVariance, "model.net", "the noise", "variance-preserving", cosine),
    "example": (Diffusion, "", "the velocity", "variance-preserving", cosine),
    "flow": (Flow, "field", "the velocity of the flow", "straight", lambda t: 2 * ((1 - t) / t).log()),
    # noise beside that of the path is part of what is not noise
    "wide": (lambda: Flow(width=0.1), "field", "", "", None),
    "paired": (
        lambda: Flow(paired=True), "field", "the velocity of the flow", "straight", lambda t: 2 * ((1 - t) / t).log()
    ),
    "rows": (Rows, "model", "the velocity of the flow to noise", "straight", None),
    "exploding": (EDM, "denoiser", "the data", "variance-exploding", lambda sigma: 2 * sigma.log()),
    "latent": (Latent, "unet", "the noise", "", None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_network_its_target_and_its_schedule_are_found(name: str) -> None:
    make, path, prediction, schedule, level = MODELS[name]
    torch.manual_seed(0)
    module = make()
    step = step_of(module, 16 if name in ("example", "latent") else 8)
    with torch.no_grad():
        found, template = find_denoiser(step, 0)
        batch = record(step, found, 12, template)
        errors = (predict(module, found, batch) - batch.targets).square().flatten(1).mean(1)
        loss, _ = step.run(12)
    assert (found.path, found.prediction, found.schedule) == (path, prediction, schedule)
    assert batch.targets.isfinite().all()
    if level is not None:
        assert batch.times is not None
        # at the ends, one float32 number is another level
        middle = batch.levels.abs() < 6
        assert int(middle.sum()) > 40
        assert batch.levels[middle].numpy() == pytest.approx(level(batch.times)[middle].numpy(), abs=0.02)
    if batch.weights.isfinite().all() and name != "variance":
        # the loss is the weighted mean of these errors, up to a factor that is the same for all seeds
        weighted = float((batch.weights * errors).mean())
        with torch.no_grad():
            other = record(step, found, 13, template)
            again = (predict(module, found, other) - other.targets).square().flatten(1).mean(1)
            second, _ = step.run(13)
        assert loss is not None
        assert second is not None
        if name in ("noise", "data", "velocity", "example", "flow", "wide", "paired", "rows", "latent"):
            assert float(loss) == pytest.approx(weighted, rel=1e-4)
            assert float(second) == pytest.approx(float((other.weights * again).mean()), rel=1e-4)


def test_rows_without_weight_are_known_and_have_the_usual_target() -> None:
    module = DDPM("noise", "half")
    step = step_of(module)
    with torch.no_grad():
        found, template = find_denoiser(step, 0)
        batch = record(step, found, 12, template)
    assert batch.times is not None
    assert torch.equal(batch.weights == 0, batch.times >= 500)
    # noise of any level has a mean square of one
    assert batch.targets.square().flatten(1).mean(1).numpy() == pytest.approx(np.ones(64), abs=0.6)


def test_levels_are_spread_evenly_over_what_training_draws() -> None:
    module = DDPM()
    step = step_of(module, n=50)
    with torch.no_grad():
        found, template = find_denoiser(step, 0)
        batch = record(step, found, 12, template)
    assert batch.times is not None
    assert ((batch.times.sort().values / 20).floor() == torch.arange(50)).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (OneLevel, "must add normal noise of several levels to data"),
        (SmallVAE, "must add normal noise of several levels to data"),
    ],
)
def test_other_models_are_refused_with_a_reason(make: Any, match: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        find_denoiser(step_of(make()), 0)


class OtherNoise(DDPM):
    """Gives its network noisy data in another way than alone, or first."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.unet = Joint({"condition": 2, "classes": 11, "mask beside it": 2}.get(way, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        noise = torch.randn_like(x)
        if self.way == "centred":
            noise = noise - noise.mean((1, 2, 3), keepdim=True)
        t = torch.rand(len(x))
        noisy = x + (t + 0.1)[:, None, None, None] * noise
        mask = (torch.rand_like(x) < 0.5).to(x)
        classes = F.one_hot(labels, 10)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        given = {
            "condition": lambda: torch.cat([x.flip(0), noisy], 1),
            "classes": lambda: torch.cat([classes, noisy], 1),
            "mask": lambda: noisy * mask + x * (1 - mask),
            "mask beside it": lambda: torch.cat([noisy * mask + x * (1 - mask), mask], 1),
            "centred": lambda: noisy,
        }[self.way]()
        return F.mse_loss(self.unet(given, t), noise)


class Joint(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t[:, None, None, None]


class Sliced(DDPM):
    """Sliced score matching (https://arxiv.org/abs/1905.07088)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        t = torch.rand(len(batch[0]))
        x = (batch[0] + t[:, None, None, None] * torch.randn_like(batch[0])).requires_grad_()
        score, v = self.unet(x, t), torch.randn_like(x)
        [slope] = torch.autograd.grad((score * v).sum(), x, create_graph=True)
        return (score.square() / 2 + slope * v).mean()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(OtherNoise, "condition"), "they are joined with other data, which come first"),
        (partial(OtherNoise, "classes"), "they are joined with other data, which come first"),
        (partial(OtherNoise, "mask"), "only a part of the data is noisy, as behind a mask"),
        (partial(OtherNoise, "mask beside it"), "only a part of the data is noisy, as behind a mask"),
        (partial(OtherNoise, "centred"), "the draw is changed before, as where its mean is subtracted"),
        (Sliced, "must run without gradients, but it takes some itself"),
    ],
)
def test_reasons_say_what_is_other_about_noisy_data(make: Any, reason: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad(), pytest.raises(ValueError, match=reason):
        find_denoiser(step_of(make()), 0)


def test_nothing_is_run_of_modules_whose_names_show_no_times() -> None:
    assert all(takes_times(make()) for make in (DDPM, Flow, Diffusion, EDM))
    assert not any(takes_times(make()) for make in (SmallVAE, TinyGAN, Rows, OfNoise))


class OfNoise(torch.nn.Module):
    """A generator of noise and classes, which are no levels of noise."""

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return noise * labels


class Growing(torch.nn.Module):
    """A GAN whose networks take the step of growth, and noise of their layers, which are no times."""

    class Layers(torch.nn.Linear):
        def forward(self, z: torch.Tensor, step: int = 0, input_noise: Any = None, randomize_noise: bool = True) -> Any:  # type: ignore[override]
            return super().forward(z)

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = self.Layers(4, 8), self.Layers(8, 1)


class OfNoisyImages(Growing):
    """A diffusion GAN (https://arxiv.org/abs/2112.07804), whose generator denoises."""

    class Layers(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) * t


def test_steps_of_growth_in_a_gan_are_no_times() -> None:
    assert not takes_times(Growing())
    assert takes_times(OfNoisyImages())


def test_the_first_rows_of_nested_batches_are_kept() -> None:
    batch = {"x": (torch.arange(6), [torch.arange(12).view(6, 2)]), "text": list("abcdef"), "scale": torch.tensor(2.0)}
    kept = first_rows(batch, 6, 2)
    assert kept["x"][0].tolist() == [0, 1]
    assert kept["x"][1][0].tolist() == [[0, 1], [2, 3]]
    assert kept["text"] == ["a", "b"]
    assert float(kept["scale"]) == 2


# ---- in training ----


class Still(Flow):
    """Training does not change it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Values(TimestepLossMonitor):
    """Keeps the losses of all evaluations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[list[float]] = []

    def observations(self, result: Any) -> Any:
        self.losses.append(result.losses.flatten().tolist())
        return super().observations(result)


def test_equal_weights_give_equal_numbers_at_every_evaluation() -> None:
    seed_everything(0, verbose=False)
    monitor = Values(on_error="raise")
    trainer(monitor, max_epochs=3).fit(Still(), batches(8), batches(8, 32, shuffle=False))
    first, second, third = monitor.losses
    assert first == pytest.approx(second, abs=0, nan_ok=True)
    assert first == pytest.approx(third, abs=0, nan_ok=True)


@pytest.mark.parametrize("module", [DDPM, Flow, lambda: WithAverage(0.9), LearnedVariance])
def test_training_is_bit_identical_with_and_without_the_monitor(module: Any) -> None:
    monitor = TimestepLossMonitor(on_error="raise")
    with_it, without = state_after_training(monitor, module=module), state_after_training(module=module)
    assert monitor.evaluations == 3
    for a, b in zip(with_it, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_loss_is_that_of_the_model_on_images_it_is_not_trained_on() -> None:
    """Data that the network predicts exactly have no loss, and other data have the known one."""

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            # of images of ones, x = t + (1 - t) z, and the velocity is 1 - z
            return (1 - x) / (1 - t[:, None, None, None]) + 0 * self.weight

    class Known(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.field = Exact()

    ones, twos = TensorDataset(torch.ones(32, 1, 8, 8)), TensorDataset(torch.full((32, 1, 8, 8), 2.0))
    monitor = TimestepLossMonitor(on_error="raise", num_bands=4)
    trainer(monitor, max_epochs=1).fit(Known(), DataLoader(ones, 16), DataLoader(twos, 16))
    assert monitor.result is not None
    assert monitor.result.losses[0].tolist() == pytest.approx([0] * 4, abs=1e-5)
    # of images of twos, x = 2 t + (1 - t) z, so that the prediction misses 2 - z by 1 / (1 - t)
    ratio = (monitor.result.edges / 2).exp()
    bounds = ((1 + 1 / ratio) ** 2).tolist()
    loss = monitor.result.losses[1].tolist()
    assert all(
        least * 0.99 <= value <= most * 1.01 for most, value, least in zip(bounds, loss, bounds[1:], strict=False)
    )


def test_the_rise_is_relative_to_the_lowest_loss_so_far() -> None:
    monitor = TimestepLossMonitor()
    rises = []
    for step, loss in enumerate([4.0, 2.0, 1.0, 2.0]):
        metric = TimestepLoss([0.0, 1.0, 2.0])
        metric.update(torch.tensor([loss, 1.0]), torch.tensor([0.5, 1.5]))
        monitor.last_step = step
        # a second evaluation of the same step, as the first one that measures the time, changes nothing
        for _ in range(2):
            result = monitor.postprocess(None, metric.compute())  # type: ignore[arg-type]  # it needs no view
        rises.append(result.rise.tolist())
    assert rises == [pytest.approx([rise, 0.0], abs=1e-9) for rise in (0.0, 0.0, 0.0, math.log(2))]
    observed = {o.series.name: o for o in monitor.observations(result)}
    assert observed["band 0"].severity == pytest.approx(math.log(2))
    assert observed["all noise levels"].severity == pytest.approx(math.log(2) / 2)


def test_a_callable_of_the_users_gives_the_same_numbers_as_what_is_found() -> None:
    def of_flow(module: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        t = times.view(-1, 1, 1, 1).to(images)
        return (module.field((1 - t) * images + t * noise, 1 - times.to(images)) - (images - noise)).square()

    seed_everything(0, verbose=False)
    images = digits(8)[0][:512]
    data, found = DataLoader(TensorDataset(images), 64), TimestepLossMonitor(on_error="raise")
    given = TimestepLossMonitor(of_flow, on_error="raise", name="given")
    trainer(found, given, max_epochs=1).fit(Flow(), data, DataLoader(TensorDataset(digits(8)[0][512:640]), 64))
    assert found.result is not None
    assert given.result is not None
    # other noise and times in the same bands
    assert given.result.loss.tolist() == pytest.approx(found.result.loss.tolist(), rel=0.15)
    assert given.label(given.result, 0).startswith("times 0.0")


def test_a_method_that_is_named_is_called() -> None:
    class WithMethod(Flow):
        def denoising_loss(self, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
            return times.double() * 2

    monitor = TimestepLossMonitor("denoising_loss", on_error="raise", num_bands=4)
    trainer(monitor, max_epochs=1).fit(WithMethod(), batches(8))
    assert monitor.result is not None
    assert monitor.result.loss.tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=0.05)
    with pytest.raises(ValueError, match="loss must be a callable or name a method of Flow, got 'nothing'"):
        trainer(TimestepLossMonitor("nothing")).fit(Flow(), batches(8))
    with pytest.raises(ValueError, match="loss must return squared errors"):
        trainer(TimestepLossMonitor(lambda *_: torch.zeros(()), on_error="raise")).fit(Flow(), batches(8))


def test_scalars_charts_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor = TimestepLossMonitor(on_error="raise")
    trainer(monitor, max_epochs=2, logger=logger).fit(WithAverage(0.9), batches(8), batches(8, 32, shuffle=False))
    seen = events(logger.log_dir)
    tags = {tag.removeprefix("gendiag/timestep_loss/") for tag in seen.Tags()["scalars"]}
    assert {"loss", "relative_loss", "excess", "train_loss", "gap", "raw_loss", "highest_level", "loss_7"} <= tags
    picture = seen.Images("gendiag/timestep_loss/panel")[-1]
    assert picture.width < 600
    assert picture.height < 1000


@pytest.mark.filterwarnings("ignore:GenerativeDiagnostics watches the training data only")
def test_it_is_attached_to_diffusion_models_and_left_out_elsewhere() -> None:
    def left_out(module: LightningModule, size: int = 8) -> str:
        others = ("cms", "generation_balance", "manifold_entropy", "latent_regions", "regional_primitives")
        diagnostics = GenerativeDiagnostics(skip=others, adapter=ModelAdapter(num_samples=16), max_overhead=None)
        trainer(diagnostics, max_epochs=1).fit(module, batches(size))
        return diagnostics.left_out.get("timestep_loss", "")

    assert left_out(Diffusion(width=4, steps=2), 16) == ""
    assert left_out(DDPM()) == ""
    assert "steps its optimizers itself" in left_out(Manual())
    assert "several levels" in left_out(OneLevel())
    assert "no name says that a part of SmallVAE takes times or levels of noise" in left_out(SmallVAE())
    assert "no name says that a part of TinyGAN takes times or levels of noise" in left_out(TinyGAN())


def test_alone_on_another_model_it_says_so_before_training() -> None:
    with pytest.raises(ValueError, match="no name says that a part of SmallVAE takes times or levels of noise"):
        trainer(TimestepLossMonitor()).fit(SmallVAE(), batches(8))
    with pytest.raises(ValueError, match="that of Manual steps its optimizers itself"):
        trainer(TimestepLossMonitor()).fit(Manual(), batches(8))


def test_batches_that_are_too_small_are_named_and_the_run_goes_on() -> None:
    monitor = TimestepLossMonitor()
    with pytest.warns(DiagnosticWarning, match="a batch must hold at least 4 images or other rows of data, got 2"):
        trainer(monitor, max_epochs=1).fit(Flow(), batches(8, 8, batch_size=2))
    assert monitor.result is None


def test_a_resumed_run_keeps_its_bands(tmp_path: Any) -> None:
    first = TimestepLossMonitor(on_error="raise")
    own = trainer(first, max_epochs=2)
    own.fit(Flow(), batches(8))
    own.save_checkpoint(tmp_path / "run.ckpt")
    monitor = TimestepLossMonitor(on_error="raise")
    trainer(monitor, max_epochs=3).fit(Flow(), batches(8), ckpt_path=tmp_path / "run.ckpt", **loading())
    assert monitor.evaluations == 3
    assert first.result is not None
    assert monitor.result is not None
    assert torch.equal(monitor.result.edges, first.result.edges)


def test_two_processes_give_the_result_of_all_their_rows(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.timesteps_on_two", str(tmp_path), "2"],
        env={**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (tmp_path / "report_1.pt").exists(), done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"report_{rank}.pt", weights_only=True) for rank in range(2))
    assert one["edges"] == two["edges"]
    assert torch.equal(one["losses"], two["losses"]) or torch.allclose(one["losses"], two["losses"], equal_nan=True)
    # each process has images, noise and levels of its own
    assert not torch.equal(one["given"][0][1], two["given"][0][1])
    metric = TimestepLoss(one["edges"])
    for errors, levels, side in (*one["given"], *two["given"]):
        metric.update(errors, levels, side=side)
    assert torch.allclose(metric.compute().losses, one["losses"], rtol=1e-9, equal_nan=True)


# ---- planted faults in real training ----


def fitted(
    module: LightningModule, seed: int = 0, images: int = 512, epochs: int = 20
) -> tuple[TimestepLossMonitor, Any]:
    """Trains on digits with held-out ones beside them."""
    rows = digits(8)[0][torch.randperm(1797, generator=torch.Generator().manual_seed(seed))]
    monitor, stopping = TimestepLossMonitor(on_error="raise", log_images=False), CollapseStopping("warn")
    held_out = DataLoader(TensorDataset(rows[1400:1528]), 64)
    loader = DataLoader(TensorDataset(rows[:images].repeat(max(1, 512 // images), 1, 1, 1)), 64, shuffle=True)
    trainer(monitor, stopping, max_epochs=epochs).fit(module, loader, held_out)
    return monitor, stopping


class Broken(Flow):
    """From an epoch on, predictions at times below 0.25, where there is much noise, are zero."""

    class Network(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.dead = inner, False

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.inner(x, t)
            return out.where((t > 0.25)[:, None, None, None] | (not self.dead), 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.field = self.Network(self.field)

    def on_train_epoch_start(self) -> None:
        self.field.dead = self.current_epoch >= 15


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_bands_that_become_worse_are_found_and_named() -> None:
    seed_everything(0, verbose=False)
    _, stopping = fitted(Broken())
    assert stopping.alarms
    for alarm in stopping.alarms:
        assert alarm.diagnostic == "timestep_loss"
        # the bands with the most noise; the network is given times from noise to data
        assert set(alarm.indices) <= {6, 7}
        assert 15 <= alarm.epoch <= 18
        first, last = alarm.message.split("times ")[1].split(" (")[0].split(" to ")
        assert float(first) < float(last) <= 0.26


def test_a_band_without_weight_is_named_at_once() -> None:
    seed_everything(0, verbose=False)
    with pytest.warns(CollapseWarning, match=r"training does not weigh the noise levels of times \d+ to \d+"):
        _, stopping = fitted(DDPM("noise", "half"), epochs=4)
    assert stopping.alarms[0].epoch <= 2
    first, last = stopping.alarms[0].message.split("times ")[1].split(" (")[0].split(" to ")
    assert (int(first), int(last)) == (pytest.approx(500, abs=20), pytest.approx(999, abs=20))
    assert stopping.alarms[0].stop == "never"


def test_a_schedule_that_ends_before_pure_noise_is_named() -> None:
    class Short(DDPM):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0]
            noise, t = torch.randn_like(x), torch.randint(0, 300, (len(x),))
            variance = self.alphas_cumprod[t][:, None, None, None]
            return F.mse_loss(self.unet(variance.sqrt() * x + (1 - variance).sqrt() * noise, t), noise)

    with pytest.warns(
        CollapseWarning, match="training never reaches pure noise, from which samples start: in the noise"
    ):
        fitted(Short(), epochs=3)


def test_a_schedule_of_langevin_dynamics_need_not_end_in_pure_noise() -> None:
    class Score(DDPM):
        """As NCSN, whose highest standard deviation is 1 for images in 0 to 1."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0]
            t = torch.randint(0, 10, (len(x),))
            sigma = torch.logspace(0, -2, 10)[t][:, None, None, None]
            noisy = x + sigma * torch.randn_like(x)
            target = (x - noisy) / sigma**2
            return ((self.unet(noisy, t) - target).square() * sigma**2).mean()

    monitor, stopping = fitted(Score(), epochs=4)
    assert monitor.result is not None
    assert float(monitor.result.highest_level) < 3
    assert not stopping.alarms


def test_averaged_weights_that_are_never_updated_are_named() -> None:
    seed_everything(0, verbose=False)
    with pytest.warns(
        CollapseWarning, match=r"the averaged \(EMA\) weights are worse than the raw ones in the noise levels"
    ):
        monitor, _ = fitted(WithAverage(1.0), epochs=8)
    assert monitor.result is not None
    assert float(monitor.result["raw_loss"]) < 0.8 * float(monitor.result["loss"])


def test_a_model_that_overfits_is_named_with_its_noise_levels() -> None:
    class Large(Flow):
        """A network that can remember a few images."""

        def __init__(self) -> None:
            super().__init__()
            self.field = Remembering()

    class Remembering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(65, 256),
                torch.nn.SiLU(),
                torch.nn.Linear(256, 256),
                torch.nn.SiLU(),
                torch.nn.Linear(256, 64),
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.net(torch.cat([x.flatten(1), t[:, None]], 1))
            return out.view_as(x)

    seed_everything(0, verbose=False)
    with pytest.warns(CollapseWarning, match="the model overfits in the noise levels of times"):
        monitor, _ = fitted(Large(), images=16, epochs=25)
    assert monitor.result is not None
    assert float(monitor.result["gap"]) > 1.5


@pytest.mark.parametrize("make", [DDPM, lambda: DDPM("data"), Flow, lambda: WithAverage(0.9)])
def test_healthy_runs_raise_no_alarm(make: Any) -> None:
    seed_everything(1, verbose=False)
    monitor, stopping = fitted(make(), epochs=16)
    assert stopping.alarms == []
    assert monitor.result is not None
    assert float(monitor.result["relative_loss"]) < 0.9
