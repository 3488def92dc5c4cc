"""Recognises models of known libraries by the names of the types that a module holds; none of them is imported."""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from lightning_gendiag import samplers
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapters.base import Context, Recogniser, Way
from lightning_gendiag.model.adapters.own import AVERAGED, TIMES, normal, signature_of
from lightning_gendiag.model.outputs import data_in

STEPS = samplers.STEPS

DIFFUSION = ("diffusers", "monai", "generative")
"""Packages of networks and schedulers; ``generative`` is MONAI's older one."""

NETWORKS = r"UNet\w*Model|\w*Transformer\w*Model|\w*DiffusionModelUNet\w*"
FIRST_STAGES = r"Autoencoder\w+|AsymmetricAutoencoder\w+|VQModel|VQVAE"
PREDICTIONS: dict[str, samplers.Prediction] = {"epsilon": "noise", "sample": "sample", "v_prediction": "velocity"}

FLOWS = ("normflows", "nflows", "zuko")
"""Packages of normalizing flows whose types are named alike."""

LABELS = ("y", "label", "labels", "cls", "classes", "class_labels", "target", "targets")
"""Names of parameters that take class labels."""

OF_NOISE = re.compile(r"(^|_)(base|prior|noise|latents?|source|q0|p_?z)(_|$)")
"""Names of distributions that are not the data's."""


class Part(NamedTuple):
    """An object that a module holds."""

    name: str
    """Where it is, such as ``"self.model.unet"``."""
    value: Any
    depth: int


# ---- what a module holds ----


def parts_of(module: nn.Module) -> list[Part]:
    """Returns a module and the objects in its children and plain attributes, to a depth of two, nearest first."""
    level = [Part("self", module, 0)]
    found, seen = list(level), {id(module)}
    for depth in (1, 2):
        held = [Part(f"{part.name}.{name}", value, depth) for part in level for name, value in _attributes(part.value)]
        level = []
        for part in held:
            if id(part.value) not in seen:
                seen.add(id(part.value))
                level.append(part)
        found += level
    return found


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yields the objects in the public children and plain attributes of an object, without running any property."""
    if isinstance(holder, Distribution):
        return
    for name, value in (*children_of(holder), *vars(holder).items()):
        is_object = hasattr(value, "__dict__") and not isinstance(
            value, (Tensor, type, types.ModuleType, types.FunctionType)
        )
        if is_object and not name.startswith("_") and not AVERAGED.search(name):
            yield name, compat.uncompiled(value) if isinstance(value, nn.Module) else value


def children_of(holder: Any) -> list[tuple[str, nn.Module]]:
    """Returns the names and children of a module; none of other objects."""
    # MONAI's RFlowScheduler is a module that does not initialise its base class
    with suppress(AttributeError):
        return list(holder.named_children()) if isinstance(holder, nn.Module) else []
    return []


def is_kind(value: object, packages: Sequence[str], names: str) -> bool:
    """Returns whether an object's class has a base of one of these packages whose name matches a regular expression."""
    return any(
        base.__module__.partition(".")[0] in packages and re.fullmatch(names, base.__name__)
        for base in type(value).__mro__
    )


def of_kind(module: nn.Module, packages: Sequence[str], names: str) -> list[Part]:
    """Returns the objects of a kind that a module holds."""
    return [part for part in parts_of(module) if is_kind(part.value, packages, names)]


def setting(value: Any, name: str, default: Any = None) -> Any:
    """Returns an entry of an object's ``config``, else its attribute; the default where neither is given."""
    config = getattr(value, "config", None)
    held = config.get(name) if isinstance(config, Mapping) else None
    held = getattr(value, name, None) if held is None else held
    return default if held is None else held


