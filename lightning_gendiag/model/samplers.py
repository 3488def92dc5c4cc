"""Samplers for models that hold only a network: DDIM for a diffusion model's, Euler's method for a vector field.

They are for a line such as ``ModelAdapter(sample=lambda module, n: samplers.euler(module.net, (n, 1, 28, 28)))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Prediction = Literal["noise", "sample", "velocity"]
"""What a diffusion model's network returns."""

STEPS = 20
"""Default number of calls of the network; a sampler of hundreds would take longer than training between evaluations."""


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Tensor,
    shape: Sequence[int],
    steps: int = STEPS,
    prediction: Prediction = "noise",
    clip: tuple[float, float] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Samples from a diffusion model by deterministic DDIM.

    From ``x ~ N(0, 1)``, each of the steps moves from one time step to an earlier one,

    .. math:: x_s = \sqrt{\bar\alpha_s} \, \hat x_0(x_t, t) + \sqrt{1 - \bar\alpha_s} \, \hat\epsilon(x_t, t),

    and the last one to the sample itself. The time steps are evenly spaced from T - 1 to 0.

    References:
        Song, Meng, Ermon: Denoising Diffusion Implicit Models, ICLR 2021, https://arxiv.org/abs/2010.02502.

    Args:
        predict: The network ``(x (n, ...), t (n,)) -> (n, ...)``, where t holds integers in [0, T).
        schedule: The betas (T,) of the forward process, or their cumulative products ``alphas_cumprod`` (T,), which are
            recognized by strictly decreasing.
        shape: Shape (n, ...) of the samples.
        steps: Number of calls of the network; at most T are made.
        prediction: Whether the network returns the noise, the clean sample, or the velocity
            ``sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * sample``.
        clip: Range to which predicted samples are clipped in each step.
        device: Device of the samples; by default that of the network.

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
    if prediction not in ("noise", "sample", "velocity"):
        raise ValueError(f"prediction must be 'noise', 'sample' or 'velocity', got {prediction!r}.")
    _check_steps(steps)
    alphas = _alphas_cumprod(schedule)
    x = torch.randn(*shape, device=device or device_of(predict) or schedule.device)
    times = torch.linspace(len(alphas) - 1, 0, min(steps, len(alphas))).round().long().tolist()
    for now, then in zip(times, [*times[1:], None], strict=True):
        signal, spread = float(alphas[now].sqrt()), float((1 - alphas[now]).sqrt())
        output = predict(x, torch.full((len(x),), now, device=x.device))
        if prediction == "noise":
            # a schedule that ends in pure noise has no signal to divide by
            clean = (x - spread * output) / max(signal, 1e-4)
        else:
            clean = output if prediction == "sample" else signal * x - spread * output
        clean = clean if clip is None else clean.clamp(*clip)
        if then is None:
            return clean
        noise = (x - signal * clean) / max(spread, 1e-8)
        x = float(alphas[then].sqrt()) * clean + float((1 - alphas[then]).sqrt()) * noise
    raise AssertionError("unreachable: there is at least one step")


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
        steps: Number of calls of the network.
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
    if order not in ("t, x", "x, t"):
        raise ValueError(f"order must be 't, x' or 'x, t', got {order!r}.")
    _check_steps(steps)
    x = torch.randn(*shape, device=device or device_of(field))
    step = (t1 - t0) / steps
    for index in range(steps):
        t = torch.full((len(x),), t0 + index * step, device=x.device)
        x = x + step * (field(t, x) if order == "t, x" else field(x, t))
    return x


def device_of(call: Any) -> torch.device | None:
    """Returns the device of a module, or of the module that a method belongs to; None for other callables."""
    owner = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    return next((parameter.device for parameter in owner.parameters()), None)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")


def _alphas_cumprod(schedule: Tensor) -> Tensor:
    """Returns the cumulative products (T,) of a schedule in float64 on the CPU."""
    schedule = schedule.detach().to("cpu", torch.float64)
    if schedule.ndim != 1 or not len(schedule) or not bool(((schedule >= 0) & (schedule <= 1)).all()):
        raise ValueError(
            f"schedule must be the betas (T,) or the alphas_cumprod (T,), all in [0, 1], got {tuple(schedule.shape)}."
        )
    decreases = len(schedule) > 1 and bool((schedule.diff() < 0).all())
    return schedule if decreases else (1 - schedule).cumprod(0)
