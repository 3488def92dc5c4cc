"""How a model is looked at: samples, codes and a reference of real images, without leaving a trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_gendiag.functional import as_images, tensor_of
from lightning_gendiag.judges import FeatureNetwork
from lightning_gendiag.probe.batches import Images, Rows, images_of, labels_of, shape_of
from lightning_gendiag.probe.isolation import in_full_precision, random_state_kept, seed_all, uncompiled, untouched
from lightning_gendiag.probe.parts import LINES, Parts, takes_noise
from lightning_gendiag.regions import RegionMap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Encoded(NamedTuple):
    """What the encoder gave for some real images."""

    output: Any
    size: int
    """How many images."""
    labels: Tensor | None
    """(size,) on the module's device."""


class Probe(Parts):
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

    Example:
        >>> probe = Probe(sample="generator", latent_dim=100, num_samples=512)
        >>> probe = Probe(sample=lambda module, n: module.ema(module.noise(n)))  # of a monitor, or of several
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
        self.reference: Images | None = None
        self.maps: dict[Any, RegionMap] = {}
        self._rows: Rows | None = None
        self._epoch_seen = False
        self._last_batch: tuple[int, int] | None = None
        self._drawn: tuple[int, Images] | None = None
        self._encoded: tuple[int, list[Encoded]] | None = None
        self._judge: FeatureNetwork | None = None
        self._tried: Images | None = None
        self._tall: dict[str, bool] = {}
        self._range: tuple[float, ...] | None = None
        """Least and largest value of the reference."""
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
            if need == "sample" and takes_noise(target):
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
            if self.sample is None and takes_noise(self._resolve("sample")):
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
            stack.enter_context(uncompiled())
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
        seed_all(self.seed + 7919 * index, self.module.device)
        labels = self.labels(n) if self.conditional else None
        try:
            output = sampler(n) if labels is None else sampler(n, labels)
        except Exception as error:
            raise ValueError(
                f"sample must make {n} images when called with {n}{'' if labels is None else ' and labels'}, "
                f"got {type(error).__name__}: {error}. To fix this, pass {LINES['sample']}."
            ) from error
        images = self._images_in(output, n)
        return Images(as_images(images.detach(), "generated").float(), labels)

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

    def encoded(self, step: int) -> list[Encoded]:
        """What the encoder gives for this rank's share of the reference at a step, once for all monitors."""
        if self._encoded is None or self._encoded[0] != step:
            self._encoded = None
            assert self.reference is not None
            images, labels = self.real_share()
            most = math.ceil(len(self.reference.images) / self.trainer.world_size)
            parts = []
            with self.looking(exact=True):
                encoder = self.encoder
                # every rank calls the model equally often, as for samples
                for start in range(0, most, self.chunk_size):
                    chunk = images[start : start + self.chunk_size]
                    output = encoder(self.as_input(as_images(chunk if len(chunk) else self.reference.images[:1])))
                    own = None if labels is None else labels[start : start + self.chunk_size].to(self.module.device)
                    parts += [Encoded(output, len(chunk), own)] if len(chunk) else []
            self._encoded = (step, parts)
        return self._encoded[1]

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
        self._rows = self._rows or Rows()
        held = sum(len(rows) for rows in self._rows.images)
        room = math.ceil(self.num_reference / self.trainer.world_size) - held
        if room > 0:
            part = self._part(batch, room)
            self._rows.update(part.images.cpu(), None if part.labels is None else part.labels.cpu())

    def seen(self, batch: Any) -> tuple[Any, Any]:
        """What is found of images and labels in a batch; training does not notice what the user's callables do."""
        with torch.no_grad(), random_state_kept(self.module.device):
            return self.find_images(batch), self.find_labels(batch)

    def forget(self) -> None:
        """Let go of what was drawn and encoded, since the module changes."""
        self._drawn = self._encoded = None

    def _part(self, batch: Any, room: int) -> Images:
        """The first finite images of a batch."""
        images, labels = self.seen(batch)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(
                f"a batch must hold (N, C, H, W) images, got {shape_of(batch)}. "
                "To fix this, pass Probe(images=lambda batch: ...)."
            )
        images = images.detach()[:room]
        if images.dtype != torch.uint8:
            images = as_images(images, "the batch's images")
        labels = None if labels is None else labels.detach()[:room]
        finite = images.flatten(1).isfinite().all(1)
        return Images(images[finite].clone(), None if labels is None else labels[finite].clone())

    def ready(self, epoch_over: bool) -> bool:
        """Whether the reference is there; pools it over all ranks once each has its share or an epoch is over."""
        if self.reference is not None:
            return True
        if epoch_over:
            self.end_epoch()
        self._rows = self._rows or Rows()
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
                seed_all(self.seed, self.module.device)
                for batch in given:
                    parts.append(self._part(batch, self.num_reference - sum(len(p.images) for p in parts)))
                    if sum(len(p.images) for p in parts) >= self.num_reference:
                        break
            return self._checked(parts)
        if isinstance(given, Dataset):
            total = len(given)  # type: ignore[arg-type]
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[: self.num_reference]
            with random_state_kept(self.module.device):
                seed_all(self.seed, self.module.device)
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
        if self._range is None:
            self._range = tuple(float(end) for end in as_images(self.reference.images).aminmax())
        low, high = self._range
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
            self.reference, self._judge, self._range = Images(state["images"], state["labels"]), None, None
        elif "rows" in state:
            self._rows = Rows()
            self._rows.update(state["rows"], state["row_labels"])


def is_kind(callback: object, *names: str) -> bool:
    """Whether a callback is of a Lightning class, whether it comes from ``lightning`` or from ``pytorch_lightning``."""
    return any(base.__name__ in names for base in type(callback).__mro__)


_SHARED: WeakKeyDictionary[Any, Probe] = WeakKeyDictionary()


def shared_probe(trainer: Trainer, probes: list[Probe]) -> Probe:
    """The probe of monitors that were given none: the first that another was given, or one for the trainer."""
    if probes:
        return probes[0]
    return _SHARED.setdefault(trainer, Probe())
