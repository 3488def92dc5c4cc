"""What the user says about a model: what samples, encodes and decodes, and which real images it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from lightning_gendiag.functional.text import representation
from lightning_gendiag.model.batches import LABELS_ADVICE, Labels, data_of, judge_labels, read_labels


class ModelAdapter:
    """Says how monitors use a module; what is not given is found.

    The module's own methods, those of the modules that it holds and known libraries are tried with two samples, and the
    first is taken whose images are of the size of the real ones. The log says which.

    One adapter serves all monitors of a trainer. Samples are drawn on an isolated copy of the module, in evaluation mode,
    without gradients, in the trainer's precision, and from their own seed, so that training does not notice. They are
    drawn in chunks that are seeded one by one and dealt out to the processes, so they are the same images for any number
    of processes, and for the same weights at every evaluation.

    Args:
        sample: What makes images: the name of a method or submodule (``"generator"``, ``"model.decode"``), a callable
            ``(module, n)``, or None to find it. A submodule, ``decode`` and ``forward`` take standard normal noise.
        encode: What makes latents: a name, a callable ``(module, images)`` or ``(module, images, labels)``, or None to find
            it.
        decode: What decodes latents: a name, a callable ``(module, latents)``, or None to find it.
        num_samples: Number of images at an evaluation, over all processes; by default 1,024, or fewer where they would take
            longer than some seconds, at least 16. A sampler that takes longer than a minute for 16 is left out.
        seed: Seed of the samples; the same at every evaluation, so that curves change with the model only.
        weights: ``"raw"``, ``"ema"``, or ``"auto"`` for averaged weights once there are any: those of Lightning's
            ``WeightAveraging``, else those that the module keeps inside itself, such as ``module.ema`` or
            ``module.ema_scope()``. They are written into the copy that is evaluated.
        reconstruct: What reconstructs images: a name, a callable ``(module, images)``, or None to find it.
        reference: Real images: None takes them from the training batches as they pass by; or a tensor (N, C, H, W), a
            pair of images and labels, a dataset or a dataloader. Where there are no images, rows (N, F), series
            (N, C, T) or volumes (N, C, D, H, W) take their place here and below.
        num_reference: Number of real images that are kept, over all processes; by default 1,024, or as many as hold 67
            million numbers (341 of 3x256x256), at least 256. A slow encoder gets a part of these, at least 64.
        latent_dim: Length of the noise; by default ``module.latent_dim``, ``module.hparams.latent_dim`` or the like.
        conditional: Whether the sampler takes labels (n,) as its last argument; they are drawn from the reference's.
        images: Callable from a batch to its images; by default see :func:`data_of`.
        labels: Callable from a batch to its labels, which :func:`judge_labels` accepts; by default see :func:`read_labels`.
        chunk_size: Number of images in one call of the sampler.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ModelAdapter(sample="generator", latent_dim=100, num_samples=512)
        ModelAdapter(sample='generator', num_samples=512, latent_dim=100)
    """

    def __init__(
        self,
        sample: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        encode: str | Callable | None = None,  # type: ignore[type-arg]
        decode: str | Callable | None = None,  # type: ignore[type-arg]
        num_samples: int | None = None,
        seed: int = 0,
        weights: Literal["auto", "raw", "ema"] = "auto",
        *,
        reconstruct: str | Callable | None = None,  # type: ignore[type-arg]
        reference: Any = None,
        num_reference: int | None = None,
        latent_dim: int | None = None,
        conditional: bool = False,
        images: Callable | None = None,  # type: ignore[type-arg]
        labels: Callable | None = None,  # type: ignore[type-arg]
        chunk_size: int = 128,
    ) -> None:
        for name, number, least in (
            ("num_samples", num_samples, 2),
            ("num_reference", num_reference, 4),
            ("chunk_size", chunk_size, 1),
        ):
            if number is not None and (not isinstance(number, int) or number < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}.")
        if weights not in ("auto", "raw", "ema"):
            raise ValueError(f"weights must be 'auto', 'raw' or 'ema', got {weights!r}.")
        self.sample, self.encode, self.decode, self.reconstruct = sample, encode, decode, reconstruct
        self.num_samples, self.num_reference, self.chunk_size = num_samples, num_reference, chunk_size
        self.seed, self.weights, self.conditional = seed, weights, conditional
        self.reference, self.latent_dim = reference, latent_dim
        self.images, self.labels = images, labels

    def find_data(self, batch: Any) -> Tensor | None:
        """Returns the images (N, C, H, W) or other data (N, ...) of a batch, or None where there are none."""
        given = batch if self.images is None else self.images(batch)
        # what the user names is data, also where it holds integers, and squares are then what they are
        named = self.images is not None and isinstance(given, Tensor) and given.ndim > 1
        data = data_of(given, squares=not named)
        return given if data is None and named else data

    def find_labels(self, batch: Any, images: Tensor | None) -> Labels:
        """Returns the labels (N,) of the images of a batch, or the reason why there are none."""
        if self.labels is None:
            return read_labels(batch, images)
        found = judge_labels(self.labels(batch), None if images is None else len(images))
        advice = self.advice("labels", "batch", "class numbers (N,)")
        return found._replace(reason=found.reason.replace(LABELS_ADVICE, advice))

    def advice(self, argument: str, takes: str, returns: str) -> str:
        """Returns what a message advises: to pass a callable, or, where one was given, what it must take and return.

        Args:
            argument: Name of the argument.
            takes: Names of what the callable takes.
            returns: What it must return.
        """
        given = getattr(self, argument)
        if callable(given) and not isinstance(given, nn.Module):
            return f"let the callable in ModelAdapter({argument}=...) take ({takes}) and return {returns}"
        return f"pass ModelAdapter({argument}=lambda {takes}: ...)"

    @property
    def images_advice(self) -> str:
        """What a message advises where batches hold no images, or images of another shape than is needed."""
        return self.advice("images", "batch", "images (N, C, H, W) or other data (N, ...)")

    def __repr__(self) -> str:
        return representation(self)
