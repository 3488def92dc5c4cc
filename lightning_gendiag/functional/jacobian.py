"""Gram matrices of the Jacobian of a decoder, without storing the Jacobian of a batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gendiag.functional.arrays import tensor_of

Decode = Callable[[Tensor], Any]

Mode = Literal["auto", "forward", "reverse"]
"""How derivatives are taken; ``"auto"`` is forward mode where it works, and reverse mode elsewhere."""

WIDENING = 12
"""Assumed working memory of a decoder as a multiple of that of its output."""

BLOCK = 4096
"""Number of outputs that are held in float64 at a time."""

MAX_OUTPUTS = 4096
"""Largest number of outputs for which backward passes are run one by one without being asked for."""

DERIVATIVE_FAILS = (NotImplementedError, RuntimeError)
"""Errors that torch raises where an operation has no derivative in forward mode, or no second one."""


def decoder_gram(
    decode: Decode,
    z: Tensor,
    *,
    dims: Tensor | None = None,
    latent_scale: Tensor | float = 1.0,
    data_scale: Tensor | float = 1.0,
    mode: Mode = "auto",
    max_bytes: int = 1 << 24,
) -> Tensor:
    """Computes ``J'J`` of a decoder at each latent, where ``J = dx/dz`` (X x L), exactly and without storing J for the batch.

    Forward mode pushes all latent directions of a few samples through the decoder at a time. Reverse mode is for decoders
    with operations that have no forward derivative, such as the custom operations of StyleGAN2: it differentiates a
    backward pass, once for each direction. Where an operation cannot be differentiated twice, it runs one backward pass for
    each output, of which there may be 4,096 unless the mode is ``"reverse"``. Samples must not influence each other, so the
    decoder must be in evaluation mode. Both modes work under ``no_grad`` and in inference mode.

    Args:
        decode: map from latents (n, L) to data (n, ...), which returns a tensor, a distribution with a ``mean``, or a tuple
            whose first item is either.
        z: (N, L) latents in float32 or float64.
        dims: (l,) numbers of the latent dimensions to include; None for all of them.
        latent_scale: standard deviation of each latent, (L,) or a number, by which the columns of J are multiplied.
        data_scale: standard deviation by which the data were divided, (...) or a number, by which the rows of J are
            multiplied.
        mode: ``"forward"``, ``"reverse"``, or ``"auto"`` for forward mode where it works.
        max_bytes: approximate bound on the working memory beside one sample's; more is faster on a GPU.

    Returns:
        (N, L, L) matrices in float64, or (N, l, l) for given dimensions.

    Raises:
        ValueError: if z is not (N, L) of floats, or the decoder does not return one row per latent.
        RuntimeError: if no derivative can be computed; the error names the layer where it is known.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
        >>> decoder_gram(lambda z: z @ a.T, torch.zeros(1, 2))
        tensor([[[1., 2.],
                 [2., 5.]]], dtype=torch.float64)
    """
    if z.ndim != 2 or z.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"z must be (N, L) in float32 or float64, got {z.dtype} of shape {tuple(z.shape)}. "
            "To fix this, pass z.flatten(1).float(), and a decoder that takes it."
        )
    wanted = torch.arange(z.shape[1], device=z.device) if dims is None else torch.as_tensor(dims)
    if dims is not None and (
        wanted.ndim != 1 or len(wanted) == 0 or not 0 <= int(wanted.min()) <= int(wanted.max()) < z.shape[1]
    ):
        raise ValueError(
            f"dims must be numbers of latent dimensions, 0 to {z.shape[1] - 1}, got {dims}. "
            "To fix this, leave dims out for all dimensions."
        )
    wanted = wanted.to(z.device)
    if len(z) == 0:
        return torch.zeros(0, len(wanted), len(wanted), dtype=torch.float64, device=z.device)
    row_scale = torch.as_tensor(data_scale, dtype=torch.float64, device=z.device)
    column_scale = torch.as_tensor(latent_scale, dtype=torch.float64, device=z.device).expand(z.shape[1])[wanted]
    return _gram(decode, z, wanted, row_scale, column_scale, mode, max_bytes)


def check_derivative(decode: Decode, z: Tensor, *, mode: Mode = "auto") -> None:
    """Checks that :func:`decoder_gram` finds a derivative, by one product of the Jacobian with a vector for each way.

    Args:
        decode: see :func:`decoder_gram`.
        z: (N, L) latents, of which the first is used.
        mode: see :func:`decoder_gram`.

    Raises:
        RuntimeError: if no derivative can be computed, or it would take a backward pass for each of too many outputs.
    """
    one = torch.ones(1, dtype=torch.float64, device=z.device)
    _gram(decode, z[:1], torch.zeros(1, dtype=torch.long, device=z.device), one[0], one, mode, 1, outputs=1)


def _gram(
    decode: Decode,
    z: Tensor,
    wanted: Tensor,
    row_scale: Tensor,
    columns: Tensor,
    mode: str,
    max_bytes: int,
    outputs: int | None = None,
) -> Tensor:
    """Computes the Gram matrices in the first way that works; where it is by output, of the first ``outputs`` alone."""
    with torch.no_grad(), plain_attention():
        rows = row_scale.expand(tensor_of(decode(z[:1]), 1).shape[1:]).flatten()
        if mode != "reverse":
            try:
                return _forward(decode, z, wanted, rows, columns, max_bytes)
            except DERIVATIVE_FAILS as error:
                if mode == "forward" or isinstance(error, torch.OutOfMemoryError):
                    raise RuntimeError(_explained(decode, z, error)) from error
    # inside a decoder a backward pass holds several times the memory of the output
    count = max(1, max_bytes // (WIDENING * len(rows) * z.element_size()))
    grams = []
    with plain_attention(), torch.inference_mode(False), torch.enable_grad():
        for some in torch.split(z, count):
            at = some.detach().clone().requires_grad_()
            try:
                out = _flat(decode, at)
                try:
                    grams.append(_by_direction(out, at, wanted, rows, columns))
                except DERIVATIVE_FAILS as failure:
                    if isinstance(failure, torch.OutOfMemoryError) or (mode == "auto" and len(rows) > MAX_OUTPUTS):
                        raise
                    grams.append(_by_output(out, at, wanted, rows[:outputs], columns))
            except DERIVATIVE_FAILS as error:
                raise RuntimeError(
                    f"decode must be differentiable, twice where it has more than {MAX_OUTPUTS:,} outputs and no "
                    f"forward-mode derivative, got {type(error).__name__}: {error} To fix this, remove torch.no_grad and "
                    "detach from the decoder, or use operations that torch.func.jvp supports."
                ) from error
    return torch.cat(grams)


def _flat(decode: Decode, latents: Tensor) -> Tensor:
    """Returns the decoded data (n, X) of latents (n, L)."""
    return tensor_of(decode(latents), len(latents)).flatten(1)


def _forward(decode: Decode, z: Tensor, wanted: Tensor, rows: Tensor, columns: Tensor, max_bytes: int) -> Tensor:
    """Computes the Gram matrices in forward mode."""
    size = len(rows)
    directions = torch.nn.functional.one_hot(wanted, z.shape[1]).to(z.dtype)  # (l, L)
    # inside a decoder a tangent takes several times the memory of the output
    room = max(1, max_bytes // (WIDENING * size * z.element_size()))
    count, width = max(1, room // len(wanted)), min(room, len(wanted))
    # allocated once before the work, since results that are kept piece by piece would fragment the memory
    grams = torch.empty(len(z), len(wanted), len(wanted), dtype=torch.float64, device=z.device)
    jacobian = torch.empty(min(count, len(z)), len(wanted), size, dtype=z.dtype, device=z.device)
    for start in range(0, len(z), count):
        at = z[start : start + count]

        def pushed(direction: Tensor, at: Tensor = at) -> Tensor:
            out: Tensor = torch.func.jvp(partial(_flat, decode), (at,), (direction.expand_as(at),))[1]
            return out

        for first in range(0, len(wanted), width):
            # a decoder's own noise is the same for all directions
            tangents = torch.func.vmap(pushed, randomness="same")(directions[first : first + width])  # (w, n, X)
            jacobian[: len(at), first : first + width] = tangents.transpose(0, 1)
        grams[start : start + count] = _products(jacobian[: len(at)], rows, columns)
    return grams


def _by_direction(out: Tensor, at: Tensor, wanted: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes the Gram matrices with one backward pass through a backward pass for each direction.

    ``J'w`` is linear in w, so that its derivative with respect to w is J.

    Raises:
        RuntimeError: If the decoder has no second derivative, or a backward pass of its own hides a part of it.
    """
    with torch.no_grad():
        # at other weights than zeros, so that a backward pass that is not linear is noticed
        weights = torch.ones_like(out)
    weights.requires_grad_()
    slope = torch.autograd.grad(out, at, weights, create_graph=True)[0].index_select(1, wanted)  # (n, l)
    jacobian = torch.empty(len(at), len(wanted), out.shape[1], dtype=at.dtype, device=at.device)
    for place, column in enumerate(slope.unbind(1)):
        jacobian[:, place] = torch.autograd.grad(column.sum(), weights, retain_graph=True)[0]
    first = jacobian[:, 0]
    plain = torch.autograd.grad(out, at, first, retain_graph=True)[0][:, wanted]  # J'J of one column
    if not torch.allclose(
        plain, (jacobian @ first[:, :, None])[:, :, 0], rtol=1e-3, atol=1e-3 * float(plain.abs().max())
    ):
        raise RuntimeError("a backward pass of the decoder's own cannot be differentiated.")
    return _products(jacobian, rows, columns)


