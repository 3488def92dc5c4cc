"""Samplers for bare networks, on normal distributions, whose noise, score and vector field are known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gendiag.samplers import STEPS, ddim, euler, midpoint

BETAS = torch.linspace(1e-4, 0.02, 1000)
ALPHAS = (1 - BETAS.double()).cumprod(0)
COSINE = torch.cos((torch.linspace(0, 1, 1000).double() + 0.008) / 1.008 * math.pi / 2).square().clamp(min=0)
"""A schedule of cumulative products that ends in pure noise."""

SAMPLES = 50_000
"""The standard error of a standard deviation is 0.3 % of it."""


class Network:
    """The exact prediction for data N(mean, std^2)."""

    def __init__(self, alphas: Tensor, mean: float, std: float, prediction: str = "noise") -> None:
        self.alphas, self.mean, self.std, self.prediction = alphas, mean, std, prediction
        self.times: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(int(t[0]))
        a = float(self.alphas[t[0]])
        noise = math.sqrt(1 - a) * (x - math.sqrt(a) * self.mean) / (a * self.std**2 + 1 - a)
        gain = math.sqrt(a) * self.std**2 / (a * self.std**2 + 1 - a)
        sample = self.mean + gain * (x - math.sqrt(a) * self.mean)
        velocity = math.sqrt(a) * noise - math.sqrt(1 - a) * sample
        return {"noise": noise, "sample": sample, "velocity": velocity}[self.prediction]


def field(t: Tensor, x: Tensor, mean: float = 2.0, std: float = 0.5) -> Tensor:
    """The vector field from N(0, 1) at t = 0 to N(mean, std^2) at t = 1."""
    t = t[:, None]
    return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)


@pytest.mark.parametrize("prediction", ["noise", "sample", "velocity"])
@pytest.mark.parametrize("order", [1, 2])
def test_ddim_gives_the_mean_and_nearly_the_spread_of_a_normal_distribution(prediction: Any, order: Any) -> None:
    torch.manual_seed(0)
    samples = ddim(Network(ALPHAS, 2.0, 0.5, prediction), BETAS, (SAMPLES, 1), prediction=prediction, order=order)
    # what is left of the mean at the last time is missing from it
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(samples.std()) / 0.5 == pytest.approx({1: 0.92, 2: 1.02}[order], abs=0.01)


@pytest.mark.parametrize(("std", "first", "second"), [(0.1, 0.87, 1.04), (0.5, 0.92, 1.02), (1.0, 0.92, 1.01)])
def test_the_second_order_keeps_the_spread_as_the_documentation_states(std: float, first: float, second: float) -> None:
    for order, expected in ((1, first), (2, second)):
        torch.manual_seed(1)
        samples = ddim(Network(ALPHAS, 0.0, std), ALPHAS, (SAMPLES, 1), order=order)  # type: ignore[arg-type]
        assert float(samples.std()) / std == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_ddim_converges_with_the_number_of_steps(order: Any, stochastic: bool) -> None:
    torch.manual_seed(2)
    samples = ddim(Network(ALPHAS, 2.0, 0.5), ALPHAS, (SAMPLES, 1), 1000, order=order, stochastic=stochastic)
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(samples.std()) == pytest.approx(0.5, abs=0.006)


@pytest.mark.parametrize(("std", "spread"), [(0.1, 1.09), (0.5, 1.08), (1.0, 1.04)])
def test_steps_that_add_noise_keep_the_spread_as_the_documentation_states(std: float, spread: float) -> None:
    torch.manual_seed(1)
    samples = ddim(Network(ALPHAS, 0.0, std), ALPHAS, (SAMPLES, 1), stochastic=True)
    assert float(samples.std()) / std == pytest.approx(spread, abs=0.01)


def ddpm(network: Network) -> Tensor:
    """Samples by DDPM with all steps, a slow reference: the mean and the variance of the posterior q(x_s | x_t, x_0)."""
    x = torch.randn(SAMPLES // 5, 1)
    for t in range(999, -1, -1):
        a, b, beta = float(ALPHAS[t]), float(ALPHAS[t - 1]) if t else 1.0, float(BETAS[t])
        clean = (x - math.sqrt(1 - a) * network(x, torch.full((len(x),), t))) / math.sqrt(a)
        x = math.sqrt(b) * beta / (1 - a) * clean + math.sqrt(1 - beta) * (1 - b) / (1 - a) * x
        x = x + math.sqrt(beta * (1 - b) / (1 - a)) * torch.randn_like(x)
    return x


class Mistaken(Network):
    """Predicts too little noise at the times at which sampling begins, as a network does that is not well trained."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return super().__call__(x, t) * (0.9 if int(t[0]) > 700 else 1.0)


