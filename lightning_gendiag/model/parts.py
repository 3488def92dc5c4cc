"""Finds the methods and submodules with which a module samples, encodes and decodes, and calls them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import as_images, tensor_of
from lightning_gendiag.model.batches import Images, images_of, known
from lightning_gendiag.model.generators import random_state_kept

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_gendiag.model.adapter import ModelAdapter
    from lightning_gendiag.model.reference import Reference
    from lightning_gendiag.model.subject import Subject

Need = Literal["sample", "encode", "decode"]
"""An ability of a module that a diagnostic needs."""

LATENT_NAMES = ("latent_dim", "latent_size", "z_dim", "z_size", "dim_z", "noise_dim", "noise_size", "nz", "n_latent")
"""Attributes of a module, of its ``hparams`` or of its decoder that hold the length of the noise."""

LABEL_NAMES = ("y", "label", "labels", "cls", "classes", "target", "targets")
"""Names of parameters that take class labels."""

DECODER_NAMES = ("decode", "decoder")
GENERATOR_NAMES = ("forward", "generator", "gen", "netG", "G")
"""Names of callables from noise to data; ``forward`` stands for the module itself, as in many GANs."""

DEFAULT_NAMES = {
    "sample": ("sample", *DECODER_NAMES, *GENERATOR_NAMES),
    "encode": ("encode", "encoder"),
    "decode": (*DECODER_NAMES, *GENERATOR_NAMES),
}
"""Attributes that are tried in this order where the user names none; those with an unsuitable signature are skipped."""

FIXES = {
    "sample": "ModelAdapter(sample=lambda module, n: ...)",
    "encode": "ModelAdapter(encode=lambda module, images: ...)",
    "decode": "ModelAdapter(decode=lambda module, z: ...)",
}
"""The line of code that an error message suggests for each need where nothing more specific is known."""

MEAN_LAYER, VARIANCE_LAYER = re.compile(r"(^|_|2)(mu|mean)(_|$)"), re.compile(r"var(_|$)|sigma|std")
"""Names of layers that turn an encoder's features into the mean and the variance of a posterior."""