def _by_output(out: Tensor, at: Tensor, wanted: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes the Gram matrices with one backward pass for each output that has a scale in ``rows``."""
    grams = torch.zeros(len(at), len(wanted), len(wanted), dtype=torch.float64, device=at.device)
    for output, scale in enumerate(rows):
        with torch.no_grad():
            unit = torch.zeros_like(out)
            unit[:, output] = 1
        slope = torch.autograd.grad(out, at, unit, retain_graph=True)[0]
        part = slope[:, wanted].double() * (scale * columns)  # (N, l)
        grams += part[:, :, None] * part[:, None]
    return grams


def _products(jacobian: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes Gram matrices (n, l, l) of Jacobians (n, l, X), in float64 so that singular ones can be recognised."""
    n, dims, _ = jacobian.shape
    grams = torch.zeros(n, dims, dims, dtype=torch.float64, device=jacobian.device)
    for block, scale in zip(torch.split(jacobian, BLOCK, 2), torch.split(rows, BLOCK), strict=True):
        scaled = block.to(torch.float64, copy=True).mul_(scale)
        grams += scaled @ scaled.mT
    return grams * columns * columns[:, None]


def active_dims(decode: Decode, z: Tensor, count: int, *, probes: int = 16, seed: int = 0) -> Tensor:
    """Estimates which latent dimensions move the output most, for latents of many dimensions.

    ``|J_i|^2 = E_v (J'v)_i^2`` over random signs v takes a few reverse passes instead of L forward ones. Only the choice of
    the dimensions is an estimate.

    Args:
        decode: see :func:`decoder_gram`.
        z: (N, L) latents.
        count: number of dimensions to choose; all of them where it is above L.
        probes: number of random vectors per latent.
        seed: seed of these vectors.

    Returns:
        (count,) numbers of dimensions in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    with plain_attention(), torch.inference_mode(False), torch.enable_grad():
        squares = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
        at = z.detach().clone().requires_grad_()
        out = _flat(decode, at)
        for _ in range(probes):
            signs = torch.randint(0, 2, out.shape, generator=generator).to(out, non_blocking=True) * 2 - 1
            squares += torch.autograd.grad(out, at, signs, retain_graph=True)[0].double().square().sum(0)
    return squares.topk(min(count, z.shape[1])).indices.sort().values


def _explained(decode: Decode, z: Tensor, error: Exception) -> str:
    """Describes why forward mode fails, with the layer found by calling the decoder again with hooks."""
    module = decode if isinstance(decode, nn.Module) else getattr(decode, "__self__", None)
    location = ""
    if isinstance(module, nn.Module):
        entered: list[nn.Module] = []
        layers = {part: name for name, part in module.named_modules() if name and not list(part.children())}
        hooks = [layer.register_forward_pre_hook(lambda layer, _: entered.append(layer)) for layer in layers]
        try:
            torch.func.jvp(partial(_flat, decode), (z[:1],), (torch.ones_like(z[:1]),))
        except DERIVATIVE_FAILS:
            location = f" in {layers[entered[-1]]} ({type(entered[-1]).__name__})" if entered else ""
        finally:
            for hook in hooks:
                hook.remove()
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"forward-mode derivatives must be available for each layer, but they are not{location}: {reason} "
        "To fix this, use mode='auto' or mode='reverse', which is slower."
    )


def plain_attention() -> AbstractContextManager[None]:
    """Computes attention by plain matrix products inside the context, since fused kernels have no forward derivative."""
    return sdpa_kernel(SDPBackend.MATH)
