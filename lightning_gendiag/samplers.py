"""Samplers for models that hold only a network: of a diffusion model, or of a vector field as in flow matching.

They are for a line such as ``ModelAdapter(sample=lambda module, n: samplers.midpoint(module.net, (n, 1, 28, 28)))``.
With few steps, methods of first order make samples that vary too little, which a diagnostic would take for a fault of the
model: for data N(0, s^2) and its exact score, 20 calls give the following multiples of s.

================================  =======  =======  =======
method                            s = 0.1  s = 0.5  s = 1
================================  =======  =======  =======
``ddim(order=1)``                 0.87     0.92     0.92
``ddim``                          1.04     1.02     1.01
``ddim(stochastic=True)``         1.09     1.08     1.04
``euler``                         0.80     0.93     0.94
``midpoint``                      0.99     1.00     1.00
================================  =======  =======  =======
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Prediction = Literal["noise", "sample", "velocity"]
"""What a diffusion model's network returns."""

STEPS = 20
"""Default number of calls of the network; hundreds of them would take longer than the training between evaluations."""

SMALLEST = 1e-8
"""Bound of the signal's and of the noise's variance, which schedules let end in 0."""


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Tensor,
    shape: Sequence[int],
    steps: int = STEPS,
    prediction: Prediction = "noise",
    order: Literal[1, 2] = 2,
    clip: tuple[float, float] | None = None,
    device: torch.device | str | None = None,
    stochastic: bool = False,
) -> Tensor:
    r"""Samples from a diffusion model in few steps: DDIM, by default with DPM-Solver++'s second-order correction.

    From ``x ~ N(0, 1)``, each step moves from a time t to an earlier one s, and the last step to the clean sample:

    .. math:: x_s = \sqrt{\bar\alpha_s} \, \hat x_0 + \sqrt{1 - \bar\alpha_s} \,
        \frac{x_t - \sqrt{\bar\alpha_t} \, \hat x_0}{\sqrt{1 - \bar\alpha_t}}.

    For the second order, the predicted clean sample is extrapolated from those of the last two steps. The square roots of
    the times are evenly spaced.

    With ``stochastic``, each step forgets a part of the noise and adds new noise, as DDPM does:

    .. math:: x_s = \sqrt{\bar\alpha_s} \, (1 - q^2) \, \hat x_0
        + \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}} \, q \, x_t
        + \sqrt{1 - \bar\alpha_s} \sqrt{1 - q^2} \, \epsilon, \qquad
        q = \sqrt{\frac{\bar\alpha_t (1 - \bar\alpha_s)}{\bar\alpha_s (1 - \bar\alpha_t)}}.

    What the network gets wrong at early steps then fades instead of being passed on. A network that is sampled by DDPM
    needs this while it is not well trained, and one that is sampled by DDIM must not have it.

    References:
        Song, Meng, Ermon: Denoising Diffusion Implicit Models, ICLR 2021, https://arxiv.org/abs/2010.02502.
        Lu et al.: DPM-Solver++, 2022, https://arxiv.org/abs/2211.01095. Steps that add noise are its SDE-DPM-Solver++.

    Args:
        predict: The network ``(x (n, ...), t (n,)) -> (n, ...)``, where t holds integers in [0, T).
        schedule: The betas (T,) of the forward process, or their cumulative products ``alphas_cumprod`` (T,), which are
            recognized by strictly decreasing.
        shape: Shape (n, ...) of the samples.
        steps: Largest number of calls of the network.
        prediction: Whether the network returns the noise, the clean sample, or the velocity
            ``sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * sample``.
        order: 1 for DDIM itself, 2 for the correction.
        clip: Range to which predicted clean samples are clipped in each step.
        device: Device of the samples; by default that of the network.
        stochastic: Whether each step adds noise, as those of DDPM do.

    Returns:
        Samples (n, ...).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> betas = torch.linspace(1e-4, 0.02, 1000)
        >>> ddim(lambda x, t: torch.full_like(x, 3.0), betas, (2, 1), prediction="sample")
        tensor([[3.],
                [3.]])
    """
    _check("prediction", prediction, ("noise", "sample", "velocity"))
    _check("order", order, (1, 2))
    _check_steps(steps)
    alphas = _alphas_cumprod(schedule)
    signals, spreads = alphas.sqrt().tolist(), (1 - alphas).sqrt().tolist()
    # half the logarithm of the signal-to-noise ratio, in which steps are measured
    ratios = (alphas / (1 - alphas)).log().div(2).tolist()
    x = torch.randn(*shape, device=device or device_of(predict) or schedule.device)
    previous: tuple[float, Tensor] | None = None
    times = _times(len(alphas), steps)
    for now, then in zip(times, [*times[1:], None], strict=True):
        output = predict(x, torch.full((len(x),), now, device=x.device))
        clean = _clean(prediction, x, output, signals[now], spreads[now])
        clean = clean if clip is None else clean.clamp(*clip)
        if then is None:
            return clean
        target = clean
        if order == 2 and previous is not None:
            last, before = previous
            weight = (ratios[then] - ratios[now]) / (2 * (ratios[now] - last))
            target = clean + weight * (clean - before)
        previous = ratios[now], clean
        if stochastic:
            kept = math.exp(ratios[now] - ratios[then])
            x = signals[then] * (1 - kept**2) * target + spreads[then] / spreads[now] * kept * x
            x = x + spreads[then] * (1 - kept**2) ** 0.5 * torch.randn_like(x)
        else:
            x = signals[then] * target + spreads[then] / spreads[now] * (x - signals[now] * target)
    raise AssertionError("there is at least one time")


