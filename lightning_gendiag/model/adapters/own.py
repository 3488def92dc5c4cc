"""What a module, and the modules that it holds, do by methods and submodules with usual names."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gendiag.model.adapters.base import Context, Way

SAMPLE_NAMES = (
    "sample", "sample_images", "sample_image", "generate", "generate_images", "generate_samples", "sampling", "synthesize",
    "p_sample_loop", "ddim_sample", "sample_loop",
)  # fmt: skip
SAMPLERS = re.compile(r"(sample|generate|draw|synthesi[sz]e)_\w+|langevin\w*|\w+_(sample|sampling)")
"""Names of other methods that sample if their first parameter is a number of samples."""

ENCODE_NAMES = ("encode", "encoder", "encode_first_stage")
DECODE_NAMES = ("decode", "decoder", "decode_first_stage")
GENERATOR_NAMES = ("generator", "gen", "netG", "G")
GENERATORS = re.compile(r"(\w+_)?gen(erator)?s?(_\w{1,12}|\d)?|net_?G(_\w{1,3})?|[gG](_\w{1,3}|_?net|\d)?")
"""Names under which modules hold a generator; the usual ones come first."""

DISCRIMINATORS = re.compile(
    r"(\w+_)?(disc(rim(inators?)?)?|discriminators?|critics?|adversary)(_\w{1,12}|\d)?|net_?D(_\w{1,3})?|D(_\w{1,3}|_?net|\d)?|dis"
    r"|d(_[A-Z]{1,2}|_?net)"
)
"""Names under which modules hold a discriminator."""

DISCRIMINATOR_KINDS = re.compile(r"discriminator|critic", re.IGNORECASE)
"""Names of classes that are one, or hold one."""

RECONSTRUCT_NAMES = ("reconstruct", "autoencode", "forward")

LATENT_NAMES = (
    "latent_dim", "latent_size", "latent_dims", "latent", "n_latents", "latent_features", "z_dim", "z_size", "zdim", "dim_z",
    "d_z", "n_z", "noise_dim", "noise_size", "noise", "nz", "n_latent", "nlatent", "code_dim", "code_size",
)  # fmt: skip
"""Attributes of a module, of its ``hparams`` or ``config``, or of its decoder that hold the length of the noise."""

CODE_SIZES = ("code_dim", "code_size", "n_codes", "num_codes")
NOISE_SIZES = tuple(name for name in LATENT_NAMES if name not in CODE_SIZES)
CLASS_SIZES = ("n_classes", "num_classes", "n_class", "num_class")
"""The same for the three latents of a generator that takes noise, a class and a code."""

MOST_CHANNELS = 4
"""A decoder whose first layer is a convolution of so few channels takes images, and no noise."""

CONFIGS = ("hparams", "config", "model_config", "cfg", "args", "opt")

SAMPLED_BY_TYPE = ("pythae",)
"""Packages whose decoders have a prior that the type of the model states, so that noise is not tried."""

COUNTS = re.compile(
    r"(n|num|count|bs|batch|batch_?size|b|(n|num|number|number_of)_?(samples?|images?|imgs?)|samples|size)"
)
SHAPES = re.compile(r"(shape|(img|image|sample|data|x|output|batch)_?shape|(img|image)_?size)")
LABELS = re.compile(r"(y|labels?|cls|class(es)?|class_?(labels?|ids?)|targets?|attrs?|attributes?)")
CODES = re.compile(r"codes?|(latent|cont|continuous)_?codes?|c_?(cont|continuous)\w*", re.IGNORECASE)
CONDITIONS = re.compile(r"(c|cond|condition(s|ing)?|context|prompts?|.*_(cond|conditioning|context))")
NOISE = re.compile(r"(z|zs|noise|latents?|code|eps|x_?t|z_?samples?)", re.IGNORECASE)
NETWORKS = re.compile(r"(\w+_)?(model|net|network|unet|denoiser)|(denoise|score|model)_?(fn|function)")
"""Names of parameters of a sampler, by what they take."""

TIMES = re.compile(r"ts?|\w*time\w*|steps?|sigmas?|noise_levels?")
"""Names of parameters that take times or levels of noise."""

LABEL_KEYWORDS = ("labels", "y")
"""Names under which samplers that take any keywords are given labels, where they do not work without."""

AVERAGED = re.compile(r"(^|_)(ema|average|averaged|shadow)(_|$)")
"""Names of averaged copies, which come last: their weights are those of the copy, unless raw ones are asked for."""

INVERSE_NAMES = ("inverse", "reverse", "inv", "invert", "backward_transform", "backward")
"""Methods that invert ``forward``, best first; ``backward`` of a ``LightningModule`` computes gradients instead."""

INVERTED = re.compile(r"rev|reverse|inverse|invert|inv")
"""Parameters of ``forward`` that invert it where they are true."""

DIRECTION = re.compile(r"mode|direction")
"""Parameters of ``forward`` that name its direction in a word."""

OTHER_DIRECTION = re.compile(r"""["'](rev|reverse|inverse|inv|backward)["']""")
"""Words in its code for the direction that inverts it."""

NO_AUTOENCODERS = re.compile(
    r"score|diffus|denois|ddpm|energy|flow|nvp|glow|pixel_?cnn|autoregress|^(made|maf|iaf)$", re.IGNORECASE
)
"""Names of classes whose ``forward`` returns scores, noise, latents or logits of the shape of the images it is given."""

MEAN_LAYER, VARIANCE_LAYER = re.compile(r"(^|_|2)(mu|mean)(_|$)"), re.compile(r"var(_|$)|sigma|std")
"""Names of layers that turn an encoder's features into the mean and the variance of a posterior."""


def own(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields what the module does by itself."""
    yield from _of(module, "self", module, context)


def children(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields what the modules do that a module holds, such as ``self.model`` of a wrapper."""
    for path, child in _held_by(module, "self"):
        if is_discriminator(path.rpartition(".")[2], child):
            # some have an encoder, which is none of the model's
            continue
        frozen = _is_frozen(child) and not _is_frozen(module)
        for way in _of(child, path, module, context):
            yield replace(way, frozen=frozen)


def _held_by(part: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that a module holds, averages last, and after each average what it holds: it may be all there is."""
    for name, child in sorted(part.named_children(), key=lambda named: AVERAGED.search(named[0]) is not None):
        yield f"{path}.{name}", child
        if AVERAGED.search(name) is not None:
            yield from _held_by(child, f"{path}.{name}")


def is_discriminator(name: str, part: nn.Module) -> bool:
    """Returns whether the name of a part, or of its class, says that it is a discriminator and no generative model."""
    holds_generator = any(GENERATORS.fullmatch(child) for child, _ in part.named_children())
    by_class = DISCRIMINATOR_KINDS.search(type(part).__name__) and not holds_generator
    return bool(DISCRIMINATORS.fullmatch(name) or by_class) and next(part.parameters(), None) is not None


def is_adversarial(module: nn.Module) -> bool:
    """Returns whether a module, or one that it holds, holds a discriminator."""
    return any(is_discriminator(*named) for part in (module, *module.children()) for named in part.named_children())


def _is_frozen(part: nn.Module) -> bool:
    """Whether a module has weights and trains none of them."""
    weights = list(part.parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def helpers(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the samplers of plain objects that a module holds, such as a diffusion process beside its network.

    They count only if they hold a network of the module or are given it, since other objects may return data.
    """
    for path, helper in helpers_of(module).items():
        for name in (*SAMPLE_NAMES, *_other_samplers(helper)):
            if (target := attribute(helper, name)) is not None and _samples_with(helper, target, module):
                yield from sampler_ways(target, f"{path}.{name}", module, helper, context)


def helpers_of(module: nn.Module) -> dict[str, Any]:
    """Returns the objects of users' classes that a module holds and that are no modules, by what log lines call them."""
    held_by = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {
        f"self.{name}": value
        for name, value in held_by.items()
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, types.FunctionType, types.MethodType))
    }


def _samples_with(helper: Any, target: Callable[..., Any], module: nn.Module) -> bool:
    """Whether a sampler of a plain object is given a network, or the object holds one of the module's."""
    signature = signature_of(target)
    if signature is not None and any(NETWORKS.fullmatch(name.lower()) for name in signature.parameters):
        return True
    parts = set(map(id, module.modules()))
    return any(isinstance(value, nn.Module) and id(value) in parts for value in vars(helper).values())


def decoded_samples(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields samplers of latents, as latent diffusion models have, followed by the decoder of the first stage."""
    parts = with_children(module)
    decoders = [
        (f"{path}.{name}", decoder)
        for path, part in parts.items()
        for name in reversed(DECODE_NAMES)
        if (decoder := attribute(part, name)) is not None and accepts(decoder, 1)
    ]
    ways = (way for path, part in parts.items() for way in _of(part, path, module, context))
    for way in (*ways, *helpers(module, context)):
        if way.need == "sample" and not way.assumes_prior and way.latent is None:
            for name, decoder in decoders:
                call = partial(_decoded, decoder, way.call)
                yield Way("sample", f"{name} of {way.name}", call, takes_labels=way.takes_labels)


def denoised(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields what a diffusion model makes of normal noise as large as an image: a sampler or its own forward that takes it."""
    if context.shape is None or context.latent not in (None, context.shape):
        return
    if not any(map(_takes_times, module.modules())):
        return
    for path, part in (with_children(module) | helpers_of(module)).items():
        for name in SAMPLE_NAMES:
            target = attribute(part, name)
            if target is None or not takes_noise(target) or _takes_times(target, but_their_number=True):
                continue
            if isinstance(part, nn.Module) or _samples_with(part, target, module):
                yield from sampler_ways(target, f"{path}.{name}", module, part, context, noise=context.shape)
    forward = attribute(module, "forward")
    if forward is not None and accepts(forward, 1) and takes_noise(forward) and not _takes_times(forward):
        text = f"self.forward from {noise_of(context.shape)}"
        yield Way("sample", text, partial(sampled_by, forward, module, context.shape))


def with_children(module: nn.Module) -> dict[str, nn.Module]:
    """Returns a module and those that it holds, by what log lines call them."""
    return {"self": module, **{f"self.{name}": child for name, child in module.named_children()}}


def noise_of(shape: tuple[int, ...]) -> str:
    """Returns what log lines call normal noise of a shape."""
    return f"normal noise (n, {', '.join(map(str, shape))})"


def _takes_times(target: Callable[..., Any], but_their_number: bool = False) -> bool:
    """Whether names say that something takes data and times, as the network of a diffusion model does."""
    signature = signature_of(target)
    others = [] if signature is None else list(signature.parameters.values())[1:]
    if but_their_number:
        others = [p for p in others if p.default is p.empty or not p.name.endswith("steps")]
    return any(TIMES.fullmatch(p.name) for p in others)


def _decoded(decoder: Callable[..., Any], sampler: Callable[..., Any], n: int, *labels: Tensor) -> Any:
    sampled = sampler(n, *labels)
    return decoder(sampled[0] if isinstance(sampled, (tuple, list)) else sampled)


def _of(part: nn.Module, path: str, module: nn.Module, context: Context) -> Iterator[Way]:
    for name in (*SAMPLE_NAMES, *_other_samplers(part)):
        if (target := attribute(part, name)) is not None:
            yield from sampler_ways(target, f"{path}.{name}", module, part, context)
    yield from _encoders(part, path)
    # forward of a submodule may be of a discriminator or of a loss, and that of a flow goes in either direction
    is_flow = any(inverse_of(one) is not None for one in (module, *module.children()))
    forward = ("forward",) if part is module and not is_flow else ()
    generators = (*forward, *GENERATOR_NAMES, *_other_generators(part))
    for name in (*DECODE_NAMES, *generators):
        if (target := attribute(part, name)) is not None:
            yield from decoder_ways(target, f"{path}.{name}", module, part, context)
    for name in RECONSTRUCT_NAMES:
        if name == "forward" and not _may_reconstruct(part, module, context):
            continue
        if (target := attribute(part, name)) is not None and accepts(target, 1) and not takes_noise(target):
            is_guess = name == "forward" and not _encodes(part, module)
            yield Way("reconstruct", f"{path}.{name}(images)", target, is_guess=is_guess)


class Inverse(NamedTuple):
    """What inverts a module's ``forward``."""

    name: str
    """Such as ``"inverse"``, or ``"forward(reverse=True)"``."""
    call: Callable[..., Any]


def inverting_method(part: nn.Module) -> str | None:
    """Returns the name of the method that inverts ``forward`` of a module, or None."""
    is_lightning = any(base.__name__ == "LightningModule" for base in type(part).__mro__)
    names = INVERSE_NAMES[:-1] if is_lightning else INVERSE_NAMES
    return next((name for name in names if callable(getattr(type(part), name, None))), None)


def inverse_of(part: nn.Module) -> Inverse | None:
    """Returns what inverts ``forward`` of a module by its name; None where nothing does, or it has no ``forward``."""
    if not has_forward(part):
        return None
    if (name := inverting_method(part)) is not None:
        return Inverse(name, getattr(part, name))
    with suppress(TypeError, ValueError, OSError):
        for parameter in list(inspect.signature(part.forward).parameters.values())[1:]:
            if INVERTED.fullmatch(parameter.name.lower()) and parameter.default is False:
                return Inverse(f"forward({parameter.name}=True)", partial(part, **{parameter.name: True}))
            if isinstance(parameter.default, str) and DIRECTION.fullmatch(parameter.name.lower()):
                words = OTHER_DIRECTION.findall(inspect.getsource(part.forward))
                for word in words[: parameter.default not in words]:
                    return Inverse(f"forward({parameter.name}={word!r})", partial(part, **{parameter.name: word}))
    return None


def _other_samplers(part: Any) -> list[str]:
    """Names of methods of a user's class that take a number of samples first."""
    found = []
    for kind in type(part).__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "lightning", "pytorch_lightning", "builtins"):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, types.FunctionType) and SAMPLERS.fullmatch(name) and name not in SAMPLE_NAMES:
                first = list(inspect.signature(value).parameters)[1:2]
                found += [name] if first and COUNTS.fullmatch(first[0].lower()) else []
    return list(dict.fromkeys(found))


