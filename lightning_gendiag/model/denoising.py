"""Finds the network of a diffusion or flow matching model and what it is trained to predict, by watching a training step.

A training step adds noise to data and compares what a network predicts with a target. Nothing of it needs to be known: the
step runs on the isolated copy, the network is the part whose input is data plus a multiple of a normal draw, and the
gradient of the loss at chosen predictions gives the target and the weight of each row.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gendiag.model.adapters.own import is_adversarial, signature_of

LOSS_ADVICE = "TimestepLossMonitor(loss=lambda module, images, times, noise: ...)"
TO_FIX = f"To fix this, pass {LOSS_ADVICE}."

TIMES = re.compile(
    r"ts?|\w*time\w*|steps?|\w*sigmas?|(?!noises?$)\w*noise\w*|\w*lambda\w*|\w*snr\w*|angles?", re.IGNORECASE
)
"""Names of parameters that take times or levels of noise; the noise itself is what generators take."""

OF_GANS = re.compile(r"ts?|\w*time\w*|\w*sigmas?|noise_levels?", re.IGNORECASE)
"""The same beside a discriminator, where a step is one of growing images, and noise that of a generator's layers."""

KINDS = re.compile(r"diffus|denois|flow_?match|ddpm|score_?(net|model|based)|schedul|unet", re.IGNORECASE)
"""Names of classes of such networks, or of what belongs to them."""

BATCH_INDEX = 1
"""Number of the batch that a training step is given; many draw pictures at the first one."""

EXACT = 1e-3
"""Relative error below which two tensors are the same up to rounding."""

LEAST_EXACT = 0.9
"""Share of the rows that must be explained; others may have almost no noise, where rounding decides."""

LEAST_SPREAD = 0.05
"""Standard deviation of the noise relative to its mean below which there is one level of noise and no schedule."""

SMALLEST = 1e-6
"""Bound of the scales of signal and noise, which schedules let end in 0."""

SAME_TARGET = 0.01
"""Relative error below which a target is one of the usual ones."""

MOST_ERROR = 0.02
"""Of the logarithm of the scale of the signal, above which a schedule does not fit."""

LEAST_SIGNAL = 0.02
"""Scale of the signal below which rounding decides by which factor it differs."""

LEAST_MATCHED = 0.3
"""Share of rows in which a draw is surely recognised, where it may be that of another row."""

NO_WEIGHT = 1e-5
"""Weight relative to the largest one that counts as none."""

LEAST_LOSS = 0.02
"""A candidate is the target if it makes the loss smaller than this part of what the next one does."""

SECOND_SEED = 104_651
"""Distance of the seeds of two training steps whose levels of noise differ."""


