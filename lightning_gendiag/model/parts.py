"""Chooses the ways in which a module samples, encodes, decodes and reconstructs, by trying them on the isolated copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import as_data, as_images, middle_slices
from lightning_gendiag.functional.text import without_full_stop
from lightning_gendiag.model.adapters import RECOGNISERS
from lightning_gendiag.model.adapters.base import Context, Need, Way
from lightning_gendiag.model.adapters.own import (
    DECODE_NAMES,
    ENCODE_NAMES,
    GENERATOR_NAMES,
    GENERATORS,
    RECONSTRUCT_NAMES,
    SAMPLE_NAMES,
    accepts,
    attribute,
    decoder_ways,
    generators_of,
    held,
    helpers_of,
    is_adversarial,
    latent_length,
    networks_of,
    normal,
    packed_length,
    role_of,
    sampler_ways,
    signature_of,
    takes_classes,
    takes_images,
    with_children,
    with_gradients_if_needed,
)
from lightning_gendiag.model.aims import Activation, activation_of_logits, reconstructs
from lightning_gendiag.model.amounts import timed
from lightning_gendiag.model.batches import Images, first_rows, known, one_hot_rows
from lightning_gendiag.model.conditions import classes_always_given
from lightning_gendiag.model.denoising import TrainingStep
from lightning_gendiag.model.fakes import Fakes, fakes_of, find_fakes, is_normal
from lightning_gendiag.model.generators import seed_all
from lightning_gendiag.model.outputs import data_in, fields_of, lacks_channels, number_alike, scaled_like
from lightning_gendiag.model.posterior import all_positive, posterior_in
from lightning_gendiag.model.quantizers import quantizers_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_gendiag.model.adapter import ModelAdapter
    from lightning_gendiag.model.reference import Reference
    from lightning_gendiag.model.subject import Subject

T = TypeVar("T")

Known = tuple[tuple[int, ...] | None, bool]
"""The shape of one real image, and whether there is a training batch, by which ways are chosen."""

MOST_REASONS = 4
"""Number of failed ways that a message names."""

ARGUMENTS: dict[Need, str] = {"sample": "n", "encode": "images", "decode": "z", "reconstruct": "images"}
FIXES: dict[Need, str] = {
    need: f"ModelAdapter({need}=lambda module, {argument}: ...)" for need, argument in ARGUMENTS.items()
}
"""The line of code that an error message suggests for each need where nothing more specific is known."""

DOES: dict[Need, str] = {
    "sample": "makes images",
    "encode": "makes latents",
    "decode": "decodes latents",
    "reconstruct": "reconstructs images",
}

NAMES: dict[Need, tuple[str, ...]] = {
    "sample": (*SAMPLE_NAMES, *DECODE_NAMES, "forward", *GENERATOR_NAMES),
    "encode": ENCODE_NAMES,
    "decode": (*DECODE_NAMES, "forward", *GENERATOR_NAMES),
    "reconstruct": RECONSTRUCT_NAMES,
}

ORDER: tuple[Need, ...] = ("encode", "decode", "sample", "reconstruct")
"""Each is chosen by what was chosen for those before it."""

OTHER_NOISE = "training_step gives the generator other noise than N(0, 1)"
OF_BATCH = "training_step gives the generator rows of its batch"

ARE_LOGITS = "training_step takes what it returns for logits"

LARGEST_ERROR = 1e-3
"""What decodes its own latents with a relative error below this is invertible, so that its noise is its prior."""

FEWEST_STEPS, LARGEST_CHANGE = 3, 0.9
"""A list of so many batches holds all steps from noise to data if the last step changes samples by less than this fraction of
the distance between two samples. Batches that have nothing to do with each other are about 1 apart."""

MOST_NOISE, LARGEST_NOISE = 2.0, 0.1
"""What adds noise from 0 to a width to data returns them with a root mean squared error of 0.58 widths, and two draws differ
by 0.41. Beyond the second number, relative to the data, the latents are rather those of a random encoder."""

LEAST_ROUNDS, MOST_CLASSES = 2, 128
"""A sampler of all classes in turn is asked for so many rounds or more, since one that always makes a single round makes no
number that is asked for; of more classes, it is not tried."""

MEANS = ("mean", "mu", "loc", "embedding", "z_mean", "latent", "latents", "z", "probs")
"""Names under which encoders return latents, best first."""


class ModelParts:
    """Chooses one way for each need, on two samples, and again once real images and a training batch show which one fits.

    Args:
        adapter: The user's choices.
        subject: The module, and the copy of it that is evaluated.
        real: The real images.
        isolated: Makes the copy ready for calls, in full precision if that is asked for.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        subject: Subject,
        real: Reference,
        isolated: Callable[[bool], AbstractContextManager[None]],
    ) -> None:
        self.adapter, self.subject, self.real, self.isolated = adapter, subject, real, isolated
        self.tried: Images | None = None
        """The two samples by which the sampler was chosen; None where they are not known to be images yet."""
        self._ran = ""
        """Path of the network that takes times and was run for them; empty where none was."""
        self.seconds_of_two = 0.0
        """Seconds that these took."""
        self._chosen: dict[Need, tuple[str, Known]] = {}
        self._missing: dict[Need, tuple[str, Known]] = {}
        self._ways: dict[Need, Way] = {}
        self.failed: dict[Need, dict[str, str]] = {}
        """Names of the ways that failed when one was chosen, and why."""
        self._barred: dict[Need, dict[str, str]] = {}
        self._of: nn.Module | None = None
        self._latent: tuple[int, ...] | None = None
        self._has_posterior = self._sampler_fails = False
        self._shown: dict[Callable[..., Any], Any] = {}
        """What a training step shows, by what looks for it."""
        self._fakes: Fakes | None = None
        self._classes: int | None = None

    @property
    def module(self) -> LightningModule:
        """The copy of the module that is evaluated."""
        return self.subject.module

    @property
    def context(self) -> Context:
        """What is known of the data now."""
        adapter = self.adapter
        fakes = Fakes(None, None) if self._fakes is None else self._fakes
        return Context(
            self.subject.trained.device, self.real.shape, self._latent, adapter.latent_dim, adapter.conditional,
            self.real.one_hot or fakes.classes or self._classes or 0, self.real.num_classes,
            None if self.real.conditions is None else self.real.conditions[0],
            self.real.count, self.real.is_paired, self.real.is_gray, None if fakes.noise is None else fakes.noise.shape[1],
            self._classes is not None, fakes.labelled, fakes.listed, fakes.of_batch,
        )  # fmt: skip

    # ---- choosing ----

    def way(self, need: Need) -> Way:
        """Returns the way in which the copy does what is needed.

        Raises:
            ValueError: If there is none; the message says what was tried, and the line that fixes it.
        """
        if self._of is not self.module:
            # another copy, whose parts are other objects
            self._of, self._ways = self.module, {}
        known = self.real.shape, self.real.batch is not None
        if need not in self._ways or self._chosen[need][1] != known:
            self._ways[need] = self._choose(need, known)
        return self._ways[need]

    @property
    def failed_sampler(self) -> str:
        """Why a sampler of the module's own does not work, where another one or nothing took its place."""
        failures = (text for name, text in self.failed.get("sample", {}).items() if "normal noise" not in name)
        return next((text for text in failures if text and ARE_LOGITS not in text), "")

    @property
    def why_no_prior(self) -> str:
        """Why it is not known what noise a decoder beside no encoder takes."""
        return self._given_instead(self.way("decode") if self.has("decode") else None) or self.failed_sampler

    def ways(self, need: Need) -> list[Way]:
        """Returns all ways that are known, the chosen one first; others may fail, or return what is not needed."""
        known = list(self._given(need) or self._found(need))
        chosen = self.way(need).name if self.has(need) else ""
        return sorted(known, key=lambda way: way.name != chosen)

    def has(self, need: Need) -> bool:
        """Returns whether there is a way."""
        try:
            self.way(need)
        except ValueError:
            return False
        return True

    def choices(self, needs: Iterable[Need]) -> dict[Need, str]:
        """Returns the name of the way for each of these needs, and for what was asked for before; empty where none works."""
        names: dict[Need, str] = {}
        for need in ORDER:
            if need in needs or need in self._chosen or need in self._missing:
                names[need] = ""
                # what fails in other ways fails again where it is used
                with suppress(Exception):
                    names[need] = self.way(need).name
        return names

    def settle(self, answers: Sequence[tuple[dict[Need, str], dict[Need, dict[str, str]]]]) -> None:
        """Rules out the ways that failed on any process, for the first need that processes have chosen differently for.

        Args:
            answers: Of each process, :meth:`choices` for the same needs, and :attr:`failed`.
        """
        names = {need: {chosen[need] for chosen, _ in answers} - {""} for need in answers[0][0]}
        need = next(n for n in names if any(chosen[n] != answers[0][0][n] for chosen, _ in answers))
        barred = self._barred.setdefault(need, {})
        failed = {name: reason for _, failures in answers for name, reason in failures.get(need, {}).items()}
        # processes that found others, without a failure
        unknown = {name: f"{name} is not found on every process" for name in names[need]}
        barred |= unknown if failed.keys() <= barred.keys() else failed
        # what was chosen for other needs may rest on it
        for choice in (self._chosen, self._missing, self._ways):
            choice.clear()

    def _choose(self, need: Need, known: Known) -> Way:
        if need != "encode":
            # a decoder takes what the encoder returns
            self.has("encode")
        if need in ("sample", "decode"):
            self._look_at_training()
        message, tried_with = self._missing.get(need, ("", None))
        if message and tried_with == known:
            raise ValueError(message)
        name, chosen_with = self._chosen.get(need, ("", None))
        if name and chosen_with == known:
            # of another copy; the ways after it need not be looked for
            same = next((way for way in self._given(need) or self._found(need) if way.name == name), None)
            if same is not None:
                return same
        activation = self._activation
        # the one that was chosen before comes first
        ways = sorted(self._given(need) or self._found(need), key=lambda way: way.name != name)
        if ways and ways[0].name == name and self._already_fits(ways[0], known[0]):
            self._chosen[need] = name, known
            return ways[0]
        failures = self.failed[need] = {}
        if need == "sample":
            self._sampler_fails = False
        for way in ways:
            failure = self._barred.get(need, {}).get(way.name, "")
            # on another process
            self._sampler_fails |= way.is_sampler and bool(failure)
            failure = failure or self._failure(way)
            if not failure:
                self._chosen[need] = way.name, known
                if way.is_sampler:
                    # called in another way, it works
                    self._sampler_fails = False
                return way
            failures[way.name] = failure
            if self._activation != activation:
                # it was seen while this way was tried, and there are more ways now
                return self._choose(need, known)
        self._missing[need] = self._message(need, [failures[way.name] for way in ways if not way.is_reading]), known
        raise ValueError(self._missing[need][0])

    def _failure(self, way: Way) -> str:
        """Tries a way with two samples; returns why it does not work, or nothing."""
        if way.frozen:
            return f"{way.name} is of a part that is not trained"
        try:
            with self.isolated(way.need != "sample"):
                self._seed(self.adapter.seed)
                getattr(self, f"_try_{way.need}")(way)
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return f"{way.name} fails ({without_full_stop(reason)})"
        return ""

    def _already_fits(self, way: Way, shape: tuple[int, ...] | None) -> bool:
        """Whether the samples by which a sampler was chosen have the shape of the real images, which is known now."""
        if way.need != "sample" or self.tried is None or tuple(self.tried.images.shape[1:]) != shape:
            return False
        return not (self._noise_refused(way) or self._untrained() or self._are_logits(way, self.tried.images))

    def _untrained(self) -> str:
        """The network of a diffusion model that was run for two samples, where no optimizer trains such a network.

        It is of another stage of training than this one, in which its samples stay as they are.
        """
        module = self.subject.trained
        groups = [group for optimizer in self.subject.trainer.optimizers for group in optimizer.param_groups]
        # a strategy may give optimizers other tensors than the module's, which say nothing
        trained = {id(weight) for group in groups for weight in group["params"]} & set(map(id, module.parameters()))
        weights = [p for part in networks_of(module).values() for p in part.parameters() if p.requires_grad]
        is_other_stage = bool(trained and weights) and trained.isdisjoint(map(id, weights))
        return self._ran if is_other_stage and self.adapter.sample is None else ""

    def _noise_refused(self, way: Way) -> str:
        """Why normal noise is not what a sampler should be given; empty where it may be, or none is given."""
        if way.latent is not None and (instead := self._given_instead(way)):
            return instead
        if way.assumes_prior and self.adapter.sample is None and not self._takes_noise(way):
            return "nothing shows that normal noise is the prior of its latents"
        return ""

    def _are_logits(self, way: Way, data: Tensor) -> bool:
        """Whether a training step shows that what was found to return data returns their logits, looked for once."""
        is_outside = float(data.amin()) < 0 or float(data.amax()) > 1
        if not is_outside or way.activation or self.real.shape is None or self._given(way.need):
            return False
        return self._look_for(activation_of_logits) is not None

    @property
    def _activation(self) -> Activation | None:
        """What training applies to the logits that are decoded; None as well where it was not looked for."""
        return self._shown.get(activation_of_logits)

    def _refuse_logits(self, way: Way, data: Tensor) -> None:
        if self._are_logits(way, data):
            raise ValueError(ARE_LOGITS)

    def _found(self, need: Need) -> Iterator[Way]:
        """Yields ways, and where logits are decoded, each with what training applies to them as well."""
        for way in self._found_plain(need):
            yield way
            if self._activation is not None and need != "encode":
                yield self._activated(way, self._activation)

    def _activated(self, way: Way, activation: Activation) -> Way:
        apply = torch.sigmoid if activation == "sigmoid" else partial(torch.softmax, dim=1)

        def call(given: Any, *labels: Tensor) -> Tensor:
            output = way.call(given, *labels)
            if way.need == "reconstruct":
                return apply(self.reconstructed(output, given))
            n = given if isinstance(given, int) else len(given)
            return apply(data_in(output, n, self.real.shape, way.need))

        # what training shows is no guess
        return replace(way, name=f"{activation} of {way.name}", call=call, activation=activation, is_guess=False)

    def _found_plain(self, need: Need) -> Iterator[Way]:
        for way in self._recognised(need, self.context):
            yield from _forms(way, self.context)
        if need == "sample" and self._fakes is not None:
            yield from self._ways_of_training(self._fakes)
        if need != "reconstruct" or (self.context.is_paired and is_adversarial(self.module)):
            return
        if self.has("encode") and self.has("decode") and not self.way("encode").takes_labels:
            name = f"{self.way('decode').name} of {self.way('encode').name}"
            yield Way("reconstruct", name, lambda images: self.decode(self.as_input(self.latents_of(images))))

    def _recognised(self, need: Need, context: Context) -> Iterator[Way]:
        for recogniser in RECOGNISERS:
            yield from (way for way in recogniser(self.module, context) if way.need == need)

    def _ways_of_training(self, fakes: Fakes) -> Iterator[Way]:
        """Yields samplers that a training step shows."""
        joined, maker, shape = fakes.joined, fakes.maker, self.real.shape
        if joined is not None:

            def call(n: int, labels: Tensor) -> Any:
                return joined(self.module, normal(self.module, n, (joined.length,)), labels)

            yield Way("sample", joined.described, call, takes_labels=True)
        if maker is not None and shape is not None and (step := self.training_step()) is not None:
            name = f"self.{maker[0] or 'forward'} as training_step calls it"
            yield Way("sample", name, partial(fakes_of, step, maker, shape), path=maker[0])

    def _given(self, need: Need) -> list[Way]:
        """The ways that the user's argument leaves; empty where none was given."""
        wanted = getattr(self.adapter, need)
        if wanted is None and need == "decode" and isinstance(self.adapter.sample, str):
            # what the user named for samples also decodes, if it takes latents
            return self._ways_of(need, self._named("sample", self.adapter.sample), self.adapter.sample)
        if wanted is None:
            return []
        if isinstance(wanted, str):
            return self._ways_of(need, self._named(need, wanted), wanted)
        if not callable(wanted):
            raise ValueError(f"{need} must be a name or a callable, got {wanted!r}. To fix this, pass {FIXES[need]}.")
        given = self.subject.counterpart(wanted)
        if isinstance(given, nn.Module):
            return self._ways_of(need, given, type(given).__name__)
        text = f"the callable in ModelAdapter({need}=...)"
        call = partial(given, self.module)
        takes_labels = self.adapter.conditional if need == "sample" else need == "encode" and takes_classes(call)
        call = partial(with_gradients_if_needed, self.module, call) if need == "sample" else call
        return [Way(need, text, call, takes_labels=takes_labels)]

    def _named(self, need: Need, path: str) -> Callable[..., Any]:
        target: Any = self.module
        for part in path.split(".") if path != "forward" else ():
            target = getattr(target, part, None)
        if not callable(target):
            raise ValueError(
                f"{need} must name a method or submodule of {type(self.module).__name__}, got {path!r}. "
                f"To fix this, pass {FIXES[need]}."
            )
        named: Callable[..., Any] = target
        return named

    def _ways_of(self, need: Need, target: Callable[..., Any], path: str) -> list[Way]:
        """The ways in which something that the user gave is called."""
        owner: Any = self.module
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part, owner)
        name, parts = f"self.{path}", (self.module, owner)
        if need == "encode" and takes_classes(target):
            return list(_forms(Way(need, f"{name}(images, labels)", target, takes_labels=True), self.context))
        if need in ("encode", "reconstruct"):
            return [Way(need, f"{name}(images)", target)]
        last = path.split(".")[-1]
        takes_noise = isinstance(target, nn.Module) or last in DECODE_NAMES or GENERATORS.fullmatch(last) is not None
        if takes_noise:
            ways = [way for way in decoder_ways(target, name, *parts, self.context, given=True) if way.need == need]
            return ways or ([Way(need, name, target)] if need == "decode" else [])
        if need == "decode":
            return [] if self.adapter.decode is None else [Way(need, name, target)]
        plain = Way(need, f"{name}(n)", target, takes_labels=self.adapter.conditional)
        ways = list(sampler_ways(target, name, *parts, self.context)) or [plain]
        return [form for way in ways for form in _forms(way, self.context)]

    # ---- trying ----

    @property
    def _example(self) -> Tensor | None:
        """Two real images as the copy takes them."""
        return None if self.real.example is None else self.as_input(as_data(self.real.example))

    def as_input(self, x: Tensor) -> Tensor:
        """Returns images or latents on the copy's device, in float64 if its weights are."""
        double = any(parameter.dtype == torch.float64 for parameter in self.module.parameters())
        return x.to(self.subject.trained.device, torch.float64 if double else torch.float32)

    def _try_sample(self, way: Way) -> None:
        if refused := self._noise_refused(way):
            raise ValueError(refused)
        try:
            self._sample_two(way)
        except NotImplementedError:
            # of a base class
            raise
        except BaseException:
            self._sampler_fails |= way.is_sampler
            raise
        if untrained := self._untrained():
            raise ValueError(f"self.{untrained} is in no optimizer")
        if self.tried is not None:
            self._refuse_logits(way, self.tried.images)

    def _sample_two(self, way: Way) -> None:
        labels = (self.sample_labels(2),) if way.takes_labels else ()
        shape = self.real.shape
        ran: list[str] = []
        with ExitStack() as stack:
            for path, network in networks_of(self.module).items():
                hook = network.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
                stack.callback(hook.remove)
            output, self.seconds_of_two = timed(partial(way.call, 2, *labels), self.context.device)
        self._ran = ran[0] if ran else ""
        # rows may fill the shape of the images, and series be the data, which the first batch shows
        rows = shape is None and data_in(output, 2, None).ndim in (2, 3)
        classes = labels[0] if labels and not self.has_conditions else None
        self.tried = None if rows else Images(self.images_in(output, 2), classes)

    def _try_encode(self, way: Way) -> None:
        example = self._example
        if example is None:
            return
        if way.takes_labels and self.has_conditions:
            raise ValueError("the labels of the batches are no classes")
        output = self._encoded(way, example)
        latents = self._latents(output, len(example), way)
        is_image = latents.shape[1:] == example.shape[1:] and latents.ndim > 3
        if self.adapter.encode is None and is_image and not way.is_inverted:
            raise ValueError("it returns images")
        self._latent = tuple(latents.shape[1:])
        self._has_posterior = _is_posterior(output, latents)

    def _try_decode(self, way: Way) -> None:
        shape, example = self._latent_shape(way), self._example
        if example is not None and self.has("encode"):
            self._refuse_logits(way, self._decoded(way, self.as_input(self.latents_of(example))))
        elif shape is not None:
            self._refuse_logits(way, self._decoded(way, normal(self.module, 2, shape)))

    def _try_reconstruct(self, way: Way) -> None:
        example = self._example
        if example is None:
            return
        output = way.call(example)
        images = self.reconstructed(output, example)
        # of two images, another axis of two may seem to be that of the images
        three = torch.cat([example, example[:1]])
        self.reconstructed(way.call(three), three)
        if torch.equal(images.to(example), example):
            raise ValueError("it returns the images themselves")
        self._refuse_logits(way, images)
        # where nothing is known, the shape decides, unless it fits patches as well
        may_be_patches = self._may_be_patches(way, output)
        if may_be_patches or way.is_guess:
            shown = self._look_for(reconstructs)
            if shown is False or (may_be_patches and shown is None):
                raise ValueError("training does not compare what it returns with the images")
        is_constant = torch.equal(images[0], images[-1]) and not torch.equal(example[0], example[-1])
        # a codebook that is not trained yet gives most images the same codes
        if is_constant and not quantizers_in(self.module):
            raise ValueError("it returns the same for all images")

    def _may_be_patches(self, way: Way, output: Any) -> bool:
        """Whether what was returned for two images (1, p², p²) may be their p² patches of p² numbers, and not (p², p²) images.

        Masked autoencoders return such patches.
        """
        shape = self.real.shape
        if shape is None or self.real.is_gray or way.activation or self._given(way.need):
            return False
        side = math.isqrt(shape[-1])
        return shape == (1, side**2, side**2) and lacks_channels(output, 2, shape)

    def _look_for(self, look: Callable[[TrainingStep, Tensor, int], T]) -> T | None:
        """Returns what a training step shows, looked for once; None where it cannot be run."""
        if look not in self._shown and (step := self.training_step()) is not None:
            with self.isolated(True):
                data = self.adapter.find_data(step.batch)
                assert data is not None
                self._shown[look] = look(step, self.as_input(as_data(data)), self.adapter.seed)
        return self._shown.get(look)

    def training_step(self) -> TrainingStep | None:
        """A training step of the copy for the first rows of the first batch; None where there are not two of them."""
        # what finds the data may draw random numbers
        with self.isolated(True):
            data = None if self.real.batch is None else self.adapter.find_data(self.real.batch)
        if data is None or len(data) < 2:
            return None
        batch = first_rows(self.real.batch, len(data), len(data), self.context.device)
        return TrainingStep(self.module, batch, len(data), self._seed)

    def _look_at_training(self) -> None:
        """Looks once what training steps show of a generator beside a discriminator, and of the classes that are given."""
        shape = self.real.shape
        if self._fakes is not None or shape is None or self.real.batch is None or self.adapter.sample is not None:
            return
        self._fakes = Fakes(None, None)
        if is_adversarial(self.module):
            # what cannot be run shows nothing
            with suppress(Exception), self.isolated(True):
                step = self.training_step()
                self._fakes = self._fakes if step is None else find_fakes(step, shape, self.adapter.seed)
        with suppress(Exception):
            self._look_at_conditions()

    def _look_at_conditions(self) -> None:
        """Looks whether training always gives classes, where a sampler may be given them and need not be."""
        conditioned = replace(self.context, is_conditioned=True)
        plain, others = (
            [way.name for way in self._recognised("sample", context)] for context in (self.context, conditioned)
        )
        if plain == others or (step := self.training_step()) is None:
            return
        with self.isolated(True):
            labels = self.adapter.find_labels(step.batch, self.adapter.find_data(step.batch)).labels
            if labels is not None:
                self._classes = classes_always_given(step, labels, self.adapter.seed)
        if self._classes is not None:
            # it may have been chosen before the first batch, without classes
            self._chosen.pop("sample", None)
            self._ways.pop("sample", None)

    def _given_instead(self, way: Way | None) -> str:
        """What training gives a generator in place of noise of N(0, 1), such as one-hot rows beside it; or nothing.

        Layers of a generator that takes such noise may be given rows of the batch as well.
        """
        fakes = self._fakes
        if fakes is None or fakes.noise is None or self.has("encode"):
            return ""
        if fakes.is_of_batch or (way is not None and way.is_of_batch):
            return OF_BATCH
        return OTHER_NOISE if is_normal(fakes.noise) is False else ""

    @property
    def _draws_latents(self) -> bool:
        """Whether training gives a generator normal noise as long as the latents of an encoder, as in bidirectional GANs."""
        fakes = self._fakes
        if fakes is None or fakes.noise is None or fakes.is_of_batch or self._latent is None:
            return False
        return fakes.noise.shape[1] == math.prod(self._latent) and is_normal(fakes.noise) is True

    def _seed(self, seed: int) -> None:
        seed_all(seed, self.context.device, self.module, self.adapter, *self.subject.surrounding)

    @property
    def stated_length(self) -> int | None:
        """Length of the latents that the user, an attribute of the module, or its encoder beside its decoder states."""
        stated = latent_length(self.module, None, self.context)
        # what quantizes may stand between an encoder and a decoder of half as many channels
        return stated or (None if quantizers_in(self.module) else packed_length(self.module))

    @property
    def prior(self) -> torch.distributions.Distribution | None:
        """The prior that the module states under the name ``prior``; None for N(0, 1)."""
        stated = getattr(self.module, "prior", None)
        if callable(stated) and accepts(stated, 0):
            with suppress(Exception):
                stated = stated()
        return stated if isinstance(stated, torch.distributions.Distribution) else None

    @property
    def has_prior(self) -> bool:
        """Whether normal noise is the prior of the latents: a posterior is pulled towards it, and a flow maps it to data.

        It is not known to be where a sampler of the module fails, since that may draw from another prior. It is assumed to
        be before the first batch.
        """
        if self._example is None:
            return True
        way = self.way("decode") if self.has("decode") else None
        if not self._takes_noise(way):
            return False
        self.has("sample")
        return self._takes_noise(way)

    def _takes_noise(self, way: Way | None) -> bool:
        """Whether normal noise is the prior of what a way decodes, by the samplers that have been tried so far."""
        example = self._example
        if self._states_prior(way):
            return True
        if self._given_instead(way) or (way is not None and way.has_other_prior):
            return False
        encodes = example is not None and self.has("encode")
        # a generator alone takes noise in any case
        if self._sampler_fails and (encodes or way is None or not way.is_generator):
            return False
        if example is None or not encodes:
            return True
        if self._draws_latents:
            return True
        if self._has_posterior:
            return self._latent is not None and math.prod(self._latent[1:]) == 1
        if not self.has("decode"):
            return False
        with suppress(Exception):
            again = self._returned(example)
            if _is_same(again, example):
                return True
            if math.prod(self._latent or ()) != example[0].numel():
                return False
            # a flow that clamps data, as to take their logit, returns what it has clamped, and one that adds noise to data of
            # whole numbers returns the data with this noise
            if self.way("encode").is_inverted and _is_same(self._returned(again), again):
                return True
            size, noise = float(example.norm()), float((self._returned(example) - again).norm())
            return float((again - example).norm()) <= MOST_NOISE * noise <= LARGEST_NOISE * size
        return False

    def _returned(self, images: Tensor) -> Tensor:
        return self.decode(self.as_input(self.latents_of(images)))

    def _states_prior(self, way: Way | None) -> bool:
        """Whether the user states the length of the noise, and a way decodes latents of that length."""
        length, shape = self.adapter.latent_dim, None if way is None else self._latent_shape(way)
        return length is not None and (shape is None or math.prod(shape) == length)

    def _message(self, need: Need, failures: list[str]) -> str:
        own = type(self.module).__name__
        if getattr(self.adapter, need) is not None:
            reason = failures[0] if failures else "the length of the latents that it takes is not known"
            fix = self._fix(need) if failures else "pass ModelAdapter(latent_dim=...)"
            return f"{need} must be what {DOES[need]}, but {without_full_stop(reason)}. To fix this, {fix}."
        unknown = self._of_unknown_length(need)
        if unknown and not failures:
            return (
                f"{need} must be known, but the length of the noise that {unknown} takes is not. "
                f"To fix this, pass ModelAdapter(latent_dim=...), or define {own}.{need}({ARGUMENTS[need]})."
            )
        failures += self._unsuitable(need, failures) if len(failures) < MOST_REASONS else []
        tried = "; ".join(failures[:MOST_REASONS]) or f"{own} has none of {', '.join(NAMES[need])}"
        return (
            f"{need} must be known, but {without_full_stop(tried)}. "
            f"To fix this, define {own}.{need}({ARGUMENTS[need]}), or pass {FIXES[need]}."
        )

    def _of_unknown_length(self, need: Need) -> str:
        """Name of a generator or decoder of which nothing states the length of the noise; empty where there is none."""
        if need not in ("sample", "decode") or self.stated_length is not None:
            return ""
        for path, part in with_children(self.module).items():
            for name, target in generators_of(part):
                may_take_noise = takes_classes(target) or (
                    accepts(target, 1) and not takes_images(target, self.context)
                )
                if may_take_noise and not (need == "sample" and name in DECODE_NAMES):
                    return f"{path}.{name}"
        return ""

    def _unsuitable(self, need: Need, failures: list[str]) -> list[str]:
        """Says of methods that were not called which of their parameters are not known."""
        if need in ("sample", "reconstruct") and self.context.is_paired:
            return ["a batch holds two batches of images, of which forward may make one of the other"]
        parts = with_children(self.module) | (helpers_of(self.module) if need == "sample" else {})
        # every part has a forward, and the decoder of another part samples nothing
        others = SAMPLE_NAMES if need == "sample" else [name for name in NAMES[need] if name != "forward"]
        found = (
            (f"{path}.{name}", target)
            for path, part in parts.items()
            for name in (NAMES[need] if part is self.module else others)
            if (target := attribute(part, name)) is not None
        )
        return [
            f"{name} takes {signature_of(target)}{self._unknown(need, target)}"
            for name, target in found
            if not any(failure.startswith((f"{name}(", f"{name} ")) for failure in failures)
        ]

    def _unknown(self, need: Need, target: Callable[..., Any]) -> str:
        """Names the parameters that must be given and are not known; empty where none is."""
        signature = signature_of(target)
        parameters = [] if signature is None else list(signature.parameters.values())
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # the first one takes what all encoders, or all decoders, take
        unknown = required[1:] if need != "sample" else [p for p in required if role_of(p, self.context) is None]
        names = " and ".join(p.name for p in unknown)
        return f", where {names} {'is' if len(unknown) == 1 else 'are'} not known" if unknown else ""

    def _fix(self, need: Need) -> str:
        """A line that was run in place of one that the user gave and that does not work, or what that must do."""
        barred = self._barred.get(need, {})
        working = (way for way in self._found(need) if way.name not in barred and not self._failure(way))
        way = next(working, None)
        return self.advice(need) if way is None else f"pass {need}=None, with which {way.name} is used"

    def advice(self, need: Need) -> str:
        """Returns what a message advises where a way fails and none is known that works."""
        shape = self.real.shape or ("C", "H", "W")
        returns = f"{'images' if len(shape) == 3 else 'data'} (n, {', '.join(map(str, shape))})"
        labels = ", labels" * (need == "sample" and self.adapter.conditional)
        takes = f"module, {ARGUMENTS[need]}{labels}"
        return self.adapter.advice(need, takes, "latents (n, L)" if need == "encode" else returns)

    # ---- calling ----

    @property
    def has_conditions(self) -> bool:
        """Whether samplers that take labels get rows that are no classes."""
        has_classes = self.real.images is not None and self.real.images.labels is not None
        return self.real.conditions is not None and not has_classes

    def sample_labels(self, n: int) -> Tensor:
        """Returns n labels sampled from the reference, or zeros while there is no reference.

        Where real images have other numbers in place of a class, such as attributes (K,) or an angle, these are sampled.
        """
        if self.has_conditions and self.real.conditions is not None:
            rows = self.real.conditions
            return rows[torch.randint(len(rows), (n,))].to(self.module.device)
        if self.real.images is None:
            if self.real.unlabelled:
                raise ValueError(self.real.unlabelled)
            return torch.zeros(n, dtype=torch.long, device=self.module.device)
        labels = known(self.real.images.labels, self.real.unlabelled)
        return labels[torch.randint(len(labels), (n,))].to(self.module.device)

    def images_in(self, output: Any, n: int, what: str = "sample") -> Tensor:
        """Returns the images or other data (n, ...) in what a sampler returned, in float32.

        Images of integers are brought to the range of the real ones.

        Args:
            output: What was returned.
            n: Number of images.
            what: What returned it, for the message.

        Raises:
            ValueError: If it returned anything else.
        """
        images = data_in(output, n, self.real.shape, what).detach()
        if not images.is_floating_point() and self.real.range is not None and images.ndim == 4:
            images = scaled_like(images, *self.real.range)
        # before the first batch, rows and series may be anything
        may_be_any = self.real.shape is not None or images.ndim == 5
        return (as_data if may_be_any else as_images)(images, "generated").float()

    def reconstructed(self, output: Any, images: Tensor) -> Tensor:
        """Returns the reconstructions in what was returned for images (n, C, H, W)."""
        if isinstance(output, (tuple, list)):
            # many models return the images as well
            output = [p for p in output if not (isinstance(p, Tensor) and p.shape == images.shape and p.equal(images))]
        return self.images_in(output, len(images), "reconstruct")

    def latents_in(self, output: Any, n: int, flat: bool = True) -> Tensor:
        """Returns the latents (n, L) in what the encoder returned for n images; spatial ones as they are if not ``flat``."""
        latents = self._latents(output, n, self.way("encode")).float()
        return latents.flatten(1) if flat else latents

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Returns what the encoder gives for images (n, C, H, W).

        Args:
            images: The images.
            labels: (n,) their classes, for an encoder that takes classes; by default those of random real images.
        """
        return self._encoded(self.way("encode"), images, labels)

    def _encoded(self, way: Way, images: Tensor, labels: Tensor | None = None) -> Any:
        if not way.takes_labels:
            return way.call(images)
        return way.call(images, self.sample_labels(len(images)) if labels is None else labels)

    def latents_of(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns latents (n, L) of images (n, C, H, W) as :meth:`encode` does; of a posterior, these are its mean."""
        return self.latents_in(self.encode(images, labels), len(images))

    def _latents(self, output: Any, n: int, way: Way) -> Tensor:
        single = isinstance(output, Tensor)
        found = _mean_in(output)
        if found is not None and n == 1 and found.ndim == 1:
            # an encoder that squeezes its output
            found = found[None]
        if found is None or len(found) != n or found.ndim < 2:
            got = tuple(found.shape) if found is not None else type(output).__name__
            raise ValueError(f"it must return ({n}, L) latents, got {got}")
        length = self.stated_length
        if self.adapter.encode is None and length is not None and length != found.shape[1]:
            if single and found.shape[1] == 2 * length:
                return found.detach().chunk(2, 1)[0]
            if ".encoder(" in way.name and length != found.flatten(1).shape[1]:
                raise ValueError(f"it must return ({n}, {length}) latents, got {tuple(found.shape)}")
        return found.detach()

    @property
    def latent_dim(self) -> int:
        """L, the length of the latents that are decoded.

        Raises:
            ValueError: If nothing decodes, or the length is not known.
        """
        shape = self._latent_shape(self.way("decode"))
        if shape is None:
            raise ValueError(
                "latent_dim must be known where latents are decoded, but the module and its configuration do not state it. "
                "To fix this, pass ModelAdapter(latent_dim=...)."
            )
        return math.prod(shape)

    def _latent_shape(self, way: Way) -> tuple[int, ...] | None:
        """The shape of one latent that a decoder takes; None where it is not known."""
        stated = self.stated_length
        return way.latent or self._latent or (None if stated is None else (stated,))

    def decode(self, z: Tensor) -> Tensor:
        """Returns the data (n, ...) that the decoder makes of latents (n, L)."""
        return self._decoded(self.way("decode"), z)

    def _decoded(self, way: Way, z: Tensor) -> Tensor:
        shape = self._latent_shape(way)
        output = way.call(z if shape is None else z.view(len(z), *shape))
        return data_in(output, len(z), self.real.shape, "decode")

    def decoded_images(self, z: Tensor) -> Tensor:
        """Returns images (n, C, H, W) of latents (n, L), which are middle slices where it decodes volumes.

        Raises:
            ValueError: If the decoder returns none, or rows whose shape as images is not known before the first batch.
        """
        images = self._decoded(self.way("decode"), z)
        if images.ndim not in (4, 5):
            raise ValueError(
                f"decode must return ({len(z)}, C, H, W) images, got {tuple(images.shape)}. "
                f"To fix this, {self.advice('decode')}."
            )
        return as_images(middle_slices(images))


