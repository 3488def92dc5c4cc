"""Monitors how a quantizer uses its codebook while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import Observation, Series, divided
from lightning_gendiag.diagnostics.codebook_usage import plots
from lightning_gendiag.diagnostics.codebook_usage.functional import MAX_CODEBOOK_TAGS, CodebookUsageResult
from lightning_gendiag.diagnostics.codebook_usage.metric import CodebookUsage
from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model.quantizers import CodebookReader, integers_in
from lightning_gendiag.model.view import CODES_ADVICE
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

CHUNK = 128
"""Largest number of images that a callable of the user's gets at a time."""

REMEMBERED = 1 << 16
"""Largest number of positions of a codebook whose codes are kept on a process, to see at the next evaluation which changed."""

DECAY = 0.8
"""From one evaluation to the next, the share by which a code is remembered falls to this part, unless it is used as much."""

FALLEN = 3
"""Number of evaluations in a row in which a codebook that was in use must have few codes in use before an alarm."""

NAMED = 6
"""Largest number of codes that an alarm names."""

MIN_STD = 0.05
"""Of the logarithm of perplexity: a twentieth more or fewer codes is never news."""

MIN_DELTA = math.log(2)
"""A perplexity that falls to half is news; healthy codebooks lose a third of theirs and more while their encoder learns."""

SERIES: dict[str, Any] = {"quantity": "perplexity", "event": "collapsed", "min_std": MIN_STD, "min_delta": MIN_DELTA}
CODEBOOK = Series("codebook", "component", **SERIES)
WHOLE = Series("the codebook", "aggregate", **SERIES)
USAGE = Series("usage", "record", "fraction of codes in use")
UNUSED = Series("codes in use", "rule", "perplexity", progress=0.25)
"""Of the rule that more than a few codes must be in use, unless their number still rises."""