def parameters_of(call: Any) -> list[inspect.Parameter]:
    """Returns the parameters of a callable that may be given by position; none where Python cannot determine them."""
    signature = signature_of(call)
    named = () if signature is None else signature.parameters.values()
    return [p for p in named if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


@contextmanager
def changed(value: Any, **attributes: Any) -> Iterator[None]:
    """Gives an object other attributes for a while, since it belongs to the trained module where no copy can be made."""
    before = {name: getattr(value, name) for name in attributes}
    try:
        for name, new in attributes.items():
            setattr(value, name, new)
        yield
    finally:
        for name, old in before.items():
            setattr(value, name, old)


# ---- networks of noisy data, times and perhaps labels ----


def networks(module: nn.Module, packages: Sequence[str]) -> list[Part]:
    """Returns a module's networks of known kinds, else its children that take data and times, then the module itself."""
    known = of_kind(module, packages, NETWORKS)
    own = [
        part
        for part in parts_of(module)
        if part.depth <= 1 and isinstance(part.value, nn.Module)
        if len(parameters_of(part.value)) >= 2 and any(TIMES.fullmatch(p.name) for p in parameters_of(part.value)[:2])
    ]
    # a module's own forward may return a loss, so that it comes last
    return known or sorted(own, key=lambda part: part.depth == 0)


def label_name(network: Any) -> str | None:
    """Returns the parameter for class labels of a network that needs them, or None."""
    named = next((p for p in parameters_of(network) if p.name in LABELS), None)
    stated = any(getattr(network, name, None) is not None for name in ("class_embedding", "num_classes"))
    needed = named is not None and (stated or named.default is named.empty or is_kind(network, DIFFUSION, r"DiT\w*"))
    return named.name if named is not None and needed else None


def predicted(network: Any, inputs: tuple[Tensor, ...], x: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
    """Returns what a network predicts for noisy data (n, ...).

    Args:
        network: The network.
        inputs: Data and times, in the network's order.
        x: The data.
        labels: Labels (n,), or none.

    Raises:
        ValueError: If the prediction has another shape.
    """
    name = label_name(network) if labels else None
    output = network(*inputs, **({} if name is None else {name: labels[0]}))
    output = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    # the second half of twice the channels is a learned variance
    prediction: Tensor = output[:, : x.shape[1]]
    if prediction.shape != x.shape:
        raise ValueError(f"a network must predict {tuple(x.shape)}, got {tuple(output.shape)}.")
    return prediction


# ---- diffusers and MONAI ----


def diffusion_networks(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields a schedule of a few steps over each network beside a scheduler; latents are decoded by a first stage."""
    parts = parts_of(module)
    stages = of_kind(module, DIFFUSION, FIRST_STAGES)
    for scheduler in of_kind(module, DIFFUSION, r"\w*Scheduler"):
        solver = f"{'SDE-' * is_stochastic(scheduler.value)}DPM-Solver++ with the betas of "
        steps = f"{STEPS} steps of {solver * is_discrete(scheduler.value)}{scheduler.name}"
        for network in networks(module, DIFFUSION):
            labels = label_name(network.value) is not None
            name = f"{steps} over {network.name}"
            run = partial(scheduled, network.value, scheduler.value, context.device)
            for stage in stages:
                scale = latent_scale(parts, stage.value)
                call = partial(latent_sample, run, network.value, stage.value, scale, context)
                yield Way("sample", f"{name}, decoded by {stage.name} at scale {scale:g}", call, takes_labels=labels)
            shape = data_shape(network.value, context)
            if shape is not None:
                yield Way("sample", name, partial(run, shape), takes_labels=labels)


def is_discrete(scheduler: Any) -> bool:
    """Returns whether a scheduler's forward process is that of DDPM, for which :func:`samplers.ddim` is more exact.

    With 20 of their own steps, these schedulers give samples of a normal distribution 0.72 (DDIM), 0.94 (PNDM) and 1.6
    (MONAI's PNDM) times its standard deviation; DDPM and others add noise in each step, for which 20 are far too few.
    """
    kinds = r"(DDPM|DDIM|PNDM|DEIS|UniPC|DPMSolverMultistep|DPMSolverSinglestep)\w*"
    has_betas = isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)
    return has_betas and is_kind(scheduler, DIFFUSION, kinds) and prediction_of(scheduler) in PREDICTIONS


def is_stochastic(scheduler: Any) -> bool:
    """Returns whether a scheduler adds noise in each step, so that :func:`samplers.ddim` must do so too.

    Of a network of 120 training steps, 20 steps with noise give the distribution of DDPM with 100, up to chance. Those
    without noise do not, and neither does the package's own DDIM with 100 steps (``benchmarks/field.py --calibrate``).
    """
    return is_kind(scheduler, DIFFUSION, r"DDPM\w*") or str(setting(scheduler, "algorithm_type", "")).startswith("sde")


def prediction_of(scheduler: Any) -> str:
    """Returns what a scheduler takes a network's output for, such as ``"epsilon"``."""
    kind = setting(scheduler, "prediction_type", "epsilon")
    return str(getattr(kind, "value", kind))


def scheduled(
    network: Any, scheduler: Any, device: torch.device, shape: tuple[int, ...], n: int, *labels: Tensor
) -> Tensor:
    """Returns samples (n, *shape) after the steps of a scheduler."""
    if is_discrete(scheduler):
        return samplers.ddim(
            lambda x, t: predicted(network, (x, t), x, labels), scheduler.alphas_cumprod, (n, *shape), STEPS,
            PREDICTIONS[prediction_of(scheduler)], clip=clipping(scheduler), device=device,
            stochastic=is_stochastic(scheduler),
        )  # fmt: skip
    # its steps leave a state in the scheduler
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(min(STEPS, int(setting(scheduler, "num_train_timesteps", STEPS))), device=device)
    x = torch.randn(n, *shape, device=device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        stepped = scheduler.step(predicted(network, (scaled, t.to(device).expand(n)), scaled, labels), t, x)
        x = stepped.prev_sample if hasattr(stepped, "prev_sample") else stepped[0]
    return x


def clipping(scheduler: Any) -> tuple[float, float] | None:
    """Returns the range to which a scheduler clips predicted samples, or None."""
    if not setting(scheduler, "clip_sample", False):
        return None
    bound = float(setting(scheduler, "clip_sample_range", 1.0))
    low, high = getattr(scheduler, "clip_sample_values", (-bound, bound))
    return low, high


def data_shape(network: Any, context: Context) -> tuple[int, ...] | None:
    """Returns the shape of the real data, else the one that a network states; None where neither is known."""
    if context.shape is not None:
        return context.shape
    channels, size = setting(network, "in_channels"), setting(network, "sample_size")
    if not isinstance(channels, int) or size is None:
        return None
    return (channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def latent_scale(parts: list[Part], stage: Any) -> float:
    """Returns the factor of latents: that of MONAI's inferer, else the module's, else the first stage's."""
    inferers = [part.value for part in parts if is_kind(part.value, DIFFUSION, r"Latent\w*Inferer")]
    for holder in (*inferers, parts[0].value):
        for name in ("scale_factor", "scaling_factor"):
            value = getattr(holder, name, None)
            if isinstance(value, (int, float, Tensor)):
                return float(value)
    return float(setting(stage, "scaling_factor", 1.0))


def latent_sample(
    run: Callable[..., Tensor], network: Any, stage: Any, scale: float, context: Context, n: int, *labels: Tensor
) -> Any:
    """Returns images (n, C, H, W), decoded from latents that a schedule made, as large as those of a real image."""
    shape = data_shape(network, context)
    if context.shape is not None:
        shape = tuple(latents_of(stage, torch.zeros(1, *context.shape, device=context.device)).shape[1:])
    latents = run(shape, n, *labels)
    # MONAI's VQVAE quantizes here, and not in decode
    decode = getattr(stage, "decode_stage_2_outputs", partial(decoded, stage))
    return decode(latents / scale + float(setting(stage, "shift_factor", 0.0)))


def pipelines(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the pipelines of diffusers that need no prompt; their images have 8 bits."""
    for part in of_kind(module, ("diffusers",), "DiffusionPipeline"):
        if "batch_size" in inspect.signature(part.value).parameters:
            yield Way("sample", f"{part.name}(batch_size=n) with {STEPS} steps", partial(piped, part.value))


def piped(pipeline: Any, n: int) -> Any:
    """Returns the n images of a pipeline."""
    given = {"num_inference_steps": STEPS} if "num_inference_steps" in inspect.signature(pipeline).parameters else {}
    with quiet():
        return pipeline(batch_size=n, **given).images


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the progress bars that libraries write to the standard error, one for each chunk of samples."""
    with redirect_stderr(io.StringIO()):
        yield


def first_stages(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the parts of autoencoders that diffusion models work on: of diffusers, and of MONAI."""
    for name, stage, _ in of_kind(module, DIFFUSION, FIRST_STAGES):
        yield Way("encode", f"{name}.encode", partial(encoded, stage))
        yield Way("decode", f"{name}.decode", partial(decoded, stage))
        yield Way("reconstruct", f"{name}.decode of {name}.encode", partial(reconstructed, stage))


def encoded(stage: Any, images: Tensor) -> Any:
    """Returns the posterior of images, or their latents where there is none."""
    output = stage.encode(images)
    if isinstance(output, tuple):
        # MONAI gives a mean and a standard deviation
        mean, std = output
        return Normal(mean, std, validate_args=False)
    return next(
        (getattr(output, name) for name in ("latent_dist", "latents", "latent") if hasattr(output, name)), output
    )


def latents_of(stage: Any, images: Tensor) -> Tensor:
    """Returns the latents (n, ...) of images, the mean where there is a posterior."""
    output = encoded(stage, images)
    latents: Tensor = output if isinstance(output, Tensor) else output.mean
    return latents


def decoded(stage: Any, latents: Tensor) -> Any:
    """Returns the images of latents."""
    output = stage.decode(latents)
    return getattr(output, "sample", output)


def reconstructed(stage: Any, images: Tensor) -> Any:
    """Returns the reconstructions of images."""
    latents = latents_of(stage, images)
    return decoded(stage, stage.quantize(latents)[0] if hasattr(stage, "quantize") and is_monai(stage) else latents)


def is_monai(stage: Any) -> bool:
    """Returns whether a model is MONAI's; diffusers' quantizes when it decodes."""
    return not is_kind(stage, ("diffusers",), FIRST_STAGES)


def monai_autoencoders(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the parts of MONAI's autoencoders of fixed size."""
    for name, model, _ in of_kind(module, ("monai",), "AutoEncoder"):
        yield Way("reconstruct", f"{name}(images)", model)
        if is_kind(model, ("monai",), "VarAutoEncoder"):
            decode = partial(monai_decoded, model)
            yield Way("encode", f"{name}.encode_forward", model.encode_forward)
            yield Way("decode", f"{name}.decode_forward", decode)
            noise = f"normal noise (n, {model.latent_size})"
            yield Way(
                "sample", f"{name}.decode_forward from {noise}", partial(sampled, decode, model, model.latent_size)
            )


def monai_decoded(model: Any, z: Tensor) -> Any:
    """Returns the images of latents, in the range of the model's forward."""
    return model.decode_forward(z, getattr(model, "use_sigmoid", True))


def sampled(decode: Callable[[Tensor], Any], module: nn.Module, length: int, n: int) -> Any:
    """Returns what is decoded from normal noise."""
    return decode(normal(module, n, (length,)))


# ---- other diffusion models and flow matching ----


def gaussian_diffusions(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields ``sample(batch_size)`` of denoising-diffusion-pytorch, with fewer steps."""
    kinds = r"\w*GaussianDiffusion\w*|ElucidatedDiffusion"
    for name, model, _ in of_kind(module, ("denoising_diffusion_pytorch",), kinds):
        first = next(iter(inspect.signature(model.sample).parameters), "")
        fewer = fewer_steps(model)
        text = f"{name}.sample{f' with {STEPS} steps' if fewer else ''}"
        yield Way("sample", text, partial(diffused, model, fewer), takes_labels=first in LABELS)


def fewer_steps(model: Any) -> dict[str, Any]:
    """Returns the attributes with which a model samples in a few steps; none where it does already."""
    for name in ("sampling_timesteps", "num_sample_steps"):
        if getattr(model, name, 0) > STEPS:
            # DDIM in place of DDPM adds as much noise
            as_ddpm = {"is_ddim_sampling": True, "ddim_sampling_eta": 1.0}
            is_ddpm = getattr(model, "is_ddim_sampling", True) is False
            return {name: STEPS} | {key: value for key, value in as_ddpm.items() if is_ddpm and hasattr(model, key)}
    return {}


def diffused(model: Any, fewer: dict[str, Any], n: int, *labels: Tensor) -> Any:
    """Returns n samples of a model with other attributes."""
    with changed(model, **fewer), quiet():
        return model.sample(*(labels or (n,)))


def flow_matchers(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the midpoint method over each network beside a ``FlowMatcher`` of torchcfm."""
    if context.shape is None or not of_kind(module, ("torchcfm",), r"\w*FlowMatcher"):
        return
    joined = [part for part in of_kind(module, ("torchcfm",), "MLP") if part.value.time_varying]
    for part in joined + networks(module, ("torchcfm",)):
        name = f"{STEPS // 2} midpoint steps over {part.name}"
        call = partial(integrated, part.value, part in joined, context)
        yield Way("sample", name, call, takes_labels=label_name(part.value) is not None)


def integrated(network: Any, joined: bool, context: Context, n: int, *labels: Tensor) -> Tensor:
    """Returns samples (n, ...) of a vector field.

    Args:
        network: The field.
        joined: Whether it takes rows with the time as their last entry.
        context: What is known of the data.
        n: Number of samples.
        labels: Labels (n,), or none.
    """
    names = [p.name for p in parameters_of(network)]

    def field(t: Tensor, x: Tensor) -> Tensor:
        if joined:
            return predicted(network, (torch.cat([x, t[:, None]], dim=1),), x, labels)
        return predicted(network, (t, x) if TIMES.fullmatch(names[0]) else (x, t), x, labels)

    return samplers.midpoint(field, (n, *(context.shape or ())), device=context.device)


# ---- autoencoders with a prior, and quantized ones ----


def pythae_models(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the parts of pythae's models; only those with a normal or a VampPrior sample."""
    for name, model, _ in of_kind(module, ("pythae",), "BaseAE"):
        decode = partial(pythae_decoded, model)
        has_prior = is_kind(model, ("pythae",), "VAE|WAE_MMD") and not is_kind(
            model, ("pythae",), "VAMP|SVAE|PoincareVAE"
        )
        if has_prior:
            text = f"{name}.decoder from normal noise (n, {model.latent_dim})"
            yield Way("sample", text, partial(sampled, decode, model, model.latent_dim))
        elif is_kind(model, ("pythae",), "VAMP"):
            yield Way("sample", f"{name}.decoder from posteriors of its pseudo-inputs", partial(vamp_sampled, model))
        yield Way("encode", f"{name}.encoder", partial(pythae_encoded, model))
        yield Way("decode", f"{name}.decoder", decode)
        yield Way("reconstruct", f"{name}.reconstruct", model.reconstruct)


def pythae_encoded(model: Any, images: Tensor) -> Any:
    """Returns the mean and the log variance in what an encoder of pythae returns, the latents where there are none."""
    output = model.encoder(images)
    return output if "log_covariance" in output else output["embedding"]


def vamp_sampled(model: Any, n: int) -> Any:
    """Returns what is decoded from draws of pythae's VampPrior, the mean of the posteriors of its pseudo-inputs."""
    inputs = model.pseudo_inputs(model.idle_input)
    chosen = inputs[torch.randint(len(inputs), (n,), device=inputs.device)]
    output = model.encoder(chosen.reshape(n, *model.model_config.input_dim))
    mean, std = output["embedding"], (torch.tanh(output["log_covariance"]) / 2).exp()
    return pythae_decoded(model, mean + std * torch.randn_like(mean))


def pythae_decoded(model: Any, z: Tensor) -> Any:
    """Returns the reconstruction in what a decoder of pythae returns."""
    return model.decoder(z)["reconstruction"]


def quantized(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields the layers before and after a quantizer of vector-quantize-pytorch."""
    for part in parts_of(module):
        chain = chain_of(part.value) if isinstance(part.value, nn.Module) else None
        if chain is not None:
            before, quantizer, after = chain
            yield Way("encode", f"{part.name} before its quantizer", partial(applied, before))
            yield Way("encode", f"{part.name} after its quantizer", partial(applied, [*before, quantizer]))
            yield Way("decode", f"{part.name} after its quantizer", partial(applied, after))
            yield Way("reconstruct", f"the layers of {part.name}", partial(applied, [*before, quantizer, *after]))


Layers = list[Callable[[Tensor], Any]]


def chain_of(holder: nn.Module) -> tuple[Layers, Callable[[Tensor], Tensor], Layers] | None:
    """Returns the layers before a module's quantizer, the quantizer, and the layers after it; None without one."""
    children = dict(children_of(holder))
    is_quantizer = {name: is_kind(child, ("vector_quantize_pytorch",), r"\w+") for name, child in children.items()}
    if sum(is_quantizer.values()) != 1:
        return None
    at = list(is_quantizer.values()).index(True)
    quantizer = partial(quantize, list(children.values())[at])
    if isinstance(holder, (nn.Sequential, nn.ModuleList)):
        layers = list(children.values())
        return list(layers[:at]), quantizer, list(layers[at + 1 :])
    # as written in most models: encoder, projection, quantizer, projection, decoder, declared in any order
    before = [children[name] for name in matching(children, r"enc(oder)?", r"pre_?(vq|quant)\w*|quant_conv")]
    after = [children[name] for name in matching(children, r"post_?(vq|quant)\w*", r"dec(oder)?")]
    return (list(before), quantizer, list(after)) if before and after else None


def matching(names: Mapping[str, Any], *patterns: str) -> list[str]:
    """Returns names that match regular expressions, in the order of these."""
    return [name for pattern in patterns for name in names if re.fullmatch(pattern, name)]


def quantize(quantizer: Any, z: Tensor) -> Tensor:
    """Returns quantized latents in the shape of the latents."""
    flags = ["accept_image_fmap", "is_channel_first"]
    # others have this flag too, and take images all the same
    flags += ["channel_first"] if is_kind(quantizer, ("vector_quantize_pytorch",), r"\w*SimVQ") else []
    rows_only = any(getattr(quantizer, name, None) is False for name in flags)
    if not rows_only or z.ndim < 4:
        output: Tensor = quantizer(z)[0]
        return output
    rows: Tensor = quantizer(z.flatten(2).transpose(1, 2))[0]
    return rows.transpose(1, 2).reshape(z.shape)


def applied(layers: Layers, x: Tensor) -> Any:
    """Returns what layers make of an input, one after the other."""
    return reduce(lambda h, layer: layer(h), layers, x)


# ---- normalizing flows and distributions ----


def flows(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields samples, latents and data of the flows of normflows, nflows, zuko and FrEIA."""
    for name, flow, _ in parts_of(module):
        if is_kind(flow, FLOWS, r"\w*Flow|LazyDistribution") and not OF_NOISE.search(name.rpartition(".")[2]):
            if is_kind(flow, ("normflows",), r"\w+"):
                yield from of_normflows(name, flow)
            elif is_kind(flow, ("nflows",), r"\w+"):
                yield from of_nflows(name, flow)
            else:
                yield from of_zuko(module, name, flow)
        elif is_kind(flow, ("FrEIA",), "SequenceINN|GraphINN"):
            yield from of_freia(name, flow)


def of_normflows(name: str, flow: Any) -> Iterator[Way]:
    """Yields the parts of a flow of normflows."""
    labels = bool(getattr(flow, "class_cond", False)) or is_kind(flow, FLOWS, "ClassCondFlow")
    yield Way("sample", f"{name}.sample(n{', y' * labels})", partial(first, flow.sample), takes_labels=labels)
    if is_kind(flow, FLOWS, "NormalizingFlow"):
        yield from both(f"{name}.inverse", flow.inverse)
        yield Way("decode", f"{name}.forward", flow.forward)
    bases = getattr(flow, "q0", ()) if is_kind(flow, FLOWS, "MultiscaleFlow") else ()
    if bases and all(is_kind(base, FLOWS, "DiagGaussian") for base in bases):
        length = sum(math.prod(base.shape) for base in bases)
        yield Way("encode", f"{name}.inverse_and_log_det", partial(scales_encoded, flow))
        yield Way("decode", f"{name}.forward_and_log_det", partial(scales_decoded, flow), latent=(length,))


def scales_encoded(flow: Any, x: Tensor) -> Tensor:
    """Returns the latents (n, L) of data, those of all scales one after the other, with the prior N(0, 1)."""
    scales = zip(flow.q0, flow.inverse_and_log_det(x)[0], strict=True)
    return torch.cat([((z - base.loc) * (-base.log_scale).exp()).flatten(1) for base, z in scales], dim=1)


def scales_decoded(flow: Any, z: Tensor) -> Tensor:
    """Returns the data of latents (n, L), which are divided among the scales."""
    scales = zip(flow.q0, divided(z, [tuple(base.shape) for base in flow.q0]), strict=True)
    data: Tensor = flow.forward_and_log_det([base.loc + base.log_scale.exp() * part for base, part in scales])[0]
    return data


def divided(z: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Returns latents (n, L) as parts of the given shapes, one after the other."""
    pieces = torch.split(z, [math.prod(size) for size in sizes], dim=1)
    return [piece.reshape(len(z), *size) for piece, size in zip(pieces, sizes, strict=True)]


def of_nflows(name: str, flow: Any) -> Iterator[Way]:
    """Yields the parts of a flow of nflows; it decodes latents whose prior is N(0, 1)."""
    yield Way("sample", f"{name}.sample(n)", flow.sample)
    yield from both(f"{name}.transform_to_noise", flow.transform_to_noise)
    transform, distribution = compat.parts_of_nflows(flow)
    if transform is not None and is_kind(distribution, FLOWS, "StandardNormal"):
        yield Way("decode", f"{name}._transform.inverse", partial(first, transform.inverse))


def of_zuko(module: nn.Module, name: str, flow: Any) -> Iterator[Way]:
    """Yields the parts of a flow of zuko, or of another distribution that it makes at each call."""
    length = context_length(flow)
    if length:
        yield from of_classes(module, name, flow, length)
        return
    yield Way("sample", f"{name}().sample((n,))", partial(drawn, flow))
    if is_kind(flow, FLOWS, "Flow"):
        yield from both(f"{name}().transform", partial(transformed, flow))
        yield Way("decode", f"{name}().transform.inv", partial(inverted, flow))


def of_classes(module: nn.Module, name: str, flow: Any, length: int) -> Iterator[Way]:
    """Yields samplers of a distribution of zuko that is made for a context, which stands for labels."""
    for embedding in (part for part in parts_of(module) if isinstance(part.value, nn.Embedding)):
        if embedding.value.embedding_dim == length:
            text = f"{name}({embedding.name}(y)).sample()"
            yield Way("sample", text, partial(drawn_for, flow, embedding.value), takes_labels=True)
    if length > 1:
        text = f"{name}(one_hot(y, {length})).sample()"
        yield Way("sample", text, partial(drawn_for, flow, partial(one_hot, length)), takes_labels=True)


def context_length(flow: Any) -> int:
    """Returns the length of the context that a distribution of zuko is made for, which its layers state; 0 for none.

    Only one length fits the first layer, which takes the context and perhaps data, so that the lengths are tried on zeros.
    """
    widths = [width for layer in flow.modules() if isinstance(width := getattr(layer, "in_features", None), int)]
    weights = next(iter(flow.parameters()), torch.zeros(()))
    for length in range(max(widths, default=0) + 1):
        with suppress(Exception), torch.no_grad():
            made = flow(weights.new_zeros(1, length)) if length else flow()
            if hasattr(made, "transform"):
                made.transform(weights.new_zeros(1, *made.event_shape))
            return length
    return 0


def one_hot(length: int, labels: Tensor) -> Tensor:
    """Returns labels (n,) as one-hot rows (n, length).

    Raises:
        ValueError: If there are more classes than that.
    """
    if int(labels.max()) >= length:
        raise ValueError(f"it takes {length} classes, got a label {int(labels.max())}")
    return nn.functional.one_hot(labels, length)


def drawn_for(flow: Any, embed: Callable[[Tensor], Tensor], n: int, labels: Tensor) -> Any:
    """Returns a sample for each label, of the distributions that a module makes."""
    weights = next(iter(flow.parameters()))
    return flow(embed(labels).to(weights)).sample()


def of_freia(name: str, network: Any) -> Iterator[Way]:
    """Yields the parts of an invertible network of FrEIA with one input and at most one condition, of labels."""
    # a sequence lists the shapes between its blocks, and a graph those of its ends
    between = getattr(network, "shapes", [])
    inputs, outputs = network.dims_in, getattr(network, "global_out_shapes", between[-1:])
    conditions = list(getattr(network, "dims_c", ())) or [
        block.dims_c[0]
        for block, index in zip(getattr(network, "module_list", ()), getattr(network, "conditions", ()), strict=False)
        if index is not None
    ]
    if len(inputs) != 1 or len({tuple(shape) for shape in conditions}) > 1:
        return
    sizes = [tuple(shape) for shape in outputs]
    length = sum(map(math.prod, sizes))
    if conditions:
        classes = conditions[0][0]
        if len(conditions[0]) == 1 and classes > 1:
            text = f"{name}(z, c=[one_hot(y, {classes})], rev=True) from normal noise (n, {length})"
            call = partial(freia_sampled, network, sizes, classes)
            yield Way("sample", text, call, takes_labels=True)
        return
    text = f"{name}(z, rev=True) from normal noise (n, {length})"
    yield Way("sample", text, partial(freia_sampled, network, sizes, None))
    yield Way("encode", f"{name}(x)", partial(freia_encoded, network, tuple(inputs[0])))
    yield Way("decode", f"{name}(z, rev=True)", partial(freia_decoded, network, sizes, {}), latent=(length,))


def freia_encoded(network: Any, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Returns the latents (n, L) of data, those of several outputs one after the other."""
    outputs = network(x.reshape(len(x), *shape))[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return torch.cat([z.flatten(1) for z in outputs], dim=1)


def freia_decoded(network: Any, sizes: list[tuple[int, ...]], condition: dict[str, Any], z: Tensor) -> Any:
    """Returns the data of latents (n, L), which are divided among outputs of the stated shapes."""
    parts = divided(z, sizes)
    return network(parts[0] if len(parts) == 1 else parts, rev=True, **condition)[0]


def freia_sampled(network: Any, sizes: list[tuple[int, ...]], classes: int | None, n: int, *labels: Tensor) -> Any:
    """Returns the data of normal noise, given one-hot labels where there is a number of classes."""
    z = normal(network, n, (sum(map(math.prod, sizes)),))
    condition = {} if classes is None else {"c": [one_hot(classes, labels[0]).to(z)]}
    return freia_decoded(network, sizes, condition, z)


def both(name: str, encode: Callable[[Tensor], Any]) -> Iterator[Way]:
    """Yields an encoder of the data as it is, and of flattened data."""
    yield Way("encode", name, encode)
    yield Way("encode", f"{name} of flattened data", lambda x: encode(x.flatten(1)))


def transformed(flow: Any, x: Tensor) -> Any:
    """Returns the latents of data in a flow of zuko."""
    return flow().transform(x)


def inverted(flow: Any, z: Tensor) -> Any:
    """Returns the data of latents in a flow of zuko."""
    return flow().transform.inv(z)


def first(call: Callable[..., Any], *given: Any) -> Any:
    """Returns the samples or data that a callable returns beside their log probabilities or log-determinants."""
    return call(*given)[0]


def distributions(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields torch's distributions of data, as attributes or as what ``forward()`` returns without arguments."""
    for name, value, _ in parts_of(module):
        if OF_NOISE.search(name.rpartition(".")[2]) or is_kind(value, FLOWS, r"\w+"):
            continue
        if isinstance(value, Distribution):
            if may_be_of_data(value, context):
                yield Way("sample", f"{name}.sample((n,))", partial(drawn_from, value))
        elif isinstance(value, nn.Module) and makes_something(value):
            yield Way("sample", f"{name}().sample((n,))", partial(drawn, value))


def may_be_of_data(distribution: Distribution, context: Context) -> bool:
    """Returns whether samples of a distribution have the shape of the data; those of others are latents or noise."""
    sampled = torch.empty(2, *distribution.batch_shape, *distribution.event_shape, device="meta")
    try:
        return context.shape is None or data_in(sampled, 2, context.shape) is not None
    except ValueError:
        return False


def makes_something(module: nn.Module) -> bool:
    """Returns whether a module defines a ``forward`` that needs no arguments."""
    signature = signature_of(module)
    # what takes any arguments, such as a forward that only torch defines, may need some
    return signature is not None and not any(p.default is p.empty for p in signature.parameters.values())


def drawn(make: Callable[[], Any], n: int) -> Any:
    """Returns n samples of the distribution that a callable returns."""
    return drawn_from(make(), n)


def drawn_from(distribution: Any, n: int) -> Any:
    """Returns n samples of a distribution."""
    return distribution.sample((n,))


LIBRARIES: tuple[Recogniser, ...] = (
    diffusion_networks, pipelines, first_stages, monai_autoencoders, gaussian_diffusions, flow_matchers, pythae_models,
    quantized, flows, distributions,
)  # fmt: skip
"""Recognisers of known libraries, in the order in which they are tried."""
