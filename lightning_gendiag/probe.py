"""How a model is looked at: samples, codes and a reference of real images, without leaving a trace."""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.functional import as_images, exact_matmul, tensor_of
from lightning_gendiag.judges import FeatureNetwork
from lightning_gendiag.regions import RegionMap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

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


class Images(NamedTuple):
    """Images and, where they are known, their labels."""

    images: Tensor
    """(N, C, H, W)"""
    labels: Tensor | None
    """(N,) integers"""


def images_of(batch: Any) -> Tensor | None:
    """The images (N, C, H, W) of a batch: a tensor, the first of a tuple, or ``image(s)``, ``x``, ``pixel_values``."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim == 4 else None
    if isinstance(batch, Mapping):
        named = [batch[key] for key in ("image", "images", "img", "x", "pixel_values", "data") if key in batch]
        return images_of(named[0]) if named else None
    if isinstance(batch, (tuple, list)) and batch:
        return images_of(batch[0])
    return None


def labels_of(batch: Any) -> Tensor | None:
    """The labels (N,) of a batch: the second of a tuple, or ``label(s)``, ``y``, ``target(s)``; None where there are none."""
    if isinstance(batch, Mapping):
        named = [batch[key] for key in ("label", "labels", "y", "target", "targets") if key in batch]
    elif isinstance(batch, (tuple, list)):
        named = list(batch[1:2])
    else:
        named = []
    labels = named[0] if named else None
    good = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    return labels if good else None


class Encoded(NamedTuple):
    """What the encoder gave for some real images."""

    output: Any
    size: int
    """How many images."""
    labels: Tensor | None
    """(size,) on the module's device."""