def _other_generators(part: Any) -> list[str]:
    """Names of the parts that are called a generator in other words, such as ``G_net``; averaged copies come last."""
    parts = part.named_children() if isinstance(part, nn.Module) else ()
    named = (name for name, _ in parts if GENERATORS.fullmatch(name) and name not in GENERATOR_NAMES)
    return sorted(named, key=lambda name: AVERAGED.search(name) is not None)


def generators_of(part: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """Returns the decoders and generators that a module holds, by name."""
    names = (*DECODE_NAMES, *GENERATOR_NAMES, *_other_generators(part))
    return [(name, target) for name in names if (target := attribute(part, name)) is not None]


def _may_reconstruct(part: nn.Module, module: nn.Module, context: Context) -> bool:
    """Whether ``forward`` of a part may reconstruct images: what has their shape may also be latents, scores or others.

    It does not where something inverts it, or a batch holds images of two domains and a discriminator judges one of them.
    Without an encoder, it does not where the module has a discriminator, a batch has two kinds of images, or names say that
    it is a model of another kind.
    """
    if part is not module and context.shape is None:
        # it may do anything, which the first images show
        return False
    if any(inverse_of(one) is not None for one in (part, module, *part.children())):
        return False
    adversarial = is_adversarial(module)
    if _encodes(part, module):
        return not (adversarial and context.is_paired)
    told = any(NO_AUTOENCODERS.search(type(one).__name__) for one in (module, part, *part.children()))
    return not (adversarial or context.is_paired or told)


def _encodes(part: nn.Module, module: nn.Module) -> bool:
    return any(attribute(one, name) is not None for one in (module, part) for name in ENCODE_NAMES)


def attribute(part: Any, name: str) -> Callable[..., Any] | None:
    """Returns what is callable under a name; ``forward`` stands for a module that defines it."""
    if name == "forward":
        return part if has_forward(part) else None
    found = held(part, name)
    return found if callable(found) else None


def held(owner: Any, name: str) -> Any:
    """Returns an entry or an attribute, or None where there is none; a property may raise any error."""
    with suppress(Exception):
        return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    return None


# ---- samplers ----


def sampler_ways(
    target: Callable[..., Any],
    name: str,
    module: nn.Module,
    part: Any,
    context: Context,
    noise: tuple[int, ...] | None = None,
) -> Iterator[Way]:
    """Yields how a method is called for n samples, by the names of its parameters; ``noise`` is the shape of what it takes."""
    signature = signature_of(target)
    if signature is None:
        yield Way("sample", f"{name}(n)", target)
        return
    given: dict[str, str] = {}
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    states_number = False
    for parameter in named:
        role = role_of(parameter, context)
        if role == "n" and parameter.name.lower() == "size" and "n" in given.values() and context.shape is not None:
            # of one image, beside their number
            role = "size"
        # a batch may be one of data
        states_number |= role in ("n", "shape") and parameter.name.lower() not in ("b", "batch")
        if role is None and parameter.default is parameter.empty:
            if set(given.values()) - {"network"} or any(COUNTS.fullmatch(p.name) for p in named):
                return
            role = "n"
        if role is not None:
            given[parameter.name] = role
    if named and not {"n", "shape", "noise"} & set(given.values()) and isinstance(named[0].default, int):
        given[named[0].name] = "n"
    # labels alone say how many samples there are, but no noise from which they are made; where a batch holds two kinds of
    # images and no labels, ``y`` is one of them, of which an image-to-image model makes the other
    of_pairs = context.is_paired and not context.classes and context.condition is None
    states = {"n", "shape", "noise"} | ({"labels"} if noise is None and not of_pairs else set())
    if not named or not states & set(given.values()):
        return
    length = latent_length(part, None, context) or latent_length(module, None, context)
    latent = noise or (None if length is None else (length,))
    if "noise" in given.values() and latent is None:
        return
    path, network = network_of(module) if "network" in given.values() else ("", None)
    if "network" in given.values() and network is None:
        return
    by_position = {p.name for p in named if p.kind is p.POSITIONAL_ONLY}

    def call(given: dict[str, str], shape: tuple[int, ...], n: int, *labels: Tensor, keyword: str = "") -> Any:
        drawn = normal(module, n, latent or ()) if "noise" in given.values() else None
        values = {
            "n": n,
            "shape": (n, *shape),
            "size": shape,
            "device": context.device,
            "none": None,
            "network": network,
        }
        values |= {"labels": labels[0] if labels else None, "noise": drawn}
        first = [values[role] for parameter, role in given.items() if parameter in by_position]
        others = {p: values[role] for p, role in given.items() if p not in by_position}
        others |= {keyword: values["labels"]} if keyword else {}
        output = with_gradients_if_needed(module, target, *first, **others)
        return output if noise is None or drawn is None else last_of(output, drawn)

    def way(given: dict[str, str], shape: tuple[int, ...], shown: str = "") -> Way:
        texts = {"none": "None", "network": path}
        shown = shown or ", ".join(texts.get(role, role) for role in given.values())
        takes_labels = "labels" in given.values()
        text = f"{name}({shown})"
        if noise is not None:
            text = f"{name} from {noise_of(noise)}{' and labels' if takes_labels else ''}"
        return Way("sample", text, partial(call, given, shape), takes_labels=takes_labels, is_sampler=states_number)

    shape = context.shape or ()
    plain = way(given, shape)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) and not plain.takes_labels
    with_labels = [
        replace(
            plain,
            name=f"{plain.name.removesuffix(')')}, {key}=labels)",
            call=partial(call, given, shape, keyword=key),
            takes_labels=True,
        )
        for key in LABEL_KEYWORDS
        if takes_any
    ]
    left_out = [p.name for p in named if p.default is None or given.get(p.name) == "none"]
    left_out = [p for kind in (LABELS, CONDITIONS) for p in left_out if kind.fullmatch(p.lower())]
    if context.is_conditioned and not plain.takes_labels:
        # the network has never been without the classes that the sampler may leave out
        for name_of_classes in left_out[:1]:
            yield replace(way(given | {name_of_classes: "labels"}, shape), is_reading=True)
    # it may ignore labels, which then say nothing about its images
    yield from (*with_labels, plain) if context.conditional else (plain, *with_labels)
    if left_out and not plain.takes_labels:
        # a condition that it does not work without is often a class, rather one that must be given than another
        first = min(left_out, key=lambda parameter: parameter not in given)
        yield way(given | {first: "labels"}, shape)
    if "shape" in given.values() and context.latent not in (None, shape):
        # multiscale flows fold positions into channels
        others = ", ".join("None" if role == "none" else role for role in given.values())
        yield way(given, context.latent or (), others.replace("shape", f"shape of latents {context.latent}"))
    unknown = [p.name for p in named if p.default is None and p.name.lower().endswith("shape") and p.name not in given]
    if unknown and shape and "n" in given.values():
        # some know it only after the first training step
        yield way(given | {unknown[0]: "size"}, shape)


