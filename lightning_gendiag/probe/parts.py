"""What of a module makes samples, latents and data: found by name and by trying, or asked for in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gendiag.functional import as_images, tensor_of
from lightning_gendiag.probe.batches import Images, images_of
from lightning_gendiag.probe.isolation import random_state_kept

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

LATENT_NAMES = ("latent_dim", "latent_size", "z_dim", "z_size", "dim_z", "noise_dim", "noise_size", "nz", "n_latent")
"""Attributes of a module, of its ``hparams`` or of its generator that say how long its noise is."""

LABELS = ("y", "label", "labels", "cls", "classes", "target", "targets")
"""What a parameter is called that takes classes."""

DECODERS = ("decode", "decoder")
GENERATORS = ("forward", "generator", "gen", "netG", "G")
"""What makes data from latents: a GAN's ``forward`` does, where it has one."""

OWN_NAMES = {
    "sample": ("sample", *DECODERS, *GENERATORS),
    "encode": ("encode", "encoder"),
    "decode": (*DECODERS, *GENERATORS),
}
"""What is looked for on a module when nothing is said; what does not take what it would be given is passed over."""

LINES = {
    "sample": "Probe(sample=lambda module, n: ...)",
    "encode": "Probe(encode=lambda module, images: ...)",
    "decode": "Probe(decode=lambda module, z: ...)",
}
"""What to write where nothing fits."""

MEAN_HEAD, SPREAD_HEAD = re.compile(r"(^|_|2)(mu|mean)(_|$)"), re.compile(r"var(_|$)|sigma|std")
"""Layers that make a posterior of an encoder's features."""