def _forms(way: Way, context: Context) -> Iterator[Way]:
    """Yields the forms of a way that the batches suggest.

    These are with one-hot labels, where the batches have such, with labels as floats, where they are no classes, of images
    without an axis for their channel, where the batches have such, the first of as many outputs as there are images in a batch,
    as of generators of several domains (https://arxiv.org/abs/1606.07536), the last of all steps from noise to data, and some
    of whole rounds of all classes.
    """
    ways = [way]
    if way.need in ("sample", "encode") and way.takes_labels and context.one_hot:
        call = partial(_called_with_rows, way.call, context.one_hot)
        ways.append(replace(way, name=f"{way.name} as one-hot rows", call=call))
    if way.need == "sample" and way.takes_labels and context.is_converted:
        ways.append(replace(way, name=f"{way.name} as floats", call=partial(_called_with_floats, way.call)))
    if way.need in ("encode", "reconstruct") and context.is_gray:
        ways += [replace(w, name=f"{w.name} without channels", call=partial(_without_channels, w.call)) for w in ways]
    for form in ways:
        yield form
        if way.need in ("sample", "decode") and context.count > 1:
            first = partial(_first_of, form.call, context.count)
            yield replace(form, name=f"the first of {context.count} outputs of {form.name}", call=first)
        if way.need == "sample" and way.is_sampler:
            last = partial(_last_step_of, form.call)
            yield replace(form, name=f"the last step of {form.name}", call=last, is_reading=True)
    if way.need == "sample" and way.is_sampler and not way.takes_labels and 1 < context.classes <= MOST_CLASSES:
        rounds = partial(_of_rounds, way.call, context.classes)
        yield replace(way, name=f"{way.name} for multiples of the number of classes", call=rounds, is_reading=True)