def euler(
    field: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    steps: int = STEPS,
    t0: float = 0.0,
    t1: float = 1.0,
    order: Literal["t, x", "x, t"] = "t, x",
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples from a flow-matching model: integrates its vector field from normal noise by Euler's method.

    References:
        Lipman et al.: Flow Matching for Generative Modeling, ICLR 2023, https://arxiv.org/abs/2210.02747.

    Args:
        field: The network for ``dx/dt`` (n, ...), called with times t (n,) and states x (n, ...).
        shape: Shape (n, ...) of the samples.
        steps: Number of steps; each calls the network once.
        t0: Time at which the states are noise.
        t1: Time at which they are data; models whose time runs towards noise have ``t0=1.0, t1=0.0``.
        order: Whether the field is called as ``field(t, x)`` or as ``field(x, t)``.
        device: Device of the samples; by default that of the network.

    Returns:
        Samples (n, ...).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> samples = euler(lambda t, x: (3.0 - x) / (1.0 - t[:, None]), (2, 1))
        >>> torch.allclose(samples, torch.full((2, 1), 3.0))
        True
    """
    return _integrated(field, shape, steps, t0, t1, order, device, halfway=False)


def midpoint(
    field: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    steps: int = STEPS // 2,
    t0: float = 0.0,
    t1: float = 1.0,
    order: Literal["t, x", "x, t"] = "t, x",
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples as :func:`euler` does, by the midpoint method: each step calls the network twice and is far more exact."""
    return _integrated(field, shape, steps, t0, t1, order, device, halfway=True)


def _integrated(
    field: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    steps: int,
    t0: float,
    t1: float,
    order: Literal["t, x", "x, t"],
    device: torch.device | str | None,
    halfway: bool,
) -> Tensor:
    """Returns the states (n, ...) at the end, with the slope at the beginning of each step or halfway."""
    _check("order", order, ("t, x", "x, t"))
    _check_steps(steps)

    def slope(x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), time, device=x.device)
        return field(t, x) if order == "t, x" else field(x, t)

    x = torch.randn(*shape, device=device or device_of(field))
    step = (t1 - t0) / steps
    for index in range(steps):
        time = t0 + index * step
        change = slope(x, time)
        x = x + step * (slope(x + step / 2 * change, time + step / 2) if halfway else change)
    return x


def device_of(call: Any) -> torch.device | None:
    """Returns the device of a module, or of the module that a method belongs to; None for other callables."""
    owner = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    return next((parameter.device for parameter in owner.parameters()), None)


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")


def _times(total: int, steps: int) -> list[int]:
    """Returns at most this many times from total - 1 down to 0, dense near 0, where the details of the data appear."""
    if steps >= total:
        return list(range(total))[::-1]
    roots = torch.linspace((total - 1) ** 0.5, 0, steps, dtype=torch.float64)
    return sorted(set(roots.square().round().long().tolist()), reverse=True)


def _clean(prediction: Prediction, x: Tensor, output: Tensor, signal: float, spread: float) -> Tensor:
    """Returns the clean samples that a network's output stands for."""
    if prediction == "noise":
        return (x - spread * output) / signal
    return output if prediction == "sample" else signal * x - spread * output


def _alphas_cumprod(schedule: Tensor) -> Tensor:
    """Returns the cumulative products (T,) of a schedule, between its bounds, in float64 on the CPU."""
    schedule = schedule.detach().to("cpu", torch.float64)
    if schedule.ndim != 1 or not len(schedule) or not bool(((schedule >= 0) & (schedule <= 1)).all()):
        raise ValueError(
            f"schedule must be betas (T,) or alphas_cumprod (T,) in [0, 1], got {tuple(schedule.shape)}. "
            "To fix this, pass those of the forward process."
        )
    decreases = len(schedule) > 1 and bool((schedule.diff() < 0).all())
    return (schedule if decreases else (1 - schedule).cumprod(0)).clamp(SMALLEST, 1 - SMALLEST)