class _Rows(Diagnostic):
    """Images that passed by on every rank; its sync pools them."""

    images: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor | None) -> None:
        self.images.append(images)
        if labels is not None:
            self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.rows("images"), self.rows("labels")


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put every random generator that the training loop may use back as it was."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def untouched(module: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Show a module in evaluation mode, without gradients; put back its modes, buffers and, if asked, parameters.

    Modes are kept for each submodule, since a user may have frozen one.
    """
    modes = [(part, part.training) for part in module.modules()]
    held: list[dict[str, Any]] = [part._buffers for part in module.modules()]
    if parameters:
        held += [part._parameters for part in module.modules()]
    kept = [
        (own, name, tensor, None if tensor is None or nn.parameter.is_lazy(tensor) else tensor.detach().clone())
        for own in held
        for name, tensor in own.items()
    ]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for own, name, tensor, value in kept:
                own[name] = tensor
                if tensor is not None and value is not None and not torch.equal(tensor, value):
                    tensor.copy_(value)
        for part, mode in modes:
            part.training = mode


@contextmanager
def in_full_precision(module: nn.Module) -> Iterator[None]:
    """A module of half precision in float32, without autocast; then its very tensors again."""
    low = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [tensor.data for tensor in low]
    try:
        for tensor in low:
            tensor.data = tensor.data.float()
        with exact_matmul():
            yield
    finally:
        for tensor, data in zip(low, kept, strict=True):
            tensor.data = data


class Probe:
    """How monitors look at a module. One probe serves all monitors of a trainer: one draw, one reference.

    Sampling runs in evaluation mode, without gradients, in the trainer's precision, from its own seed; random
    generators, buffers and modes are as before afterwards. Samples come in chunks that are seeded one by one and dealt
    out to the ranks, so they are the same images for any number of processes.

    Args:
        sample: what makes images: the name of a method or submodule (``"generator"``, ``"model.decode"``), a
            callable ``(module, n)``, or None for the module's own ``sample(n)``, else its ``decode``, ``decoder``,
            ``forward`` or ``generator`` applied to noise. A submodule, ``decode`` and ``forward`` take standard normal
            noise (n, latent_dim), or (n, latent_dim, 1, 1) where a generator begins with a convolution.
        encode: name, callable ``(module, images)``, or None for the module's ``encode`` or ``encoder``, if that gives
            latents and no features for layers such as ``fc_mu``.
        decode: name, callable ``(module, latents)``, or None for the module's ``decode``, ``decoder``, what ``sample``
            names, or what a GAN makes images with.
        num_samples: images a look, over all processes.
        seed: of the samples; the same at every look, so that curves move with the model only.
        weights: ``"raw"``, ``"ema"`` (Lightning's ``WeightAveraging``), or ``"auto"``: averaged ones once there are any.
        reference: the real images: None takes them from training batches as they pass by; or a tensor (N, C, H, W), a
            pair of images and labels, a dataset or a dataloader.
        num_reference: how many real images are kept, over all processes.
        latent_dim: length of the noise; by default ``module.latent_dim``, ``module.hparams.latent_dim`` or the like.
        conditional: whether the sampler takes labels (n,) as its last argument; they are drawn from the reference's.
        images: callable from a batch to its images; by default see :func:`images_of`.
        labels: callable from a batch to its labels; by default see :func:`labels_of`.
        chunk_size: images to a call of the sampler.

    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(
        self,
        sample: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        encode: str | Callable | None = None,  # type: ignore[type-arg]
        decode: str | Callable | None = None,  # type: ignore[type-arg]
        num_samples: int = 1024,
        seed: int = 0,
        weights: Literal["auto", "raw", "ema"] = "auto",
        *,
        reference: Any = None,
        num_reference: int = 1024,
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
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}.")
        if weights not in ("auto", "raw", "ema"):
            raise ValueError(f"weights must be 'auto', 'raw' or 'ema', got {weights!r}.")
        self.sample, self.encode, self.decode = sample, encode, decode
        self.num_samples, self.num_reference, self.chunk_size = num_samples, num_reference, chunk_size
        self.seed, self.weights, self.conditional = seed, weights, conditional
        self.given, self.latent_dim = reference, latent_dim
        self.find_images, self.find_labels = images or images_of, labels or labels_of
        self.owner: object | None = None
        self.reference: Images | None = None
        self.maps: dict[Any, RegionMap] = {}
        self._rows: _Rows | None = None
        self._epoch_seen = False
        self._last_batch: tuple[int, int] | None = None
        self._drawn: tuple[int, Images] | None = None
        self._encoded: tuple[int, list[Encoded]] | None = None
        self._judge: FeatureNetwork | None = None
        self._tried: Images | None = None
        self._tall: dict[str, bool] = {}
        self._warned_range = False

    # ---- the module ----

    def attach(self, trainer: Trainer, module: LightningModule, needs: tuple[str, ...]) -> None:
        """Take hold of a trainer and its module; refuse in words what cannot work.

        Raises:
            ValueError: if the module lacks what is needed, or the reference given is none.
        """
        self.trainer, self.module = trainer, module
        self._drawn, self._encoded, self._tried, self._tall = None, None, None, {}
        for need in needs:
            target = self._resolve(need)
            if need == "sample" and _takes_noise(target):
                # refused at once if unknown
                _ = self.noise_length
        if self.weights == "ema" and self._averaging() is None:
            raise ValueError(
                "weights must be 'raw' or 'auto' where no callback averages weights, got 'ema'. "
                "To fix this, add lightning.pytorch.callbacks.WeightAveraging to the trainer."
            )
        if self.given is not None and self.reference is None:
            self.reference = self._read(self.given)

    def try_out(self) -> Images:
        """Two samples, to see once that sampling works before training begins; nothing of the module changes.

        Raises:
            ValueError: if the sampler fails or gives no images.
        """
        if self.module.device.type == "meta":
            raise ValueError("the module must be on a real device before it can be sampled, got 'meta'.")
        if self._tried is None:
            with self.looking(parameters=True):
                self._tried = self._chunk(0, 2)
            if self.sample is None and _takes_noise(self._resolve("sample")):
                rank_zero_info(f"Samples are made by {self.sampled_by}; Probe(sample=...) says otherwise.")
        return self._tried

    def try_codes(self, images: Tensor, decoded: bool = False) -> None:
        """See whether images (n, C, H, W) have latents, and if asked whether they decode; nothing of the module changes.

        Raises:
            ValueError: if they have none, or what decodes takes others.
        """
        with self.looking(parameters=True, exact=True):
            codes = self.codes(self.as_input(as_images(images)))
            if not decoded:
                return
            try:
                tensor_of(self.decoder(self.as_input(codes)), len(codes))
            except Exception as error:
                raise ValueError(
                    f"encode must give the latents that decode takes, got {tuple(codes.shape)}, of which decode makes "
                    f"{type(error).__name__}: {error}. To fix this, pass {LINES['encode']}."
                ) from error

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
            if _takes_noise(target):
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
            found = getattr(module, name, None) if name != "forward" else module if _has_forward(module) else None
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

    def _own_decoder(self) -> bool:
        return any(callable(getattr(self.module, name, None)) for name in DECODERS)

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
            found = getattr(module, name, None) if name != "forward" else module if _has_forward(module) else None
            parameters = _parameters(found) if callable(found) else None
            call = "module" if name == "forward" else f"module.{name}"
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
        labels = (self._labels(2),) if need == "sample" and self.conditional else ()
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
        if not _takes_noise(target):
            return target
        generator = self._fitted("sample")
        return lambda n, *labels: generator(self._noise(n), *labels)

    @property
    def sampled_by(self) -> str:
        """In words, how images are made."""
        name, target = self._found("sample")
        own = f"{type(self.module).__name__}.{name}" if name else "what Probe(sample=...) was given"
        if not _takes_noise(target):
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

    # ---- looking ----

    @contextmanager
    def looking(self, parameters: bool = False, exact: bool = False) -> Iterator[None]:
        """The module in evaluation mode, with the weights asked for, in the trainer's precision; then all as before.

        Args:
            parameters: put the parameters back too.
            exact: in float32 or better, whatever the trainer's precision.
        """
        averaging = self._averaging() if self.averaged else None
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(self.module.device))
            if averaging is not None:
                averaging._swap_models(self.module)
                stack.callback(averaging._swap_models, self.module)
            stack.enter_context(untouched(self.module, parameters))
            stack.enter_context(_uncompiled())
            if exact:
                stack.enter_context(in_full_precision(self.module))
            else:
                stack.enter_context(self.trainer.precision_plugin.forward_context())
            yield

    @property
    def averaged(self) -> bool:
        """Whether the next look sees averaged weights."""
        if self.weights == "raw":
            return False
        averaging = self._averaging()
        model = None if averaging is None else averaging._average_model
        return model is not None and (self.weights == "ema" or int(model.n_averaged) > 0)

    def _averaging(self) -> Any:
        return next((c for c in self.trainer.callbacks if is_kind(c, "WeightAveraging")), None)  # type: ignore[attr-defined]

    def _chunk(self, index: int, n: int) -> Images:
        """One seeded call of the sampler, as float32 images; inside :meth:`looking`."""
        sampler = self._sampler()
        torch.manual_seed(self.seed + 7919 * index)
        np.random.seed((self.seed + 7919 * index) % 2**32)  # noqa: NPY002
        random.seed(self.seed + 7919 * index)
        labels = self._labels(n) if self.conditional else None
        try:
            output = sampler(n) if labels is None else sampler(n, labels)
        except Exception as error:
            raise ValueError(
                f"sample must make {n} images when called with {n}{'' if labels is None else ' and labels'}, "
                f"got {type(error).__name__}: {error}. To fix this, pass {LINES['sample']}."
            ) from error
        images = self._images_in(output, n)
        return Images(as_images(images.detach(), "generated").float(), labels)

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
            shape = "C, H, W" if self.reference is None else ", ".join(map(str, self.reference.images.shape[1:]))
            line = f"Probe(sample=lambda module, n: {call}.view(n, {shape}))" if flat else self._line("sample")
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
        noise = f"torch.randn(n, {self.noise_length}{tall}, device=module.device)" if _takes_noise(target) else "n"
        return f"module{'' if name == 'forward' else f'.{name}'}({noise}{', labels' if self.conditional else ''})"

    def _labels(self, n: int) -> Tensor:
        """Labels (n,) as the reference has them; zeros while there is none."""
        if self.reference is None:
            return torch.zeros(n, dtype=torch.long, device=self.module.device)
        if self.reference.labels is None:
            raise ValueError(
                "labels must be known for a conditional sampler, but the batches have none. "
                "To fix this, pass Probe(labels=lambda batch: ...)."
            )
        return self.reference.labels[torch.randint(len(self.reference.labels), (n,))].to(self.module.device)

    def samples(self, step: int) -> Images:
        """This rank's share of the samples at a step, drawn once and shared by all monitors."""
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = None
            rank, world = self.trainer.global_rank, self.trainer.world_size
            chunks = math.ceil(self.num_samples / self.chunk_size)
            drawn = []
            with self.looking():
                # every rank calls the model equally often, since a sharded model talks to the others in each call
                for index in range(rank, math.ceil(chunks / world) * world, world):
                    n = min(self.chunk_size, self.num_samples - index * self.chunk_size)
                    chunk = self._chunk(index, max(n, 1))
                    drawn.append(Images(*(None if x is None else x[: max(n, 0)] for x in chunk)))  # type: ignore[arg-type]
            images = torch.cat([chunk.images for chunk in drawn])
            labels = [chunk.labels for chunk in drawn if chunk.labels is not None]
            self._drawn = (step, Images(images, torch.cat(labels) if labels else None))
            self._check_range(images)
        return self._drawn[1]

    def as_input(self, x: Tensor) -> Tensor:
        """Images or latents as the module takes them inside ``looking(exact=True)``: on its device, float64 if it is."""
        double = any(parameter.dtype == torch.float64 for parameter in self.module.parameters())
        return x.to(self.module.device, torch.float64 if double else torch.float32)

    def latents(self, n: int, all_ranks: bool = False) -> Iterator[Tensor]:
        """Seeded draws (., L) of the prior N(0, 1) in float32, in chunks.

        Args:
            n: how many, over all processes.
            all_ranks: each process gets all of them, instead of its share.
        """
        rank, world = (0, 1) if all_ranks else (self.trainer.global_rank, self.trainer.world_size)
        size = min(self.chunk_size, 16)
        for index in range(rank, math.ceil(n / size), world):
            generator = torch.Generator().manual_seed(self.seed + 7919 * index)
            z = torch.randn(min(size, n - index * size), self.noise_length, generator=generator)
            yield self.as_input(z)

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

    def encoded(self, step: int) -> list[Encoded]:
        """What the encoder gives for this rank's share of the reference at a step, once for all monitors."""
        if self._encoded is None or self._encoded[0] != step:
            self._encoded = None
            images, labels = self.real_share()
            parts = []
            with self.looking(exact=True):
                encoder = self.encoder
                for start in range(0, len(images), self.chunk_size):
                    some = self.as_input(as_images(images[start : start + self.chunk_size]))
                    own = None if labels is None else labels[start : start + self.chunk_size].to(some.device)
                    parts.append(Encoded(encoder(some), len(some), own))
            self._encoded = (step, parts)
        return self._encoded[1]

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
            call = f"module{'' if name == 'forward' else f'.{name}'}(z)" if name else "given(module, z)"
            shape = "C, H, W" if self.reference is None else ", ".join(map(str, self.reference.images.shape[1:]))
            line = f"Probe(decode=lambda module, z: {call}.view(-1, {shape}))" if output.ndim == 2 else LINES["decode"]
            raise ValueError(
                f"decode must make ({len(z)}, C, H, W) images, got {tuple(output.shape)}. To fix this, pass {line}."
            )
        return as_images(output)

    # ---- the real images ----

    @property
    def feature_network(self) -> FeatureNetwork:
        """Features of images for those who bring no network, fitted on the reference once for all monitors."""
        assert self.reference is not None
        self._judge = self._judge or FeatureNetwork(as_images(self.reference.images).to(self.module.device))
        return self._judge

    def collect(self, batch: Any, key: tuple[int, int]) -> None:
        """Keep real images of a training batch that passes by, until this rank has its share.

        Args:
            batch: any batch of the training loop.
            key: epoch and index of the batch; a second call for the same is without effect.

        Raises:
            ValueError: if no images are found in the batch.
        """
        if self.reference is not None or key == self._last_batch:
            return
        self._last_batch = key
        self._rows = self._rows or _Rows()
        held = sum(len(rows) for rows in self._rows.images)
        room = math.ceil(self.num_reference / self.trainer.world_size) - held
        if room > 0:
            part = self._part(batch, room)
            self._rows.update(part.images.cpu(), None if part.labels is None else part.labels.cpu())

    def _part(self, batch: Any, room: int) -> Images:
        """The first finite images of a batch."""
        images = self.find_images(batch)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(
                f"a batch must hold (N, C, H, W) images, got {_shape(batch)}. "
                "To fix this, pass Probe(images=lambda batch: ...)."
            )
        images = images.detach()[:room]
        if images.dtype != torch.uint8:
            images = as_images(images, "the batch's images")
        labels = self.find_labels(batch)
        labels = None if labels is None else labels.detach()[:room]
        finite = images.flatten(1).isfinite().all(1)
        return Images(images[finite].clone(), None if labels is None else labels[finite].clone())

    def ready(self, epoch_over: bool) -> bool:
        """Whether the reference is there; pools it over all ranks once each has its share or an epoch is over."""
        if self.reference is not None:
            return True
        if epoch_over:
            self.end_epoch()
        self._rows = self._rows or _Rows()
        share = math.ceil(self.num_reference / self.trainer.world_size)
        full = self._epoch_seen or sum(len(rows) for rows in self._rows.images) >= share
        if not self.trainer.strategy.reduce_boolean_decision(full, all=True):
            return False
        # collectives of the accelerator's kind want its tensors
        rows = self._rows.to(self.module.device)
        images, labels = rows.compute()
        self._rows = None
        if len(images) < 4:
            raise ValueError(f"the reference must hold at least 4 finite images, got {len(images)}.")
        known = len(labels) == len(images)
        self.reference = Images(
            images[: self.num_reference].cpu(), labels[: self.num_reference].cpu() if known else None
        )
        return True

    def end_epoch(self) -> None:
        """Tell that an epoch passed: what was seen by now is all that there is."""
        self._epoch_seen = True

    def _read(self, given: Any) -> Images:
        """A reference from what the user gave, the same on every rank."""
        if isinstance(given, Tensor) or (isinstance(given, (tuple, list)) and isinstance(given[0], Tensor)):
            return self._checked([self._part(given, self.num_reference)])
        if isinstance(given, DataLoader):
            parts: list[Images] = []
            with random_state_kept(self.module.device):
                torch.manual_seed(self.seed)
                for batch in given:
                    parts.append(self._part(batch, self.num_reference - sum(len(p.images) for p in parts)))
                    if sum(len(p.images) for p in parts) >= self.num_reference:
                        break
            return self._checked(parts)
        if isinstance(given, Dataset):
            total = len(given)  # type: ignore[arg-type]
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[: self.num_reference]
            with random_state_kept(self.module.device):
                torch.manual_seed(self.seed)
                items = [given[int(i)] for i in order]
            batch = torch.utils.data.default_collate(items)
            return self._checked([self._part(batch, self.num_reference)])
        raise ValueError(
            f"reference must be a tensor, a pair of images and labels, a dataset or a dataloader, got {type(given).__name__}."
        )

    @staticmethod
    def _checked(parts: list[Images]) -> Images:
        images = torch.cat([part.images for part in parts]).cpu() if parts else torch.empty(0)
        if len(images) < 4:
            raise ValueError(f"reference must hold at least 4 finite images, got {len(images)}.")
        labels = [part.labels.cpu() for part in parts if part.labels is not None]
        return Images(images, torch.cat(labels) if len(labels) == len(parts) else None)

    def real_share(self) -> Images:
        """This rank's rows of the reference; together the ranks have each row once."""
        assert self.reference is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        images, labels = self.reference
        return Images(images[rank::world], None if labels is None else labels[rank::world])

    def _check_range(self, generated: Tensor) -> None:
        """Warn once where generated and real images seem to live in different ranges of values."""
        if self._warned_range or self.reference is None or not len(generated):
            return
        real = as_images(self.reference.images)
        low, high = float(real.min()), float(real.max())
        least, most = (float(end) for end in generated.aminmax())
        if not math.isfinite(most - least):
            finite = generated[generated.isfinite()]
            if not len(finite):
                return
            least, most = float(finite.min()), float(finite.max())
        if high == low:
            return
        slack = (high - low) / 4
        if least < low - slack or most > high + slack or (low < -slack and least >= 0 and most > slack):
            self._warned_range = True
            warnings.warn(
                f"generated images span {least:.3g} to {most:.3g}, real ones {low:.3g} to {high:.3g}. To fix this, bring "
                "both to one range, with Probe(sample=...) or Probe(images=...).",
                stacklevel=2,
            )

    # ---- the checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """The reference that was collected; one that was given is read again instead."""
        state: dict[str, Any] = {"epoch_seen": self._epoch_seen}
        if self.given is None and self.reference is not None:
            state |= {"images": self.reference.images, "labels": self.reference.labels}
        elif self._rows is not None and self._rows.images and self.trainer.world_size == 1:
            # with several ranks each has rows of its own, and one rank writes the checkpoint
            state |= {"rows": torch.cat(self._rows.images)}
            state |= {"row_labels": torch.cat(self._rows.labels) if self._rows.labels else None}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._epoch_seen = state["epoch_seen"]
        if self.given is not None:
            return
        if "images" in state:
            self.reference, self._judge = Images(state["images"], state["labels"]), None
        elif "rows" in state:
            self._rows = _Rows()
            self._rows.update(state["rows"], state["row_labels"])


def is_kind(callback: object, *names: str) -> bool:
    """Whether a callback is of a Lightning class, whether it comes from ``lightning`` or from ``pytorch_lightning``."""
    return any(base.__name__ in names for base in type(callback).__mro__)


def _has_forward(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, and not only Lightning's, of whichever package."""
    first = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return first is not nn.Module and first.__name__ != "LightningModule"


def _takes_noise(target: Callable[..., Any]) -> bool:
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


def _uncompiled() -> Any:
    """Without ``torch.compile``: a look at other sizes would make it compile the training anew, for other numbers."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def _shape(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(_shape(part) for part in batch) + ")"
    return type(batch).__name__


_SHARED: WeakKeyDictionary[Any, Probe] = WeakKeyDictionary()


def shared_probe(trainer: Trainer, probes: list[Probe]) -> Probe:
    """The probe of monitors that were given none: the first that another was given, or one for the trainer."""
    if probes:
        return probes[0]
    return _SHARED.setdefault(trainer, Probe())