def _is_same(after: Tensor, before: Tensor) -> bool:
    return float((after - before).norm()) < LARGEST_ERROR * float(before.norm())


def _first_of(call: Callable[..., Any], count: int, *given: Any) -> Any:
    output = call(*given)
    if number_alike(output) != count:
        raise ValueError(f"it must return {count} batches of data, as many as a training batch holds")
    return output[0]


def _last_step_of(call: Callable[..., Any], n: int, *labels: Tensor) -> Any:
    """Returns the last of all steps from noise to data, else the output; the two samples that are tried show which it is."""
    output = call(n, *labels)
    if type(output) is not list or number_alike(output) < FEWEST_STEPS:
        return output
    before, last = (step.float() for step in output[-2:])
    apart = float((last - before.flip(0)).norm())
    return output if n == 2 and float((last - before).norm()) > LARGEST_CHANGE * apart else output[-1]


def _of_rounds(call: Callable[..., Any], classes: int, n: int) -> Any:
    """Returns n of as many samples as a sampler makes of all classes in turn, evenly spaced."""
    made = max(LEAST_ROUNDS, math.ceil(n / classes)) * classes
    rows = torch.arange(n) * made // n

    def chosen(part: Tensor) -> Tensor:
        return part[rows.to(part.device)] if part.ndim and len(part) == made else part

    return apply_to_collection(call(made), Tensor, chosen)