class CodebookUsageMonitor(Monitor[CodebookUsage, CodebookUsageResult]):
    """Monitors :class:`CodebookUsage` of a module's quantizers on the reference images.

    Codes are read while real images pass through the encoder of the isolated copy, or, where that does not quantize, through
    what reconstructs, which is done for every second image. Quantizers are found by their names and codebooks:
    integers that they return, the integers with which an embedding is called, or the vectors of the codebook in their output.

    A codebook collapses when its perplexity falls from its level to less than half. It has also collapsed when it carries
    less than a third of its bits, and no more codes are in use than half of its bits name, for ``patience`` evaluations in
    a row; for three where other codes were in use before.

    Args:
        indices: What gives the codes (N, ...) of images as integers, a list of them for several codebooks: a callable
            ``(module, images)``, the name of a method, or the path of a quantizer in the module; by default all quantizers
            that are found.
        num_codes: Number of codes, or of each codebook; by default that of the quantizers that are found.
        patience: Number of evaluations with few codes in use after which a codebook counts as collapsed.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = CodebookUsageMonitor(lambda module, images: module.tokens(images), num_codes=512)
    """

    name = "codebook"
    metric_class = CodebookUsage
    needs = ()
    _reader: CodebookReader | None = None

    def __init__(
        self,
        indices: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        num_codes: int | list[int] | None = None,
        patience: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        if num_codes is not None:
            CodebookUsage(num_codes)
        self.indices, self.num_codes, self.patience = indices, num_codes, patience
        self._codes: dict[int, list[Tensor]] = {}
        self._recent: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Forgets the codes and shares of earlier evaluations as well."""
        super().reset()
        self._reader, self._codes, self._recent = None, {}, {}

    def shares(self) -> str:
        """What the encoder gives for real images, where that is what quantizes."""
        return "encoded" if self._reader is not None and self._reader.need == "encode" else self.name

    # ---- where codes come from ----

    def check(self, view: ModelView) -> None:
        """Looks for a quantizer, and for the codes that it chooses for the first real images."""
        if self._given(view) is None:
            self._reader = self._found(view)
        elif view.real.example is not None:
            self._sizes(view)

    def _found(self, view: ModelView) -> CodebookReader | None:
        size = self.num_codes if isinstance(self.num_codes, int) else None
        return view.find_codebooks(self.indices if isinstance(self.indices, str) else "", size)

    def _given(self, view: ModelView) -> Callable[[Tensor], Any] | None:
        """What the user gave to call with images; None where codes are read from quantizers."""
        if not isinstance(self.indices, str):
            return view.resolve_named(self.indices, "indices")
        target: Any = view.module
        for part in self.indices.split("."):
            target = getattr(target, part, None)
        if isinstance(target, nn.Module):
            return None
        if not callable(target):
            return view.resolve_named(self.indices, "indices", "method or a quantizer")
        return lambda images: target(view.as_input(images))

    def _sizes(self, view: ModelView) -> list[int]:
        """Number of codes of each codebook."""
        given = self._given(view)
        if given is None:
            self._reader = self._reader or self._found(view)
            assert self._reader is not None
            return self._reader.sizes
        if self.num_codes is None:
            raise ValueError(
                "num_codes must be given where indices is a callable or a method, got None. "
                "To fix this, pass CodebookUsageMonitor(indices, num_codes=512)."
            )
        sizes = [self.num_codes] if isinstance(self.num_codes, int) else self.num_codes
        example = view.real.example if view.real.images is None else view.reference.images[:2]
        assert example is not None
        with view.isolated(exact=True):
            CodebookUsage(sizes).to(view.device).update(self._called(given, view, example, len(sizes)))
        return list(sizes)

    def _called(self, given: Callable[[Tensor], Any], view: ModelView, images: Tensor, number: int) -> list[Tensor]:
        """Codes of some images by what the user gave; inside ``isolated``."""
        codes = list(integers_in(given(view.as_input(as_data(images))), len(images)))
        if number > 1 and len(codes) == 1 and codes[0].ndim > 1 and codes[0].shape[-1] == number:
            codes = list(codes[0].unbind(-1))
        if len(codes) < number:
            raise ValueError(
                f"indices must return integers ({len(images)}, ...) for each of {number} codebooks, got {len(codes)} such "
                f"tensors. To fix this, pass {CODES_ADVICE} with the codes of these images."
            )
        return [one.reshape(len(images), -1).int() for one in codes[:number]]

    # ---- an evaluation ----

    def build_metric(self, view: ModelView) -> CodebookUsage:
        """Creates a metric for the codebooks that are found."""
        own = view.on_all(lambda: self._sizes(view), RuntimeError("codes could not be read on another process"))
        # what is read may be chosen by the images, which are others on each process
        sizes, self._reader = view.broadcast(lambda: (own, self._reader))
        return CodebookUsage(sizes)

    def update(self, view: ModelView) -> None:
        """Adds the codes of this process's real images, and compares them with those of the evaluation before."""
        codes, step = self._codes_of(view), self.last_step or 0
        # an evaluation of the same step, such as a first one that measures the time, takes the place of the one before
        earlier = [at for at in self._codes if at < step]
        before = self._codes[max(earlier)] if earlier else None
        kept = [one[: max(1, REMEMBERED // max(one.shape[1], 1))].cpu() for one in codes]
        if before is not None and [one.shape for one in before] != [one.shape for one in kept]:
            before = None
        self.metric.update(codes, before)
        self._codes = {max(earlier): self._codes[max(earlier)]} if earlier else {}
        self._codes[step] = kept

    def _codes_of(self, view: ModelView) -> list[Tensor]:
        given, number = self._given(view), len(self.metric.num_codes)
        if given is None:
            assert self._reader is not None
            return view.codes(self._reader)
        images, parts = view.local_reference().images, []
        with view.isolated(exact=True):
            # every process calls equally often, since what is called may communicate
            for start in range(0, math.ceil(len(view.reference.images) / view.world_size), CHUNK):
                some = images[start : start + CHUNK]
                codes = self._called(given, view, some if len(some) else view.reference.images[:1], number)
                parts += [codes] if len(some) else []
        return [torch.cat(one) for one in zip(*parts, strict=True)] if parts else [torch.empty(0, 1).int()] * number

    def postprocess(self, view: ModelView, result: CodebookUsageResult) -> CodebookUsageResult:
        """Adds the share that each code had a short time before."""
        step = self.last_step or 0
        earlier = [at for at in self._recent if at < step]
        now = result.shares.nan_to_num(0.0).float().cpu()
        recent = self._recent[max(earlier)] if earlier else torch.zeros_like(now)
        recent = recent if recent.shape == now.shape else torch.zeros_like(now)
        self._recent = {at: self._recent[at] for at in earlier[-1:]} | {step: now.maximum(DECAY * recent)}
        return CodebookUsageResult(*(value.cpu() for value in result))._replace(recent=recent)

    def observations(self, result: CodebookUsageResult) -> list[Observation]:
        """Perplexity and usage of each codebook and of all, and an alarm where few codes are in use."""
        perplexities, codebooks = result.perplexity.tolist(), range(len(result.sizes))
        scalars, whole = result.scalars(), whole_of(result)
        mean, usage = float(scalars["perplexity"]), float(scalars["usage"])
        died = [died_words(result.died_codes(q)) for q in codebooks]
        names = [f"codebook {q}" for q in codebooks]
        alone = len(codebooks) == 1
        label = f"{whole.name}{died[0]}" if alone else whole.name
        observations = [
            Observation(whole, mean, severity(mean), label),
            Observation(USAGE, usage, 1 - usage),
            self._rule(result, codebooks, replace(UNUSED, label=whole.name, stop="alone"), mean),
        ]
        for q, value in enumerate(() if alone else perplexities):
            series = replace(UNUSED.numbered(q, f"codes of {names[q]} in use"), label=names[q], stop="never")
            observations.append(Observation(CODEBOOK.numbered(q), value, severity(value), names[q] + died[q]))
            observations.append(self._rule(result, [q], series, value))
        return observations

    def _rule(
        self, result: CodebookUsageResult, codebooks: Sequence[int], series: Series, perplexity: float
    ) -> Observation:
        """Whether of none of these codebooks more than a few codes are in use."""
        fallen = bool(result.died[list(codebooks)].any())
        sizes, seen = (int(values[list(codebooks)].sum()) for values in (result.sizes, result.seen))
        used = [str(code) for code in result.most_used(codebooks[0])]
        carried = f", nine tenths of the time {listed(used, NAMED)}," if len(codebooks) == 1 else ""
        died = died_words(result.died_codes(codebooks[0])) if len(codebooks) == 1 else ""
        message = (
            f"{series.label}{died} collapsed: perplexity is {perplexity:.2f} and {seen:,} of {sizes:,} codes have been in "
            f"use{carried} for {{evaluations}} evaluations"
        )
        holds = bool(result.is_collapsed[list(codebooks)].all())
        confirmed = replace(series, confirm=min(self.patience, FALLEN) if fallen else self.patience)
        return Observation(confirmed, perplexity, math.inf if holds else 0.0, series.label + died, message)

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each codebook's part of the drop of the mean of their entropies."""
        return divided({name: math.log(value) - math.log(after[name]) for name, value in before.items()})

    # ---- pictures ----

    def page_setup(self) -> Record:
        """The number of codes of each codebook, and which of them each row of the tab is about."""
        sizes = list(self.metric.num_codes)
        return Record({"sizes": sizes, "rows": [list(bins) for bins in plots.page_bins(sizes)]})

    def page_numbers(self, result: CodebookUsageResult) -> dict[str, Any]:
        """The use of the codes in each row, and how many of each codebook were chosen."""
        return {"use": plots.page_use(result), "seen": result.seen[: plots.PAGE_ROWS].tolist()}

    def page_frame(self, result: CodebookUsageResult) -> Record:
        """The use of all codes, and the first of those that died."""
        group, arrays = plots.page_cells(result)
        died = [[q, code] for q in range(len(result.sizes)) for code in result.died_codes(q)]
        fields = {"codes": group, "died": died[:NAMED], "num_died": len(died), "dead": int(result.dead.sum())}
        return Record(fields, arrays)

    def log_plots(self, result: CodebookUsageResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        context.logger.log_chart("perplexity", "Multiline", ["perplexity"])
        context.logger.log_chart("codes in use", "Multiline", ["usage", "estimated_usage", "nine_tenths"])
        if 1 < len(result.sizes) <= MAX_CODEBOOK_TAGS:
            names = [f"perplexity_{q}" for q in range(len(result.sizes))]
            context.logger.log_chart("perplexity of every codebook", "Multiline", names)
        context.logger.log_image(
            "panel", plots.panel(result, context.curves[whole_of(result).name], context.occasion())
        )

    def log_alarm(self, alarm: Alarm, result: CodebookUsageResult, context: PlotContext) -> None:
        """Logs the panel."""
        picture = plots.panel(result, context.curves[whole_of(result).name], context.occasion(alarm))
        context.logger.log_image("picture", picture)

    # ---- checkpoints ----

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the recent share of each code."""
        return {"recent": dict(self._recent)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._recent = dict(state["recent"])


def whole_of(result: CodebookUsageResult) -> Series:
    """Returns the series of all codebooks together."""
    return WHOLE if len(result.sizes) == 1 else replace(WHOLE, name="the codebooks")


def severity(perplexity: float) -> float:
    """Returns the logarithm by which a perplexity lies below 1, which is negative; nan stays nan."""
    return -math.log(perplexity) if perplexity > 0 else math.nan


def died_words(codes: Sequence[int]) -> str:
    """Returns the end of a label that names codes that died; nothing where none did.

    Example:
        >>> "the codebook" + died_words([3, 5])
        'the codebook, of which codes 3, 5 died,'
    """
    if not codes:
        return ""
    return f", of which code{'s' * (len(codes) > 1)} {listed([str(code) for code in codes], NAMED)} died,"