class NoisyBatch(NamedTuple):
    """One call of the network as training makes it, with what it should predict; all on one device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Tensor
    """(N, ...) noisy data, of the shape of a prediction."""
    targets: Tensor
    """(N, ...) what the loss compares a prediction with."""
    levels: Tensor
    """(N,) logarithm of the variance of the noise relative to that of the signal: minus the log-SNR."""
    times: Tensor | None
    """(N,) what the network is given as the time, or None where that is not found."""
    weights: Tensor
    """(N,) weight of each row in the loss, relative to others; nan where the loss is not a squared error."""

    def to(self, device: torch.device) -> NoisyBatch:
        """Returns the batch on a device."""
        moved: NoisyBatch = apply_to_collection(self, Tensor, Tensor.to, device)
        return moved


class Denoiser(NamedTuple):
    """Where the network is, and how training uses it; plain values, equal on all processes."""

    path: str
    """Of the network in the module; empty for the module itself."""
    place: int | str
    """Position or keyword of the noisy data among its arguments."""
    draw: int
    """Which normal draw of a training step is the noise."""
    channels: int
    """Number of channels of a prediction; more in the input are conditions, more in the output a variance."""
    is_paired: bool = True
    """Whether each row has the noise that was drawn for it, and not that of an optimal transport plan."""
    schedule: str = ""
    """Key of :data:`SCHEDULES`; empty where none fits."""
    prediction: str = ""
    """What is predicted, such as ``"the noise"``; empty where it is none of the usual targets."""

    @property
    def name(self) -> str:
        """What log lines call the network."""
        return f"self.{self.path}" if self.path else "self"


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "variance-preserving": lambda noise: (1 - noise.square()).clamp(min=0).sqrt(),
    "straight": lambda noise: (1 - noise).clamp(min=0),
    "variance-exploding": torch.ones_like,
}
"""Scale of the signal for that of the noise: DDPM (Ho et al. 2020), flow matching (Lipman et al. 2023), and noise added to
data (Karras et al. 2022)."""


# ---- a training step ----


class _Draws(TorchFunctionMode):
    """Records normal draws for rows of data, replaces one of them by zeros, and spreads levels of noise evenly."""

    def __init__(self, rows: int, without: int | None = None) -> None:
        super().__init__()
        self.rows, self.without = rows, without
        self.normal: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in ("randn", "randn_like", "normal", "normal_", "rand", "rand_like", "randint", "randint_like"):
            return output
        if not isinstance(output, Tensor) or not output.ndim or len(output) != self.rows:
            return output
        if output.numel() == self.rows:
            return self._spread(name, output, args, kwargs)
        return output if "normal" not in name and "randn" not in name else self._noted(name, output, args)

    def _noted(self, name: str, output: Tensor, args: Any) -> Tensor:
        mean = args[0] if name == "normal" and args and isinstance(args[0], Tensor) else torch.zeros_like(output)
        self.normal.append((output - mean).detach().clone())
        if self.without != len(self.normal) - 1:
            return output
        return output.copy_(mean) if name == "normal_" else mean.clone()

    def _spread(self, name: str, output: Tensor, args: Any, kwargs: Any) -> Tensor:
        """One value out of each of as many equally likely parts as there are rows, in the order in which they were drawn."""
        ranks = output.flatten().argsort().argsort().double()
        within = torch.rand(self.rows, device=output.device, dtype=torch.float32)
        even = ((ranks + within) / self.rows).clamp(1e-7, 1 - 1e-7).view(output.shape)
        if name in ("rand", "rand_like"):
            return even.to(output)
        if name in ("randn", "randn_like"):
            quantiles: Tensor = torch.special.ndtri(even)
            return quantiles.to(output)
        if "randint" in name:
            given = [value for value in args if isinstance(value, int)]
            low = kwargs.get("low", given[0] if len(given) > 1 else 0)
            high = kwargs.get("high", given[-1] if given else None)
            if isinstance(low, int) and isinstance(high, int):
                return (low + (even * (high - low)).floor().clamp(max=high - low - 1)).to(output)
        return output


class _ReachedError(Exception):
    """Ends a training step once its network is called."""


class Call(NamedTuple):
    """A call of a part of the module."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class TrainingStep:
    """The training step of a copy of a module for one batch, run with chosen draws; inside ``isolated``.

    Args:
        module: The copy.
        batch: As the trainer passes it, on the module's device.
        rows: Number of rows of the batch.
        seed: Seeds all generators.
    """

    def __init__(self, module: Any, batch: Any, rows: int, seed: Callable[[int], None]) -> None:
        self.module, self.batch, self.rows, self.seed = module, batch, rows, seed
        signature = signature_of(module.training_step)
        names = [] if signature is None else list(signature.parameters)
        self._indices = (BATCH_INDEX,) if len(names) > 1 or signature is None else ()

    def run(self, seed: int, without: int | None = None) -> tuple[Tensor | None, list[Tensor]]:
        """Returns the loss of a training step with a seed, None where there is none, and the normal draws that it made.

        With manual optimization, it is the sum of the losses whose gradients the step computes.

        Args:
            seed: Of all generators.
            without: Number of the normal draw that is replaced by zeros.
        """
        self.seed(seed)
        # a step may change its batch
        batch = apply_to_collection(self.batch, Tensor, Tensor.clone)
        output: Any = None
        losses: list[Tensor] = []

        def note(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss)

        manual = replaced(self.module, note, "manual_backward")
        with suppress(_ReachedError), manual, _Draws(self.rows, without) as draws:
            output = self.module.training_step(batch, *self._indices)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        loss = torch.stack([part.sum() for part in losses]).sum() if losses else loss
        return (loss if isinstance(loss, Tensor) else None), draws.normal

    def calls(self, seed: int, may_fail: bool = False) -> tuple[list[Call], list[Tensor]]:
        """Returns all calls of parts of the module in a training step, and its normal draws.

        Args:
            seed: Of all generators.
            may_fail: Whether an error ends the step, as that of an optimizer may without gradients, and is not raised.
        """
        calls: list[Call] = []
        draws: list[Tensor] = []

        def note(path: str, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(Call(path, args, kwargs, output))

        with ExitStack() as stack:
            for path, part in self.module.named_modules():
                stack.callback(part.register_forward_hook(partial(note, path), with_kwargs=True).remove)
            with suppress(*((Exception,) if may_fail else ())):
                _, draws = self.run(seed)
        return calls, draws

    def entries(self, seed: int, ends: Callable[[Call], bool]) -> list[Call]:
        """Returns the calls of parts of the module, before what they call and without outputs; an error ends the step.

        Args:
            seed: Of all generators.
            ends: Returns whether the step ends at a call.
        """
        calls: list[Call] = []

        def note(path: str, part: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(Call(path, args, kwargs, None))
            if ends(calls[-1]):
                raise _ReachedError

        with ExitStack() as stack:
            for path, part in self.module.named_modules():
                stack.callback(part.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
            with suppress(Exception):
                self.run(seed)
        return calls

    def output(self, path: str, number: int, seed: int) -> Any:
        """Returns what a part returns at one of its calls in a training step, which ends there.

        Raises:
            ValueError: If the part is not called so often.
        """
        outputs: list[Any] = []

        def note(part: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            if len(outputs) > number:
                raise _ReachedError

        with ExitStack() as stack:
            stack.callback(self.module.get_submodule(path).register_forward_hook(note).remove)
            self.run(seed)
        if len(outputs) <= number:
            raise ValueError(f"self.{path} must be called in every training step, but one did not call it.")
        return outputs[number]

    def reach(self, path: str, seed: int, without: int | None = None) -> tuple[Call, list[Tensor]]:
        """Returns the first call of a part in a training step, which ends there, and the normal draws until then.

        Raises:
            ValueError: If the part is not called.
        """
        calls: list[Call] = []

        def reach(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(path, args, kwargs, None))
            raise _ReachedError

        with replaced(self.module.get_submodule(path), reach):
            _, draws = self.run(seed, without)
        if not calls:
            raise ValueError(f"self.{path} must be called in every training step, but one did not call it.")
        return calls[0], draws

    def gradient(self, path: str, seed: int, template: Any, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of a training step in which a part predicts what is given, and its gradient.

        Raises:
            ValueError: If the loss does not depend on the prediction.
        """
        given = prediction.clone().requires_grad_()
        old = tensor_like(template, given[:1], rows=None)
        if old is None:
            raise ValueError(f"self.{path} must predict {tuple(given.shape)}, as it did before.")
        # a learned variance
        rest = given.new_zeros(len(given), old.shape[1] - given.shape[1], *given.shape[2:])

        def predict(*args: Any, **kwargs: Any) -> Any:
            return _with(template, old, torch.cat([given, rest], 1))

        with torch.enable_grad(), replaced(self.module.get_submodule(path), predict):
            loss, _ = self.run(seed)
            if loss is None or not loss.requires_grad:
                raise ValueError(f"training_step must return a loss that depends on what self.{path} predicts.")
            [gradient] = torch.autograd.grad(loss.sum(), given, allow_unused=True)
        return loss.detach().sum(), torch.zeros_like(prediction) if gradient is None else gradient


@contextmanager
def replaced(part: nn.Module, function: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """Lets another function take the place of a method of a part of a copy."""
    own = vars(part)
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


# ---- what a network is given and returns ----


def prediction_in(output: Any, inputs: Tensor) -> Tensor:
    """Returns the prediction for noisy data (N, C, ...) in what a network returned; more channels are a variance.

    Raises:
        ValueError: If there is none.
    """
    found = tensor_like(output, inputs, len(inputs))
    if found is None:
        raise ValueError(f"a network must predict {tuple(inputs.shape)}, got {type(output).__name__}.")
    return found[:, : inputs.shape[1]]


def tensor_like(output: Any, inputs: Tensor, rows: int | None) -> Tensor | None:
    """The first tensor of an output that has the shape of the noisy data, or twice their channels, and a number of rows."""
    if isinstance(output, Tensor):
        c = inputs.shape[1]
        fits = output.ndim == inputs.ndim and output.shape[2:] == inputs.shape[2:] and rows in (None, len(output))
        return output if fits and output.is_floating_point() and output.shape[1] in (c, 2 * c) else None
    inner = output if isinstance(output, (tuple, list)) else ()
    if not inner:
        inner = list(output.values()) if isinstance(output, Mapping) else list(getattr(output, "__dict__", {}).values())
    return next((found for part in inner if (found := tensor_like(part, inputs, rows)) is not None), None)


def _with(output: Any, old: Tensor, new: Tensor) -> Any:
    """An output in which one tensor is another."""
    if output is old:
        return new
    if isinstance(output, (tuple, list)):
        parts = [_with(part, old, new) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, Tensor) or not (isinstance(output, Mapping) or hasattr(output, "__dict__")):
        return output
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        for key, value in output.items():
            if value is old:
                changed[key] = new
    for key, value in list(getattr(output, "__dict__", {}).items()):
        if value is old:
            setattr(changed, key, new)
    return changed


def _places(call: Call, draw: Tensor) -> Iterator[tuple[int | str, Tensor]]:
    """Yields the arguments that may be a draw added to data, perhaps beside conditions in more channels."""
    places: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == draw.ndim:
            fits = len(value) == len(draw) and value.shape[2:] == draw.shape[2:] and value.shape[1] >= draw.shape[1]
            if fits and tensor_like(call.output, draw, len(draw)) is not None:
                yield place, value[:, : draw.shape[1]]


def _noisy(call: Call, denoiser: Denoiser) -> Tensor:
    """The noisy data that a network was called with."""
    given: Tensor = call.args[denoiser.place] if isinstance(denoiser.place, int) else call.kwargs[denoiser.place]
    return given[:, : denoiser.channels]


def _times(call: Call, denoiser: Denoiser, levels: Tensor) -> Tensor | None:
    """The argument with one number for each row that rises or falls with the level of noise."""
    ranks = levels.argsort().argsort().double()
    for place, value in (*enumerate(call.args), *call.kwargs.items()):
        if place == denoiser.place or not isinstance(value, Tensor) or value.numel() != len(levels):
            continue
        times = value.detach().flatten().double()
        if float(times.std()) > 0:
            # rounded times of neighbours may be the same, so that ranks need not agree exactly
            correlation = torch.corrcoef(torch.stack([ranks, times.argsort().argsort().double()]))[0, 1]
            if abs(float(correlation)) > 0.99:
                return times
    return None


# ---- finding ----


def takes_times(module: nn.Module) -> bool:
    """Returns whether names say that a part of a module takes times, or is of a diffusion model, before anything runs.

    Generators of images of images are often U-Nets, so that names of classes say nothing beside a discriminator.
    """
    held = [value for part in (module, *module.children()) for value in vars(part).values()]
    named = any(KINDS.search(type(value).__name__) for value in (*module.modules(), *held))
    adversarial = is_adversarial(module)
    if named and not adversarial:
        return True
    for part in module.modules():
        signature = signature_of(part) if type(part).__module__.partition(".")[0] != "torch" else None
        names = [] if signature is None else list(signature.parameters)
        if len(names) > 1 and any((OF_GANS if adversarial else TIMES).fullmatch(name) for name in names):
            return True
    return False


def find_denoiser(step: TrainingStep, seed: int) -> tuple[Denoiser, Any]:
    """Finds the network that a training step gives noisy data to, and what it lets it predict.

    Returns:
        Where it is, and what it returned once, whose structure predictions have.

    Raises:
        ValueError: If there is none, with the reason.
    """
    try:
        calls, draws = step.calls(seed)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            "training_step must run without gradients, but it takes some itself, as losses of sliced score matching and "
            f"gradient penalties do. {TO_FIX}"
        ) from error
    # what wraps a network comes before what it wraps
    calls.sort(key=lambda call: len(call.path.split(".")) if call.path else 0)
    for call in calls:
        for number, draw in enumerate(draws):
            for place, noisy in _places(call, draw):
                found = Denoiser(call.path, place, number, draw.shape[1])
                if _is_noised(step, found, seed, noisy, draw):
                    return _settled(step, found, seed, call.output), call.output
                if _is_matched(noisy, draw):
                    return _settled(step, found._replace(is_paired=False), seed, call.output), call.output
    for call in calls:
        for number, draw in enumerate(draws):
            if reason := _other_noise(step, call, number, draw, seed):
                name = Denoiser(call.path, 0, number, draw.shape[1]).name
                raise ValueError(
                    f"training_step must give {name} data plus a multiple of a normal draw, but {reason}. {TO_FIX}"
                )
    raise ValueError(
        "training_step must add normal noise of several levels to data and let a part of the module predict from them, "
        f"but no such part was found. To fix this, pass {LOSS_ADVICE}."
    )


def _other_noise(step: TrainingStep, call: Call, number: int, draw: Tensor, seed: int) -> str:
    """How a part that returns data of the shape of a draw is given this draw in another way; empty where it is not."""
    if tensor_like(call.output, draw, len(draw)) is None:
        return ""
    without, _ = step.reach(call.path, seed, number)
    width = draw.shape[1]
    given, others = ((*one.args, *one.kwargs.values()) for one in (call, without))
    for value, other in zip(given, others, strict=False):
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.shape != other.shape:
            continue
        if value.ndim != draw.ndim or value.shape[2:] != draw.shape[2:] or value.shape[1] < width:
            continue
        noise = (value - other).detach()
        noisy = noise.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
        if not noisy:
            continue
        start = noisy[0]
        if start and _is_multiple(noise[:, start : start + width], draw):
            return "they are joined with other data, which come first"
        noise = noise[:, :width]
        if not noise.all() and _is_multiple(noise, draw * (noise != 0)):
            return "only a part of the data is noisy, as behind a mask"
        # without times beside it, this may be any layer behind others
        if not start and len(given) > 1 and not _is_multiple(noise, draw):
            return "the draw is changed before, as where its mean is subtracted or its rows are paired with others"
    return ""


def _is_multiple(rows: Tensor, of: Tensor) -> bool:
    return rows.shape == of.shape and float(_multiple(rows, of)[1].double().mean()) >= LEAST_EXACT


def _is_noised(step: TrainingStep, found: Denoiser, seed: int, noisy: Tensor, draw: Tensor) -> bool:
    """Whether data have multiples of a draw in them, by leaving it out."""
    without, _ = step.reach(found.path, seed, found.draw)
    scale, is_exact = _multiple(noisy - _noisy(without, found), draw)
    return float(is_exact.double().mean()) >= LEAST_EXACT and bool(scale.std() > LEAST_SPREAD * scale.abs().mean())


def _multiple(rows: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """By which factor (N,) rows are multiples of others, and whether (N,) they are."""
    x, y = rows.detach().flatten(1).double(), of.flatten(1).double()
    factor = (x * y).sum(1) / y.square().sum(1).clamp(min=1e-30)
    left = (x - factor[:, None] * y).norm(dim=1)
    # where there is hardly any noise, rounding is as large
    return factor, left <= EXACT * x.norm(dim=1) + 1e-5 * y.norm(dim=1)


def _is_matched(noisy: Tensor, draw: Tensor) -> bool:
    """Whether data have draws of other rows in them, as after optimal transport."""
    x, y = (nn.functional.normalize(rows.detach().flatten(1).double(), dim=1) for rows in (noisy, draw))
    cosines, rows = (x @ y.T).max(1)
    # of unrelated draws in D dimensions, cosines are about 1 / sqrt(D)
    certain = cosines > 5 / math.sqrt(draw[0].numel())
    others = rows != torch.arange(len(rows), device=rows.device)
    return float(certain.double().mean()) > LEAST_MATCHED and float(others[certain].double().mean()) > 0.5


class _Parts(NamedTuple):
    """What noisy data are made of."""

    call: Call
    noisy: Tensor
    clean: Tensor
    """(N, ...) the noisy data without their noise: data times the scale of the signal."""
    noise: Tensor
    """(N, ...) the draw."""
    scale: Tensor
    """(N,) of the noise."""


def _parts(step: TrainingStep, found: Denoiser, seed: int) -> _Parts:
    """What the noisy data of one training step are made of; of unpaired noise, the scale is not known before the target."""
    call, draws = step.reach(found.path, seed)
    noisy, noise = _noisy(call, found).detach().clone(), draws[found.draw]
    if not found.is_paired:
        unknown = torch.full((len(noisy),), math.nan, dtype=torch.float64, device=noisy.device)
        return _Parts(call, noisy, torch.full_like(noisy, math.nan), noise, unknown)
    without, _ = step.reach(found.path, seed, found.draw)
    clean = _noisy(without, found).detach().clone()
    return _Parts(call, noisy, clean, noise, _multiple(noisy - clean, noise)[0].abs())


def _settled(step: TrainingStep, found: Denoiser, seed: int, template: Any) -> Denoiser:
    """Finds the schedule and the prediction.

    Raises:
        ValueError: If no target is found.
    """
    if not found.is_paired:
        recorded = record(step, found, seed, template)
        if float(recorded.levels.isfinite().double().mean()) < LEAST_EXACT:
            raise ValueError(
                f"training_step must mix data and noise in a way that is known, but {found.name} gets others. {TO_FIX}"
            )
        return found._replace(schedule="straight", prediction="the velocity of the flow")
    first, second = (_parts(step, found, number) for number in (seed, seed + SECOND_SEED))
    # the same data at two levels of noise differ by the scale of the signal
    ratio = (first.clean.flatten(1).norm(dim=1) / second.clean.flatten(1).norm(dim=1)).double()
    errors = {name: _error_of(scale_of, first, second, ratio) for name, scale_of in SCHEDULES.items()}
    best = min(errors, key=lambda name: errors[name])
    found = found._replace(schedule=best if errors[best] < MOST_ERROR else "")
    targets, weights = _targets(step, found, seed, template, first)
    for name, candidate in _candidates(first, found).items():
        error = (targets - candidate).flatten(1).norm(dim=1) / candidate.flatten(1).norm(dim=1)
        known = error[(weights != 0) & error.isfinite()]
        if len(known) and float((known < SAME_TARGET).double().mean()) >= LEAST_EXACT:
            return found._replace(prediction=name)
    return found


def _error_of(scale_of: Callable[[Tensor], Tensor], first: _Parts, second: _Parts, ratio: Tensor) -> float:
    """How far the scales of the signal in two training steps are from what a schedule says; the median of the logarithms."""
    a, b = scale_of(first.scale), scale_of(second.scale)
    error = (ratio.log() - (a / b).log()).abs()[(a > LEAST_SIGNAL) & (b > LEAST_SIGNAL)]
    error = error[error.isfinite()]
    return float(error.median()) if len(error) > 1 else math.inf


def _signal(parts: _Parts, found: Denoiser) -> Tensor:
    """The scale (N,) of the signal; where no schedule fits, the size of each row's own signal."""
    if found.schedule:
        return SCHEDULES[found.schedule](parts.scale)
    return parts.clean.flatten(1).double().square().mean(1).sqrt()


def _candidates(parts: _Parts, found: Denoiser) -> dict[str, Tensor]:
    """What a network may be asked to predict, by name; (N, ...) each."""
    shape = (-1, *[1] * (parts.noisy.ndim - 1))
    a, b = (scale.view(shape).to(parts.noisy) for scale in (_signal(parts, found), parts.scale))
    noise = parts.noise
    if not found.schedule:
        return {"the noise": noise}
    data = parts.clean / a.clamp(min=SMALLEST)
    return {
        "the noise": noise,
        "the data": data,
        "the velocity": a * noise - b * data,
        "the velocity of the flow": data - noise,
        "the velocity of the flow to noise": noise - data,
        "the score": -noise / b.clamp(min=SMALLEST),
    }


def _targets(step: TrainingStep, found: Denoiser, seed: int, template: Any, parts: _Parts) -> tuple[Tensor, Tensor]:
    """What the loss of a training step compares predictions with (N, ...), and the weights (N,) of the rows.

    The gradient of a weighted squared error is ``k (prediction - target)``, of which two predictions give k and the target.
    For other losses, the target is the candidate at which the loss is least.

    Raises:
        ValueError: If neither is found.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = [
        torch.randn(parts.noisy.shape, generator=generator, dtype=torch.float32).to(parts.noisy) for _ in range(2)
    ]
    zero = torch.zeros_like(parts.noisy)
    _, at_zero = step.gradient(found.path, seed, template, zero)
    slopes = [step.gradient(found.path, seed, template, probe)[1] - at_zero for probe in probes]
    factors = [_multiple(slope, probe) for slope, probe in zip(slopes, probes, strict=True)]
    weights = factors[0][0]
    largest = float(weights.abs().max())
    is_linear = all(float(is_exact.double().mean()) >= LEAST_EXACT for _, is_exact in factors)
    if largest > 0 and is_linear and float((factors[1][0] - weights).abs().max()) < 0.01 * largest:
        weights = weights.where(weights.abs() > NO_WEIGHT * largest, 0.0)
        shape = (-1, *[1] * (zero.ndim - 1))
        targets = -at_zero / weights.where(weights != 0, 1.0).view(shape).to(at_zero)
        # without a weight, the usual target is the best guess
        guess = _candidates(parts, found).get(found.prediction, torch.full_like(targets, math.nan))
        return torch.where((weights != 0).view(shape), targets, guess.to(targets)), weights
    losses = {
        name: float(step.gradient(found.path, seed, template, candidate)[0])
        for name, candidate in _candidates(parts, found).items()
    }
    best, second = sorted(losses, key=lambda name: losses[name])[:2] if len(losses) > 1 else ("", "")
    if not best or not losses[best] < LEAST_LOSS * losses[second]:
        raise ValueError(
            f"training_step must compare what {found.name} predicts with a target that can be found. {TO_FIX}"
        )
    return _candidates(parts, found)[best], torch.full_like(parts.scale, math.nan)


# ---- recording ----


def record(step: TrainingStep, found: Denoiser, seed: int, template: Any) -> NoisyBatch:
    """Records what the network is given in one training step and what it should predict; inside ``isolated``.

    Raises:
        ValueError: If the step is another one than the one by which the network was found.
    """
    parts = _parts(step, found, seed)
    targets, weights = _targets(step, found, seed, template, parts)
    if found.is_paired:
        signal, scale = _signal(parts, found), parts.scale
    else:
        signal, scale = _on_line(parts, targets)
    levels = 2 * (scale.clamp(min=SMALLEST) / signal.clamp(min=SMALLEST)).log()
    weights = weights / weights.mean()
    args, kwargs = apply_to_collection((parts.call.args, parts.call.kwargs), Tensor, lambda x: x.detach().clone())
    times = _times(parts.call, found, levels)
    return NoisyBatch(args, kwargs, parts.noisy, targets.detach(), levels, times, weights)


def _on_line(parts: _Parts, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (N,) of signal and noise on lines between any draw and data, whose velocities are the targets; else nan."""
    x, e, v = (rows.flatten(1).double() for rows in (parts.noisy, parts.noise, targets))
    # noisy = noise + time * velocity, for the one draw (N) out of all (M) that is on the line
    speeds = v.square().sum(1, keepdim=True).clamp(min=1e-30)
    times = ((x * v).sum(1, keepdim=True) - v @ e.T) / speeds  # (N, M)
    left = torch.cdist(x, e).square() - times.square() * speeds
    nearest = left.argmin(1, keepdim=True)
    along, left = (values.gather(1, nearest)[:, 0] for values in (times, left))
    # velocities may also point to the noise
    along = along.abs()
    is_line = (left <= SAME_TARGET * x.square().sum(1)) & (along <= 1 + EXACT)
    return along.where(is_line, math.nan), (1 - along).where(is_line, math.nan)


def predict(module: nn.Module, found: Denoiser, batch: NoisyBatch) -> Tensor:
    """Returns what the network predicts (N, ...) for recorded inputs; inside ``isolated``."""
    output = module.get_submodule(found.path)(*batch.args, **batch.kwargs)
    return prediction_in(output, batch.inputs)