def with_gradients_if_needed(module: nn.Module, sampler: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a sampler, with gradients of data where it fails without, as Langevin dynamics does; weights get none."""
    try:
        return sampler(*args, **kwargs)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        with torch.enable_grad():
            return sampler(*args, **kwargs)
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def last_of(output: Any, noise: Tensor) -> Any:
    """Returns the last of all steps from noise to data, where a sampler returns them all; else the output as it is."""
    if isinstance(output, (tuple, list, Tensor)) and len(output) > 1:
        first = output[0]
        if isinstance(first, Tensor) and first.shape == noise.shape and torch.equal(first.to(noise), noise):
            return output[-1]
    return output


def network_of(module: nn.Module) -> tuple[str, nn.Module | None]:
    """Returns the outermost network in a module that takes times, and its path; the module itself where it is none inside."""
    inside = ((f"self.{name}", part) for name, part in module.named_modules() if name)
    found = [(path, part) for path, part in inside if _takes_times(part)]
    found.sort(key=lambda named: AVERAGED.search(named[0]) is not None)
    own_network = [("self", module)] if _takes_times(module) else []
    return next(iter([*found, *own_network]), ("", None))


def networks_of(module: nn.Module) -> dict[str, nn.Module]:
    """Returns all parts of a module that take times, by path."""
    return {path: part for path, part in module.named_modules() if path and _takes_times(part)}


def role_of(parameter: inspect.Parameter, context: Context) -> str | None:
    """Returns what a parameter of a sampler is given; None for nothing."""
    required = parameter.default is parameter.empty
    name = parameter.name.lower()
    if COUNTS.fullmatch(name):
        return "n"
    if SHAPES.fullmatch(name) and context.shape is not None and required:
        return "shape"
    if "device" in name and (required or isinstance(parameter.default, (str, torch.device, type(None)))):
        # a default is often that of another machine
        return "device"
    if LABELS.fullmatch(name) and (required or context.conditional):
        return "labels"
    if not required:
        return None
    if NETWORKS.fullmatch(name):
        return "network"
    if NOISE.fullmatch(name):
        return "noise"
    return "none" if CONDITIONS.fullmatch(name) else None


# ---- encoders and decoders ----


def _encoders(part: nn.Module, path: str) -> Iterator[Way]:
    for name in ENCODE_NAMES:
        target = attribute(part, name)
        if target is None or not accepts(target, 1):
            if target is not None and takes_classes(target):
                text = f"{path}.{name}(images, labels)"
                yield Way("encode", text, target, takes_labels=True, owner=type(part).__name__)
            continue
        heads = posterior_layers(part) if name == "encoder" else []
        if heads:
            layers = [part.get_submodule(head) for head in heads]
            text = " and ".join(f"{path}.{head}" for head in heads)
            yield Way("encode", f"{text} of {path}.encoder(images)", partial(_through_heads, target, layers))
        else:
            yield Way("encode", f"{path}.{name}(images)", target, owner=type(part).__name__)
            # images as rows, as in Lightning's first example
            yield Way("encode", f"{path}.{name}(images.flatten(1))", partial(of_rows, target))


def takes_classes(target: Callable[..., Any]) -> bool:
    """Returns whether something takes two arguments and no fewer, of which the second is called a label."""
    signature = signature_of(target)
    if signature is None or accepts(target, 1) or not accepts(target, 2):
        return False
    return LABELS.fullmatch(list(signature.parameters)[1].lower()) is not None


def _through_heads(encoder: Callable[..., Any], layers: list[nn.Module], images: Tensor) -> Any:
    features = encoder(images)
    features = features[0] if isinstance(features, (tuple, list)) else features
    features = features.flatten(1) if isinstance(layers[0], nn.Linear) else features
    made = [layer(features) for layer in layers]
    return made if len(made) > 1 else made[0]


def of_rows(encoder: Callable[..., Any], images: Tensor) -> Any:
    """Encodes images as rows."""
    return encoder(images.flatten(1))


def decoder_ways(
    target: Callable[..., Any], name: str, module: nn.Module, part: nn.Module, context: Context, given: bool = False
) -> Iterator[Way]:
    """Yields how a decoder or generator decodes latents, and how it samples from normal noise; ``given`` by the user."""
    signature = signature_of(target)
    yield from _of_codes(target, name, module, part)
    own_path = name.removeprefix("self.")
    labels = takes_classes(target) or own_path in context.labelled
    if signature is not None and not labels and not accepts(target, 1):
        return
    length = latent_length(part, target, context) or latent_length(module, None, context)
    shapes: list[tuple[int, ...]] = []
    if context.latent is not None and length in (None, context.latent[0], math.prod(context.latent)):
        shapes.append(context.latent)
    for known in (length, context.noise):
        if known is not None:
            shapes += [shape for shape in ((known,), (known, 1, 1)) if shape not in shapes]
    last = name.rpartition(".")[2]
    is_generator = given or last == "forward" or GENERATORS.fullmatch(last) is not None
    for shape in shapes:
        # without an image to compare with, any convolution takes latents of one pixel
        if shape[1:] == (1, 1) and context.shape is None and not is_generator:
            continue
        text = f"{name}{f' of latents {shape}' if len(shape) > 1 or (length or shape[0]) != shape[0] else ''}"
        called = partial(_listed, target) if own_path in context.listed else target
        is_of_batch = own_path in context.of_batch
        for label, condition in _one_label(context).items() if labels else (("", None),):
            decode = partial(_with_one_label, called, condition) if labels else called
            yield Way(
                "decode", f"{text}{label}", decode, latent=shape, is_generator=is_generator, is_of_batch=is_of_batch
            )
        is_map, is_stated = len(shape) > 1 and shape[1:] != (1, 1), math.prod(shape) == context.latent_dim
        if type(part).__module__.partition(".")[0] in SAMPLED_BY_TYPE or (is_map and not is_stated):
            # a map of latents has no prior that is worth sampling, unless the user states one
            continue
        yield Way(
            "sample", f"{name} from {noise_of(shape)}{' and labels' if labels else ''}",
            partial(sampled_by, called, module, shape), takes_labels=labels, latent=shape,
            assumes_prior=not is_generator or name == "self.forward", is_generator=is_generator, is_of_batch=is_of_batch,
        )  # fmt: skip


def _of_codes(target: Callable[..., Any], name: str, module: nn.Module, part: nn.Module) -> Iterator[Way]:
    """Yields how a generator of noise, a class and a continuous code samples, as in InfoGAN (https://arxiv.org/abs/1606.03657).

    All three are latents: classes are drawn evenly, as one-hot rows or as integers, and codes evenly from -1 to 1.
    """
    signature = signature_of(target)
    named = [] if signature is None else [p.name for p in signature.parameters.values() if p.default is p.empty]
    if len(named) != 3 or not all(kind.fullmatch(p) for kind, p in zip((NOISE, LABELS, CODES), named, strict=True)):
        return
    sizes = [
        next((size for owner in (part, module) if (size := stated_size(owner, target, names)) is not None), None)
        for names in (NOISE_SIZES, CLASS_SIZES, CODE_SIZES)
    ]
    if None in sizes:
        return
    length, classes, codes = (size for size in sizes if size is not None)
    for one_hot in (True, False):

        def call(n: int, one_hot: bool = one_hot) -> Any:
            z = normal(module, n, (length,))
            labels = torch.randint(classes, (n,), device=z.device)
            code = 2 * torch.rand(n, codes, device=z.device, dtype=z.dtype) - 1
            return target(z, nn.functional.one_hot(labels, classes).to(z) if one_hot else labels, code)

        drawn = f"normal noise (n, {length}), {'one-hot ' * one_hot}classes of {classes} and codes (n, {codes})"
        yield Way("sample", f"{name} from {drawn}", call)


def _listed(target: Callable[..., Any], z: Tensor, *labels: Tensor) -> Any:
    return target([z], *labels)


def takes_noise(target: Callable[..., Any]) -> bool:
    """Returns whether the name of the first parameter says that it takes noise or latents."""
    signature = signature_of(target)
    first = next(iter(signature.parameters), "") if signature is not None else ""
    return NOISE.fullmatch(first) is not None


def _one_label(context: Context) -> dict[str, Tensor | None]:
    """Returns the label with which latents are decoded, also as floats where it may be converted, by what log lines call it."""
    if context.condition is None:
        return {" with class 0": None}
    forms: dict[str, Tensor | None] = {" with the label of one image": context.condition}
    return forms | (
        {" with the label of one image as floats": context.condition.float()} if context.is_converted else {}
    )


def _with_one_label(decoder: Callable[..., Any], condition: Tensor | None, z: Tensor) -> Any:
    if condition is None:
        return decoder(z, torch.zeros(len(z), dtype=torch.long, device=z.device))
    return decoder(z, condition.to(z.device).expand(len(z), *condition.shape))


def sampled_by(decoder: Callable[..., Any], module: nn.Module, shape: tuple[int, ...], n: int, *labels: Tensor) -> Any:
    """Decodes normal noise."""
    return decoder(normal(module, n, shape), *labels)


def normal(module: nn.Module, n: int, shape: tuple[int, ...]) -> Tensor:
    """Returns normal noise (n, *shape) on a module's device and in the precision of its weights."""
    weights = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.randn(n, *shape, device=weights.device, dtype=weights.dtype)


# ---- what is found in a module ----


def latent_length(part: Any, target: Any, context: Context) -> int | None:
    """Returns the length of the latents that the user, an attribute or the first layer of a decoder states, or None."""
    if context.latent_dim is not None:
        return context.latent_dim
    length = stated_size(part, target, LATENT_NAMES)
    if length is None and isinstance(target, nn.Module) and target is not part:
        return _first_width(target, context)
    return length


def _first_width(target: nn.Module, context: Context) -> int | None:
    """Returns the number of features that the first layer of a decoder takes; None where these are rather images."""
    width, _ = _first_layer(target)
    return None if takes_images(target, context) else width


def _first_layer(target: Callable[..., Any]) -> tuple[int | None, bool]:
    """Returns the number of features or channels that the first layer with such a number takes, and whether it convolves."""
    for layer in target.modules() if isinstance(target, nn.Module) else ():
        width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
        if isinstance(width, int) and "weight" in dict(layer.named_parameters(recurse=False)):
            return width, not getattr(layer, "transposed", True)
    return None, False


def takes_images(target: Callable[..., Any], context: Context) -> bool:
    """Returns whether something begins with a convolution of images, as what translates them does, and no generator."""
    width, convolves = _first_layer(target)
    return convolves and width is not None and (width <= MOST_CHANNELS or width == (context.shape or (0,))[0])


def packed_length(module: nn.Module) -> int | None:
    """Returns the length of the latents whose mean and spread an encoder returns one after the other, or None.

    That is where a decoder beside it takes half as many features as the encoder's last layer returns.
    """
    names = (("encoder", "decoder"), ("encode", "decode"))
    pairs = [[getattr(part, name, None) for name in pair] for part in (module, *module.children()) for pair in names]
    for encoder, decoder in pairs:
        if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module):
            continue
        width, _ = _first_layer(decoder)
        outputs = [getattr(layer, "out_features", getattr(layer, "out_channels", None)) for layer in encoder.modules()]
        outputs = [output for output in outputs if isinstance(output, int)]
        if width is not None and outputs and outputs[-1] == 2 * width:
            return width
    return None


def stated_size(part: Any, target: Any, names: tuple[str, ...]) -> int | None:
    """Returns the integer that a module, its configuration or its decoder holds under one of some names, or None."""
    configs = [held(part, name) for name in CONFIGS]
    # configurations of models are often nested once
    nested = [held(config, name) for config in configs for name in ("model", "params", "init_args")]
    parts = [held(part, name) for name in (*DECODE_NAMES, *GENERATOR_NAMES, *_other_generators(part))]
    for holder in (part, *configs, *nested, target, *parts):
        for name in names if holder is not None else ():
            size = _integer(held(holder, name))
            if size is not None:
                return size
    return None


def _integer(value: Any) -> int | None:
    """Returns a positive integer as ``int``, of whatever numeric type it is; None for anything else."""
    with suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(value, (bool, str, nn.Module)) and float(value).is_integer() and float(value) > 0:
            return int(value)
    return None


def posterior_layers(part: nn.Module) -> list[str]:
    """Returns the names of the layers beside an ``encoder`` that make a mean and a log variance of its features."""
    names = [name for name, _ in part.named_children()]
    mean = [name for name in names if MEAN_LAYER.search(name)][:1]
    return mean + [name for name in names if VARIANCE_LAYER.search(name) and name not in mean][:1] if mean else []


def has_forward(module: nn.Module) -> bool:
    """Returns whether a module defines ``forward`` and does not merely inherit it from torch or Lightning."""
    first = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return first is not nn.Module and first.__name__ != "LightningModule"


def signature_of(target: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the signature of a callable, or None where Python cannot determine it."""
    try:
        return inspect.signature(target.forward if isinstance(target, nn.Module) else target)
    except (TypeError, ValueError):
        return None


def accepts(target: Callable[..., Any], given: int) -> bool:
    """Returns whether a callable accepts a number of positional arguments; True where that cannot be determined."""
    signature = signature_of(target)
    try:
        if signature is not None:
            signature.bind(*range(given))
    except TypeError:
        return False
    return True
