"""The base of every diagnostic's metric: states that survive idle ranks, results that keep their shape, a plot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors


class Result(Protocol):
    """What a diagnostic's ``compute`` returns: a NamedTuple of tensors that can name its numbers."""

    def scalars(self) -> dict[str, Tensor]:
        """Names without prefix to () tensors; what is logged."""
        ...


class _Whole:
    """A result that torchmetrics passes on untouched; it would squeeze tensors of one element."""

    def __init__(self, value: Any) -> None:
        self.value = value


_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


class Diagnostic(Metric):
    """A ``torchmetrics.Metric`` for rows and sums.

    Beside what torchmetrics does: ranks that saw nothing take part in a sync, results keep their shapes, and ``plot``
    draws what the result's ``scalars()`` name. List states (``"cat"``) hold rows: tensors (n, ...) of one shape and
    dtype. ``compute`` must be a pure function of the states: no draws, no collectives.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None
    plotted: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the scalars that ``plot`` draws; all of them where empty."""

    def rows(self, state: str) -> Tensor:
        """The rows of a list state as one tensor; (0,) where there are none."""
        held = getattr(self, state)
        if isinstance(held, Tensor):
            return held
        return torch.cat(held) if held else torch.empty(0, device=self.device)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        for state, reduction in self._reductions.items():
            if reduction is dim_zero_cat:
                self._type_rows(state, dist_sync_fn, group)
            elif reduction is dim_zero_sum and 1 in self._defaults[state].shape:  # type: ignore[union-attr]
                self._size_sums(state, dist_sync_fn, group)
        super()._sync_dist(dist_sync_fn, process_group)

    def _type_rows(self, state: str, gather: Callable[..., Any], group: Any) -> None:
        """Give this rank's rows of a state the shape and dtype that the other ranks have."""
        held = self.rows(state)
        signature = [_DTYPES.index(held.dtype), *held.shape[1:]] if held.ndim > 1 or len(held) else [-1]
        local = torch.full((8,), -1, dtype=torch.long, device=self.device)
        local[: len(signature)] = torch.tensor(signature)
        for other in gather(local, group=group):
            dtype, *shape = other.tolist()
            if dtype >= 0 and signature == [-1]:
                shape = [size for size in shape if size >= 0]
                held = torch.empty(0, *shape, dtype=_DTYPES[dtype], device=self.device)
                break
        setattr(self, state, [held])

    def _size_sums(self, state: str, gather: Callable[..., Any], group: Any) -> None:
        """Give this rank's sums, whose axes of one entry grow with the first rows, the size that other ranks have."""
        held = getattr(self, state)
        sizes = torch.stack(gather(torch.tensor(held.shape, device=self.device), group=group)).amax(0)
        setattr(self, state, held.expand(*sizes.tolist()).contiguous())

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(lambda: _Whole(compute()))

        @functools.wraps(compute)
        def whole() -> Any:
            return wrapped().value

        return whole

    def plot(self, val: Result | Sequence[Result] | None = None, ax: Any = None) -> Any:
        """Draw one result as bars, or a sequence of results as curves.

        Needs matplotlib, the extra ``lightning_gendiag[plot]``.

        Args:
            val: a result or several in order of time; by default ``self.compute()``.
            ax: matplotlib axes to draw into.

        Returns:
            ``(figure, axes)``, as torchmetrics' metrics do.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModuleNotFoundError("plot needs matplotlib: pip install 'lightning_gendiag[plot]'") from error
        results = [self.compute()] if val is None else [val] if hasattr(val, "scalars") else list(val)
        series = [
            {name: float(value) for name, value in result.scalars().items() if name.startswith(self.plotted or "")}
            for result in results
        ]
        figure = Figure() if ax is None else ax.figure
        ax = figure.add_subplot() if ax is None else ax
        names = list(series[0])
        if len(series) == 1:
            ax.barh(names[::-1], [series[0][name] for name in names[::-1]])
        else:
            for name in names:
                ax.plot([step[name] for step in series], label=name, marker=".")
            ax.set_xlabel("evaluation")
            ax.legend()
        ax.set_title(type(self).__name__)
        return figure, ax


class Reservoir(Diagnostic):
    """Rows with labels, at most so many of them: a fair choice that depends on the rows alone.

    Which are kept is decided by a seeded hash of each row, so it is the same choice for any order, batch size and number
    of processes.

    Args:
        max_rows: bound on the rows kept, over all processes; None keeps all.
        seed: of the choice.

    Raises:
        ValueError: if the bound is below 2.
    """

    latents: list[Tensor]
    labels: list[Tensor]

    def __init__(self, *, max_rows: int | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_rows is not None and max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, got {max_rows}.")
        self.max_rows, self.seed = max_rows, seed
        self.add_state("latents", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def keep(self, latents: Tensor, labels: Tensor) -> None:
        """Add rows (N, D) and labels (N,), and let go of what cannot be among those chosen.

        Raises:
            ValueError: if rows have another length than before.
        """
        if self.latents and self.latents[0].shape[1:] != latents.shape[1:]:
            raise ValueError(f"latents must be (N, {self.latents[0].shape[1]}) as before, got {tuple(latents.shape)}.")
        self.latents.append(latents.detach())
        self.labels.append(labels.detach().long())
        if self.max_rows is not None and sum(len(rows) for rows in self.latents) > 2 * self.max_rows:
            rows, labels = self.kept()
            self.latents, self.labels = [rows], [labels]

    def kept(self) -> tuple[Tensor, Tensor]:
        """Rows (N, D) and labels (N,) in an order that depends on the rows alone; (0, 1) and (0,) where there are none."""
        latents, labels = self.rows("latents"), self.rows("labels")
        if len(labels) == 0:
            return torch.zeros(0, 1, device=self.device), torch.zeros(0, dtype=torch.long, device=self.device)
        order = _row_keys(latents, labels, self.seed).argsort(stable=True)[: self.max_rows]
        return latents[order], labels[order]


def _row_keys(latents: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(N,) int64 hashes of rows: exact integer arithmetic, so that a row has one key wherever it is met."""
    wide = latents.double()
    bits = (wide + 0.0).view(torch.int64)  # -0.0 and 0.0 are one number
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (latents.shape[1] + 1,), generator=generator).to(bits.device) * 2 + 1
    key = (bits * odd[:-1]).sum(1) + labels * odd[-1]
    for shift in (33, 29, 32):
        # mixes high bits into low ones, as SplitMix does; products wrap around
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * -49064778989728563
    return key