class ModelParts:
    """Finds the callables behind ``sample``, ``encode`` and ``decode``, and calls them inside ``ModelView.isolated``.

    Args:
        adapter: The user's choices.
        subject: The module, and the copy of it that is evaluated.
        real: The real images.
    """

    def __init__(self, adapter: ModelAdapter, subject: Subject, real: Reference) -> None:
        self.adapter, self.subject, self.real = adapter, subject, real
        self._spatial: dict[Need, bool] = {}

    @property
    def module(self) -> LightningModule:
        """The copy of the module that is evaluated."""
        return self.subject.module

    @property
    def reference(self) -> Images | None:
        """The real images; None until they are complete."""
        return self.real.images

    def resolve(self, need: Need) -> Callable[..., Any]:
        """Returns the callable behind ``sample``, ``encode`` or ``decode``."""
        return self.find(need)[1]

    def find(self, need: Need) -> tuple[str, Callable[..., Any]]:
        """Returns the name of the callable behind a need, which is empty for one that the user gave, and the callable.

        Raises:
            ValueError: If there is none; the message shows the line that fixes it.
        """
        wanted, module = getattr(self.adapter, need), self.module
        own = type(module).__name__
        target: Any
        if wanted is None and need == "decode" and isinstance(self.adapter.sample, str) and not self._has_decoder():
            # what the user named for samples also decodes, if it takes latents
            name, target = self.find("sample")
            if takes_noise(target):
                return name, target
        if wanted is None:
            return self._find_default(need)
        target = module
        if isinstance(wanted, str):
            for part in wanted.split(".") if wanted != "forward" else ():
                target = getattr(target, part, None)
            if not callable(target):
                raise ValueError(
                    f"{need} must name a method or submodule of {own}, got {wanted!r}. To fix this, pass {FIXES[need]}."
                )
            return wanted, target
        if not callable(wanted):
            raise ValueError(f"{need} must be a name or a callable, got {wanted!r}. To fix this, pass {FIXES[need]}.")
        given = self.subject.counterpart(wanted)
        return "", given if isinstance(given, nn.Module) else partial(given, module)

    def _find_default(self, need: Need) -> tuple[str, Callable[..., Any]]:
        """Returns the name and the callable of the first default name whose signature is suitable."""
        module, names = self.module, DEFAULT_NAMES[need]
        own = type(module).__name__
        given = 2 if need == "sample" and self.adapter.conditional else 1
        skipped = []
        for name in names:
            found = self._attribute(name)
            if not callable(found):
                continue
            signature = _signature(found)
            if signature is not None and not _accepts(signature, given):
                skipped.append(f"{own}.{name} takes {signature}")
            elif name == "encoder" and (heads := self._posterior_layers()):
                skipped.append(f"{own}.encoder returns features, from which {' and '.join(heads)} make a posterior")
            else:
                return name, found
        argument = {"sample": "n", "encode": "images", "decode": "z"}[need]
        unsuitable = f" that can be used ({', '.join(skipped)})" if skipped else ""
        raise ValueError(
            f"{need} must be known, but {own} has none of {', '.join(names)}{unsuitable}. "
            f"To fix this, define {own}.{need}({argument}), or pass {self._fix(need)}."
        )

    def _attribute(self, name: str) -> Any:
        """Returns an attribute of the module, or None; ``forward`` stands for a module that defines it."""
        if name == "forward":
            return self.module if _has_forward(self.module) else None
        return getattr(self.module, name, None)

    def _has_decoder(self) -> bool:
        """Returns whether the module has a decoder under one of its usual names."""
        return any(callable(self._attribute(name)) for name in DECODER_NAMES)

    def _posterior_layers(self) -> list[str]:
        """Returns the names of the layers beside an ``encoder`` that make a mean and a log variance of its features."""
        names = [name for name, _ in self.module.named_children()]
        mean = [name for name in names if MEAN_LAYER.search(name)][:1]
        return mean + [name for name in names if VARIANCE_LAYER.search(name) and name not in mean][:1] if mean else []

    def _fix(self, need: Need) -> str:
        """Returns the line of code that an error message suggests, as specific as the module allows."""
        module = self.module
        if need == "encode" and (heads := self._posterior_layers()) and callable(getattr(module, "encoder", None)):
            features = f"module.encoder(images){'.flatten(1)' * isinstance(getattr(module, heads[0]), nn.Linear)}"
            layers = ", ".join(f"module.{head}" for head in heads)
            made = f"{layers}({features})" if len(heads) == 1 else f"[head({features}) for head in ({layers})]"
            return f"ModelAdapter(encode=lambda module, images: {made})"
        for name in DEFAULT_NAMES[need]:
            found = self._attribute(name)
            signature = _signature(found) if callable(found) else None
            call = _as_code(name)
            if signature is None or not _accepts(signature, 2) or _accepts(signature, 1):
                continue
            second = list(signature.parameters)[1]
            if second in LABEL_NAMES and need == "sample" and not self.adapter.conditional:
                return "ModelAdapter(conditional=True)"
            if second in LABEL_NAMES and need == "decode":
                one_class = "torch.zeros(len(z), dtype=torch.long, device=z.device)"
                return f"ModelAdapter(decode=lambda module, z: {call}(z, {one_class}))"
            if "device" in second and name == "sample":
                return "ModelAdapter(sample=lambda module, n: module.sample(n, module.device))"
        inner = dict(module.named_children())
        for path, part in (("", module), *inner.items()):
            if need == "sample" and (path or _has_forward(module)) and _returns_distribution(part):
                return f"ModelAdapter(sample=lambda module, n: module{path and '.'}{path}().sample((n,)))"
        for path, part in inner.items():
            for name in DEFAULT_NAMES[need]:
                found = None if name in GENERATOR_NAMES else getattr(part, name, None)
                if callable(found) and (signature := _signature(found)) is not None and _accepts(signature, 1):
                    return f'ModelAdapter({need}="{path}.{name}")'
        return FIXES[need]

    def _latents_to_data(self, need: Need) -> Callable[..., Any]:
        """Returns a callable from latents (n, L) to data; one call finds out whether the module needs (n, L, 1, 1)."""
        name, target = self.find(need)
        if isinstance(target, partial):
            return target
        if need not in self._spatial:
            with random_state_kept(self.module.device):
                self._spatial[need] = self._needs_spatial_latents(need, name, target)
        if self._spatial[need]:
            return lambda z, *labels: target(z[:, :, None, None], *labels)
        return target

    def _needs_spatial_latents(self, need: Need, name: str, target: Callable[..., Any]) -> bool:
        """Returns whether a callable takes latents (2, L, 1, 1) and not (2, L); raises a ValueError if it takes neither."""
        z = self._noise(2)
        labels = (self.sample_labels(2),) if need == "sample" and self.adapter.conditional else ()
        try:
            target(z, *labels)
        except Exception as error:
            # any convolution takes latents of one pixel, but a decoder of larger feature maps would make a wrong, small image
            if name not in DECODER_NAMES or getattr(self.adapter, need) is not None:
                with suppress(Exception):
                    target(z[:, :, None, None], *labels)
                    return True
            raise ValueError(
                f"{need} must take normal noise {tuple(z.shape)}{' and labels' if labels else ''}, but "
                f"{type(self.module).__name__}.{name} raised {type(error).__name__}: {error}. "
                f"To fix this, pass {self._fix(need)}."
            ) from error
        return False

    def sampler(self) -> Callable[..., Any]:
        """Returns a callable from the number of images, and labels where the sampler is conditional, to images."""
        target = self.resolve("sample")
        if not takes_noise(target):
            return target
        generator = self._latents_to_data("sample")
        return lambda n, *labels: generator(self._noise(n), *labels)

    @property
    def sampled_by(self) -> str:
        """A description of the sampler for messages, such as ``"GAN.forward from normal noise (n, 32)"``."""
        name, target = self.find("sample")
        own = f"{type(self.module).__name__}.{name}" if name else "the callable in ModelAdapter(sample=...)"
        if not takes_noise(target):
            return own
        return f"{own} from normal noise (n, {self.prior_length}{', 1, 1' if self._spatial.get('sample') else ''})"

    @property
    def prior_length(self) -> int:
        """L, the length of the noise.

        Raises:
            ValueError: If it is not known.
        """
        length = self._find_latent_dim()
        if length is None:
            raise ValueError(
                f"latent_dim must be known to sample noise for {type(self.module).__name__}, which has none of "
                f"{', '.join(LATENT_NAMES)}. To fix this, pass ModelAdapter(latent_dim=...) or {self._fix('sample')}."
            )
        return length

    def _find_latent_dim(self) -> int | None:
        """Returns the length of the latents that the user or an attribute of the module states, or None."""
        if self.adapter.latent_dim is not None:
            return self.adapter.latent_dim
        holders: list[Any] = [self.module, self.module.hparams]
        holders += [
            getattr(self.module, name, None) for name in (*DECODER_NAMES, *GENERATOR_NAMES) if name != "forward"
        ]
        for wanted in (self.adapter.sample, self.adapter.decode):
            part: Any = self.module
            for attribute in wanted.split(".") if isinstance(wanted, str) else ():
                part = getattr(part, attribute, None)
                holders.append(part)
        for holder in holders:
            for name in LATENT_NAMES if isinstance(holder, (Mapping, nn.Module)) else ():
                value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def _noise(self, n: int) -> Tensor:
        """Returns normal noise (n, L) on the module's device and in the precision of its weights."""
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(n, self.prior_length, device=self.module.device, dtype=dtype)

    def sample_labels(self, n: int) -> Tensor:
        """Returns n labels sampled from the reference, or zeros while there is no reference."""
        if self.reference is None:
            return torch.zeros(n, dtype=torch.long, device=self.module.device)
        labels = known(self.reference.labels, self.real.unlabelled)
        return labels[torch.randint(len(labels), (n,))].to(self.module.device)

    def images_in(self, output: Any, n: int) -> Tensor:
        """Returns the images (n, C, H, W) in the output of a sampler.

        Raises:
            ValueError: If the output holds no images, or several tensors that may be the images.
        """
        if isinstance(output, torch.distributions.Distribution):
            with suppress(NotImplementedError):
                # the mean stands for a distribution over images, as in functional.arrays.tensor_of
                output = output.mean
        images = images_of(output)
        call = self._sampler_call()
        if images is None or len(images) != n:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            flat = isinstance(output, Tensor) and output.ndim == 2 and len(output) == n
            if isinstance(output, torch.distributions.Distribution):
                call, flat = f"{call}.sample((n,))", True
            line = (
                f"ModelAdapter(sample=lambda module, n: {call}.view(n, {self._image_shape()}))"
                if flat
                else self._fix("sample")
            )
            raise ValueError(
                f"sample must return ({n}, C, H, W) images when asked for {n}, got {got}. To fix this, pass {line}."
            )
        if isinstance(output, (tuple, list)):
            alike = sum(isinstance(part, Tensor) and part.shape == images.shape for part in output)
            if alike > 1:
                raise ValueError(
                    f"sample must return one batch of images, got {alike} of {tuple(images.shape)}. "
                    f"To fix this, pass ModelAdapter(sample=lambda module, n: {call}[-1]) to use the last."
                )
        return images

    def _sampler_call(self) -> str:
        """Returns the call of the sampler as code; ``given`` stands for the user's callable."""
        name, target = self.find("sample")
        if not name:
            return f"given(module, n{', labels' if self.adapter.conditional else ''})"
        spatial = ", 1, 1" if self._spatial.get("sample") else ""
        noise = f"torch.randn(n, {self.prior_length}{spatial}, device=module.device)" if takes_noise(target) else "n"
        return f"{_as_code(name)}({noise}{', labels' if self.adapter.conditional else ''})"

    def latents_of(self, images: Tensor) -> Tensor:
        """Returns latents (n, L) of images (n, C, H, W); of a posterior, these are its mean."""
        return self.latents_in(self.encode(images), len(images))

    def latents_in(self, output: Any, n: int) -> Tensor:
        """Returns the latents (n, L) in the output of the encoder for n images.

        Raises:
            ValueError: If the output holds no latents, or their length is not the length of the latent space.
        """
        single = isinstance(output, Tensor)
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) and isinstance(getattr(output, "mean", None), Tensor):
            output = output.mean
        if not isinstance(output, Tensor) or len(output) != n:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"encode must return ({n}, L) latents, got {got}. "
                "To fix this, pass ModelAdapter(encode=lambda module, images: ...)."
            )
        latents = output.flatten(1).detach().float()
        length = self._find_latent_dim()
        if self.adapter.encode is None and length is not None and length not in (latents.shape[1], *output.shape[1:2]):
            name = self.find("encode")[0]
            both = single and output.shape[1:] == (2 * length,)
            if both or name == "encoder":
                halves = f"ModelAdapter(encode=lambda module, images: module.{name}(images).chunk(2, 1))"
                raise ValueError(
                    f"encode must return ({n}, {length}) latents, got {tuple(output.shape)} from "
                    f"{type(self.module).__name__}.{name}. To fix this, pass {halves if both else FIXES['encode']}."
                )
        return latents

    @property
    def encode(self) -> Callable[[Tensor], Any]:
        """The callable from images (n, C, H, W) to the output of the encoder."""
        name, target = self.find("encode")

        def encoded(images: Tensor) -> Any:
            try:
                return target(images)
            except Exception as error:
                line = FIXES["encode"]
                with suppress(Exception):
                    target(images.flatten(1))
                    line = (
                        f"ModelAdapter(encode=lambda module, images: module.{name}(images.flatten(1)))"
                        if name
                        else line
                    )
                raise ValueError(
                    f"encode must take images {tuple(images.shape)}, but {name or 'the given callable'} raised "
                    f"{type(error).__name__}: {error}. To fix this, pass {line}."
                ) from error

        return encoded

    @property
    def decode(self) -> Callable[[Tensor], Any]:
        """The callable from latents (n, L) to data."""
        if self._find_latent_dim() is None:
            # without the length there is no noise to try, so the latents of an encoder are passed on as they are
            return self.resolve("decode")
        return self._latents_to_data("decode")

    def decoded_images(self, z: Tensor) -> Tensor:
        """Returns images (n, C, H, W) of latents (n, L).

        Raises:
            ValueError: If the decoder returns no images.
        """
        output = tensor_of(self.decode(z), len(z))
        if output.ndim != 4:
            name = self.find("decode")[0]
            call = f"{_as_code(name)}(z)" if name else "given(module, z)"
            line = (
                f"ModelAdapter(decode=lambda module, z: {call}.view(-1, {self._image_shape()}))"
                if output.ndim == 2
                else FIXES["decode"]
            )
            raise ValueError(
                f"decode must return ({len(z)}, C, H, W) images, got {tuple(output.shape)}. To fix this, pass {line}."
            )
        return as_images(output)

    def _image_shape(self) -> str:
        """Returns the shape of an image as code, with letters while there is no reference."""
        return "C, H, W" if self.reference is None else ", ".join(map(str, self.reference.images.shape[1:]))


def _has_forward(module: nn.Module) -> bool:
    """Returns whether a module defines ``forward`` and does not merely inherit it from torch or Lightning."""
    first = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return first is not nn.Module and first.__name__ != "LightningModule"


def _as_code(name: str) -> str:
    """Returns the code that refers to a part of the module."""
    return "module" if name == "forward" else f"module.{name}"


def takes_noise(target: Callable[..., Any]) -> bool:
    """Returns whether a callable takes noise, as decoders and generators do, and not the number of images."""
    return isinstance(target, nn.Module) or getattr(target, "__name__", "") in (*DECODER_NAMES, *GENERATOR_NAMES)


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the signature of a callable, or None where Python cannot determine it."""
    if isinstance(target, nn.Module):
        target = target.forward
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _accepts(signature: inspect.Signature, given: int) -> bool:
    """Returns whether a signature accepts a number of positional arguments."""
    try:
        signature.bind(*range(given))
    except TypeError:
        return False
    return True


def _returns_distribution(module: nn.Module) -> bool:
    """Returns whether a module is called without arguments, as a flow that returns a distribution."""
    signature = _signature(module)
    # a signature with *args or **kwargs accepts any call, and so it says nothing
    return signature is not None and "*" not in str(signature) and _accepts(signature, 0)