def test_steps_that_add_noise_forget_a_mistake_of_the_network_as_ddpm_does() -> None:
    torch.manual_seed(6)
    network = Mistaken(ALPHAS, 0.0, 0.5)
    true = float(ddpm(network).std())
    samples = {noisy: ddim(network, ALPHAS, (SAMPLES, 1), stochastic=noisy) for noisy in (False, True)}
    # within the 8 % that 20 steps cost without a mistake
    assert float(samples[True].std()) == pytest.approx(true, rel=0.09)
    assert float(samples[False].std()) > 1.2 * true


@pytest.mark.parametrize("schedule", [BETAS, ALPHAS, COSINE, BETAS[:10], torch.tensor([0.5]), torch.full((5,), 0.1)])
def test_ddim_ends_at_a_single_point_whatever_the_schedule(schedule: Tensor) -> None:
    samples = ddim(lambda x, t: torch.full_like(x, 3.0), schedule, (4, 1, 2, 2), prediction="sample")
    assert torch.equal(samples, torch.full((4, 1, 2, 2), 3.0))


def test_a_schedule_that_ends_in_pure_noise_gives_finite_samples() -> None:
    alphas = torch.cat([COSINE[:-1], torch.zeros(1, dtype=torch.float64)])
    samples = ddim(Network(alphas, 0.0, 1.0, "velocity"), alphas, (SAMPLES, 1), prediction="velocity")
    assert float(samples.std()) == pytest.approx(1.0, abs=0.05)


def test_ddim_calls_the_network_at_falling_times_from_the_last_to_the_first() -> None:
    network = Network(ALPHAS, 0.0, 1.0)
    ddim(network, BETAS, (2, 1))
    assert (network.times[0], network.times[-1], len(network.times)) == (999, 0, STEPS)
    assert network.times == sorted(set(network.times), reverse=True)


def test_ddim_clips_each_predicted_sample() -> None:
    samples = ddim(lambda x, t: torch.full_like(x, 3.0), BETAS, (2, 1), prediction="sample", clip=(-1.0, 1.0))
    assert torch.equal(samples, torch.ones(2, 1))


@pytest.mark.parametrize(
    ("sample", "spread"), [(euler, 0.93), (midpoint, 1.0)], ids=["first order", "second order, as many calls"]
)
def test_integrating_a_field_gives_the_mean_and_the_stated_spread(sample: Any, spread: float) -> None:
    torch.manual_seed(3)
    samples = sample(field, (SAMPLES, 1))
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(samples.std()) / 0.5 == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("sample", [euler, midpoint])
def test_order_and_direction_of_time_can_be_chosen(sample: Any) -> None:
    torch.manual_seed(4)
    forth = sample(field, (64, 1))
    torch.manual_seed(4)
    back = sample(lambda x, t: -field(1 - t, x), (64, 1), t0=1.0, t1=0.0, order="x, t")
    torch.testing.assert_close(forth, back, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sample", [euler, midpoint])
def test_a_constant_field_moves_the_noise_by_its_value(sample: Any) -> None:
    torch.manual_seed(5)
    noise = torch.randn(3, 2)
    torch.manual_seed(5)
    torch.testing.assert_close(sample(lambda t, x: torch.full_like(x, 2.0), (3, 2), t1=1.5), noise + 3.0)


class Moving(nn.Module):
    """A field whose weights are on the device ``meta``, which has no values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, device="meta")

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(x)

    def field(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("call", [Moving(), Moving().field], ids=["module", "method"])
def test_samples_are_made_where_the_network_is(call: Any) -> None:
    assert midpoint(call, (3, 2)).device.type == "meta"
    assert ddim(lambda x, t: x, BETAS, (3, 2), device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddim(Network(ALPHAS, 0, 1), BETAS, (2, 1), prediction="x0"), "prediction must be one of 'noise'"),  # type: ignore[arg-type]
        (lambda: ddim(Network(ALPHAS, 0, 1), BETAS, (2, 1), order=3), "order must be one of 1, 2, got 3"),  # type: ignore[arg-type]
        (lambda: ddim(Network(ALPHAS, 0, 1), BETAS, (2, 1), steps=0), "steps must be an integer of at least 1"),
        (lambda: ddim(Network(ALPHAS, 0, 1), BETAS * 100, (2, 1)), r"schedule must be betas .* got \(1000,\)"),
        (lambda: ddim(Network(ALPHAS, 0, 1), BETAS[None], (2, 1)), r"schedule must be .* got \(1, 1000\)"),
        (lambda: euler(field, (2, 1), steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: midpoint(field, (2, 1), order="xt"), "order must be one of 't, x', 'x, t', got 'xt'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