class Parts:
    """What a probe calls of its module. What is called runs inside the probe's ``looking``."""

    module: LightningModule
    sample: str | Callable[..., Any] | None
    encode: str | Callable[..., Any] | None
    decode: str | Callable[..., Any] | None
    latent_dim: int | None
    conditional: bool
    reference: Images | None
    _tall: dict[str, bool]
    """By need: whether latents are wanted as (n, L, 1, 1)."""

    def _resolve(self, need: str) -> Callable[..., Any]:
        """What stands behind ``sample``, ``encode`` or ``decode``."""
        return self._found(need)[1]

    def _found(self, need: str) -> tuple[str, Callable[..., Any]]:
        """Its name on the module, empty for a callable that was given, and what stands behind it."""
        wanted, module = getattr(self, need), self.module
        own = type(module).__name__
        target: Any
        if wanted is None and need == "decode" and isinstance(self.sample, str) and not self._own_decoder():
            # what was named for samples, if it takes latents
            name, target = self._found("sample")
            if takes_noise(target):
                return name, target
        if wanted is None:
            return self._guessed(need)
        target = module
        if isinstance(wanted, str):
            for part in wanted.split(".") if wanted != "forward" else ():
                target = getattr(target, part, None)
            if not callable(target):
                raise ValueError(
                    f"{need} must name a method or submodule of {own}, got {wanted!r}. To fix this, pass {LINES[need]}."
                )
            return wanted, target
        if not callable(wanted):
            raise ValueError(f"{need} must be a name or a callable, got {wanted!r}. To fix this, pass {LINES[need]}.")
        return "", wanted if isinstance(wanted, nn.Module) else partial(wanted, module)

    def _guessed(self, need: str) -> tuple[str, Callable[..., Any]]:
        """The first of the module's own that takes what it would be given."""
        module, names = self.module, OWN_NAMES[need]
        own = type(module).__name__
        given = 2 if need == "sample" and self.conditional else 1
        others = []
        for name in names:
            found = self._own(name)
            if not callable(found):
                continue
            parameters = _parameters(found)
            if parameters is not None and not _takes(parameters, given):
                others.append(f"{own}.{name} takes {parameters}")
            elif name == "encoder" and (heads := self._heads()):
                others.append(f"{own}.encoder gives features, of which {' and '.join(heads)} make a posterior")
            else:
                return name, found
        argument = {"sample": "n", "encode": "images", "decode": "z"}[need]
        passed_over = f" that takes it alone ({', '.join(others)})" if others else ""
        raise ValueError(
            f"{need} must be known, but {own} has none of {', '.join(names)}{passed_over}. "
            f"To fix this, define {own}.{need}({argument}), or pass {self._line(need)}."
        )

    def _own(self, name: str) -> Any:
        """What the module has by a name; ``forward`` is the module itself, where it has one."""
        if name == "forward":
            return self.module if _has_forward(self.module) else None
        return getattr(self.module, name, None)

    def _own_decoder(self) -> bool:
        return any(callable(self._own(name)) for name in DECODERS)

    def _heads(self) -> list[str]:
        """The layers beside an ``encoder`` that make a mean, and a log variance, of its features."""
        names = [name for name, _ in self.module.named_children()]
        mean = [name for name in names if MEAN_HEAD.search(name)][:1]
        return mean + [name for name in names if SPREAD_HEAD.search(name) and name not in mean][:1] if mean else []

    def _line(self, need: str) -> str:
        """The line of code to write where nothing fits, as far as the module tells it."""
        module = self.module
        if need == "encode" and (heads := self._heads()) and callable(getattr(module, "encoder", None)):
            features = f"module.encoder(images){'.flatten(1)' * isinstance(getattr(module, heads[0]), nn.Linear)}"
            layers = ", ".join(f"module.{head}" for head in heads)
            made = f"{layers}({features})" if len(heads) == 1 else f"[head({features}) for head in ({layers})]"
            return f"Probe(encode=lambda module, images: {made})"
        for name in OWN_NAMES[need]:
            found = self._own(name)
            parameters = _parameters(found) if callable(found) else None
            call = _written(name)
            if parameters is None or not _takes(parameters, 2) or _takes(parameters, 1):
                continue
            second = list(parameters.parameters)[1]
            if second in LABELS and need == "sample" and not self.conditional:
                return "Probe(conditional=True)"
            if second in LABELS and need == "decode":
                one_class = "torch.zeros(len(z), dtype=torch.long, device=z.device)"
                return f"Probe(decode=lambda module, z: {call}(z, {one_class}))"
            if "device" in second and name == "sample":
                return "Probe(sample=lambda module, n: module.sample(n, module.device))"
        inner = dict(module.named_children())
        for path, part in (("", module), *inner.items()):
            if need == "sample" and (path or _has_forward(module)) and _gives_distribution(part):
                return f"Probe(sample=lambda module, n: module{path and '.'}{path}().sample((n,)))"
        for path, part in inner.items():
            for name in OWN_NAMES[need]:
                found = None if name in GENERATORS else getattr(part, name, None)
                if callable(found) and (parameters := _parameters(found)) is not None and _takes(parameters, 1):
                    return f'Probe({need}="{path}.{name}")'
        return LINES[need]

    def _fitted(self, need: str) -> Callable[..., Any]:
        """What takes latents (n, L); tried once, since a generator may want (n, L, 1, 1); inside :meth:`looking`."""
        name, target = self._found(need)
        if isinstance(target, partial):
            return target
        if need not in self._tall:
            with random_state_kept(self.module.device):
                self._tall[need] = self._wants_tall(need, name, target)
        if self._tall[need]:
            return lambda z, *labels: target(z[:, :, None, None], *labels)
        return target

    def _wants_tall(self, need: str, name: str, target: Callable[..., Any]) -> bool:
        z = self._noise(2)
        labels = (self.labels(2),) if need == "sample" and self.conditional else ()
        try:
            target(z, *labels)
        except Exception as error:
            # any convolution takes latents of one pixel: what decodes codes of many would make a wrong, small image
            if name not in DECODERS or getattr(self, need) is not None:
                with suppress(Exception):
                    target(z[:, :, None, None], *labels)
                    return True
            raise ValueError(
                f"{need} must take normal noise {tuple(z.shape)}{' and labels' if labels else ''}, but "
                f"{type(self.module).__name__}.{name} gave {type(error).__name__}: {error}. "
                f"To fix this, pass {self._line(need)}."
            ) from error
        return False

    def _sampler(self) -> Callable[..., Any]:
        """The callable from a number, and labels, to images; inside :meth:`looking`."""
        target = self._resolve("sample")
        if not takes_noise(target):
            return target
        generator = self._fitted("sample")
        return lambda n, *labels: generator(self._noise(n), *labels)

    @property
    def sampled_by(self) -> str:
        """In words, how images are made."""
        name, target = self._found("sample")
        own = f"{type(self.module).__name__}.{name}" if name else "what Probe(sample=...) was given"
        if not takes_noise(target):
            return own
        return f"{own} from normal noise (n, {self.noise_length}{', 1, 1' if self._tall.get('sample') else ''})"

    @property
    def noise_length(self) -> int:
        """L, the length of the noise."""
        length = self._length()
        if length is None:
            raise ValueError(
                f"latent_dim must be known to draw noise for {type(self.module).__name__}, which has none of "
                f"{', '.join(LATENT_NAMES)}. To fix this, pass Probe(latent_dim=...) or {self._line('sample')}."
            )
        return length

    def _length(self) -> int | None:
        if self.latent_dim is not None:
            return self.latent_dim
        holders: list[Any] = [self.module, self.module.hparams]
        holders += [getattr(self.module, name, None) for name in (*DECODERS, *GENERATORS) if name != "forward"]
        for wanted in (self.sample, self.decode):
            part: Any = self.module
            for step in wanted.split(".") if isinstance(wanted, str) else ():
                part = getattr(part, step, None)
                holders.append(part)
        for holder in holders:
            for name in LATENT_NAMES if isinstance(holder, (Mapping, nn.Module)) else ():
                value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def _noise(self, n: int) -> Tensor:
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(n, self.noise_length, device=self.module.device, dtype=dtype)

    def labels(self, n: int) -> Tensor:
        """Labels (n,) as the reference has them; zeros while there is none."""
        if self.reference is None:
            return torch.zeros(n, dtype=torch.long, device=self.module.device)
        if self.reference.labels is None:
            raise ValueError(
                "labels must be known for a conditional sampler, but the batches have none. "
                "To fix this, pass Probe(labels=lambda batch: ...)."
            )
        return self.reference.labels[torch.randint(len(self.reference.labels), (n,))].to(self.module.device)

    def _images_in(self, output: Any, n: int) -> Tensor:
        """The images (n, C, H, W) that a sampler returned; refused where it is not sure which they are."""
        if isinstance(output, torch.distributions.Distribution):
            with suppress(NotImplementedError):
                # a decoder's, as in functional.tensor_of
                output = output.mean
        images = images_of(output)
        call = self._call()
        if images is None or len(images) != n:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            flat = isinstance(output, Tensor) and output.ndim == 2 and len(output) == n
            if isinstance(output, torch.distributions.Distribution):
                call, flat = f"{call}.sample((n,))", True
            line = f"Probe(sample=lambda module, n: {call}.view(n, {self._shape()}))" if flat else self._line("sample")
            raise ValueError(
                f"sample must return ({n}, C, H, W) images when asked for {n}, got {got}. To fix this, pass {line}."
            )
        if isinstance(output, (tuple, list)):
            alike = sum(isinstance(part, Tensor) and part.shape == images.shape for part in output)
            if alike > 1:
                raise ValueError(
                    f"sample must return one batch of images, got {alike} of {tuple(images.shape)}. "
                    f"To fix this, pass Probe(sample=lambda module, n: {call}[-1]) if the last are meant."
                )
        return images

    def _call(self) -> str:
        """The call of the sampler, as a line of code."""
        name, target = self._found("sample")
        if not name:
            return f"given(module, n{', labels' if self.conditional else ''})"
        tall = ", 1, 1" if self._tall.get("sample") else ""
        noise = f"torch.randn(n, {self.noise_length}{tall}, device=module.device)" if takes_noise(target) else "n"
        return f"{_written(name)}({noise}{', labels' if self.conditional else ''})"

    def codes(self, images: Tensor) -> Tensor:
        """Latents (n, L) of images, the posterior's mean where there is one; inside :meth:`looking`."""
        return self.codes_in(self.encoder(images), len(images))

    def codes_in(self, output: Any, n: int) -> Tensor:
        """Latents (n, L) in what the encoder gave for n images."""
        single = isinstance(output, Tensor)
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) and isinstance(getattr(output, "mean", None), Tensor):
            output = output.mean
        if not isinstance(output, Tensor) or len(output) != n:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"encode must return ({n}, L) latents, got {got}. "
                "To fix this, pass Probe(encode=lambda module, images: ...)."
            )
        codes = output.flatten(1).detach().float()
        length = self._length()
        if self.encode is None and length is not None and length not in (codes.shape[1], *output.shape[1:2]):
            name = self._found("encode")[0]
            both = single and output.shape[1:] == (2 * length,)
            if both or name == "encoder":
                halves = f"Probe(encode=lambda module, images: module.{name}(images).chunk(2, 1))"
                raise ValueError(
                    f"encode must return ({n}, {length}) latents, got {tuple(output.shape)} of "
                    f"{type(self.module).__name__}.{name}. To fix this, pass {halves if both else LINES['encode']}."
                )
        return codes

    @property
    def encoder(self) -> Any:
        """The callable from images to latents; inside :meth:`looking`."""
        name, target = self._found("encode")

        def encoded(images: Tensor) -> Any:
            try:
                return target(images)
            except Exception as error:
                line = LINES["encode"]
                with suppress(Exception):
                    target(images.flatten(1))
                    line = f"Probe(encode=lambda module, images: module.{name}(images.flatten(1)))" if name else line
                raise ValueError(
                    f"encode must take images {tuple(images.shape)}, but {name or 'what was given'} gave "
                    f"{type(error).__name__}: {error}. To fix this, pass {line}."
                ) from error

        return encoded

    @property
    def decoder(self) -> Any:
        """The callable from latents (n, L) to data; inside :meth:`looking`."""
        if self._length() is None:
            # seen in codes of images instead
            return self._resolve("decode")
        return self._fitted("decode")

    def decoded_images(self, z: Tensor) -> Tensor:
        """Images (n, C, H, W) of latents (n, L); inside :meth:`looking`.

        Raises:
            ValueError: if what decodes gives no images.
        """
        output = tensor_of(self.decoder(z), len(z))
        if output.ndim != 4:
            name = self._found("decode")[0]
            call = f"{_written(name)}(z)" if name else "given(module, z)"
            line = (
                f"Probe(decode=lambda module, z: {call}.view(-1, {self._shape()}))"
                if output.ndim == 2
                else LINES["decode"]
            )
            raise ValueError(
                f"decode must make ({len(z)}, C, H, W) images, got {tuple(output.shape)}. To fix this, pass {line}."
            )
        return as_images(output)

    def _shape(self) -> str:
        """An image's, in words, as far as it is known."""
        return "C, H, W" if self.reference is None else ", ".join(map(str, self.reference.images.shape[1:]))


def _has_forward(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, and not only Lightning's, of whichever package."""
    first = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return first is not nn.Module and first.__name__ != "LightningModule"


def _written(name: str) -> str:
    """How code names a part of the module."""
    return "module" if name == "forward" else f"module.{name}"


def takes_noise(target: Callable[..., Any]) -> bool:
    """Whether what was found takes noise, and not the number of images."""
    return isinstance(target, nn.Module) or getattr(target, "__name__", "") in (*DECODERS, *GENERATORS)


def _parameters(target: Callable[..., Any]) -> inspect.Signature | None:
    """What a callable takes, where it can be known."""
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target).forward
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _takes(parameters: inspect.Signature, given: int) -> bool:
    try:
        parameters.bind(*range(given))
    except TypeError:
        return False
    return True


def _gives_distribution(module: nn.Module) -> bool:
    """Whether a module is called without data, as a flow is that gives a distribution."""
    parameters = _parameters(module)
    # what is not written takes anything
    return parameters is not None and "*" not in str(parameters) and _takes(parameters, 0)