def _without_channels(call: Callable[..., Any], images: Tensor, *labels: Tensor) -> Any:
    return call(images[:, 0], *labels)


def _called_with_floats(call: Callable[..., Any], n: int, labels: Tensor) -> Any:
    return call(n, labels.float())


def _called_with_rows(call: Callable[..., Any], classes: int, first: Any, labels: Tensor) -> Any:
    rows = one_hot_rows(labels, classes)
    return call(first, rows.to(first) if isinstance(first, Tensor) and first.is_floating_point() else rows.float())


def _mean_in(output: Any) -> Tensor | None:
    """The latents in what an encoder returned: the mean of a posterior, or the first of several tensors."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    fields = fields_of(output)
    if "latent_dist" in fields:
        return _mean_in(fields["latent_dist"])
    found = (fields.get(name, held(output, name)) for name in MEANS)
    return next((value for value in found if isinstance(value, Tensor) and not value.isnan().all()), None)


def _is_posterior(output: Any, latents: Tensor) -> bool:
    """Whether what an encoder returned has a mean and a spread of the same shape."""
    try:
        posterior_in(output, len(latents), mean_dim=latents.shape[1])
    except ValueError as error:
        # two of the usual forms of a spread fit; where all means are positive, too, these are rather the parameters of
        # a gamma, a beta or a Dirichlet distribution
        return "spread=" in str(error) and not all_positive(latents)
    return True
