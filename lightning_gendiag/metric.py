"""Base classes of all metrics: states that survive idle processes, results that keep their shapes, and plots."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from lightning_gendiag.functional.results import Result as Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Gather = Callable[..., list[Tensor]]


class ScalarInfo(NamedTuple):
    """The meaning of a scalar, declared once for tables, panels and documentation."""

    description: str
    """One sentence that says what the scalar measures."""
    unit: str = ""
    """The unit, empty for counts, fractions and other numbers without one."""
    higher_is_better: bool | None = None
    """Whether larger values are better; None where neither direction is."""
    optional: bool = False
    """Whether the scalar is logged under a condition only, such as with classes, labels or a classifier."""


def more_is_better(description: str, unit: str = "", optional: bool = False) -> ScalarInfo:
    """Returns the meaning of a scalar whose larger values are better."""
    return ScalarInfo(description, unit, True, optional)


def less_is_better(description: str, unit: str = "", optional: bool = False) -> ScalarInfo:
    """Returns the meaning of a scalar whose smaller values are better."""
    return ScalarInfo(description, unit, False, optional)


class _Untouched:
    """Carries a result past torchmetrics, which would squeeze tensors of one element."""

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
    """A ``torchmetrics.Metric`` whose states are rows and sums, and whose result is a named tuple of tensors.

    It adds to torchmetrics:

    - Processes that have seen no data take part in a synchronization.
    - Results keep their shapes, can be passed to ``self.log_dict``, and never change when the metric is updated later.
    - ``forward`` leaves all accumulated data in place where the batch is invalid.
    - Sums stay in float64 and integers stay integers when the metric, or a module that holds it, is cast to another type.
    - ``MetricCollection`` shares states only between metrics with the same arguments, see :meth:`add_configuration`.

    List states (``"cat"``) hold rows: tensors (n, ...) of one shape and type. ``compute`` must be a pure function of the
    states, without collectives and without the global random generators.

    Args:
        kwargs: arguments of torchmetrics' ``Metric``.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {}
    """What each scalar of a result means. A name with a number has a placeholder, such as ``"region_{r}"``."""
    plotted: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the scalars that ``plot`` draws; empty for all of them."""
    configuration: Tensor
    """(8,) numbers in [0, 1) that depend on the class and its arguments; see :meth:`add_configuration`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._arguments: dict[str, str] = {}
        self.add_configuration(compute_on_cpu=self.compute_on_cpu)

    def add_configuration(self, **arguments: object) -> None:
        """Declares arguments that change ``update`` or ``compute``, so that metrics that differ in them share no state.

        ``MetricCollection`` gives one state to all metrics whose states agree after the first update, and does not compare
        their arguments. The state ``configuration`` is a digest of the class and of all arguments declared so far.

        Args:
            **arguments: tensors, sequences, numbers, strings or None, by name.
        """
        self._arguments |= {name: _canonical(value) for name, value in arguments.items()}
        owner = f"{type(self).__module__}.{type(self).__qualname__}"
        digest = hashlib.sha256(repr((owner, sorted(self._arguments.items()))).encode()).digest()
        numbers = [int.from_bytes(digest[start : start + 4], "big") / 2**32 for start in range(0, len(digest), 4)]
        self.add_state("configuration", default=torch.tensor(numbers, dtype=torch.float64), dist_reduce_fx="max")

    def add_sums(self, **shapes: tuple[int, ...]) -> None:
        """Adds states that are sums in float64 over all batches and processes, given their shapes by name."""
        for name, shape in shapes.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, **values: Tensor | int) -> None:
        """Adds values to sums, by name."""
        for name, value in values.items():
            # a new tensor, since metrics of one compute group hold the same one
            setattr(self, name, getattr(self, name) + value)

    def rows(self, state: str) -> Tensor:
        """Returns the rows of a list state as one tensor (N, ...), or (0,) where there are none."""
        held: Tensor | list[Tensor] = getattr(self, state)
        if isinstance(held, Tensor):
            return held
        return held[0] if len(held) == 1 else torch.cat(held) if held else torch.empty(0, device=self.device)

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch as ``update`` does, and returns the result of this batch alone.

        The batch is not synchronized across processes unless ``dist_sync_on_step=True``. Numbers for which the batch has
        no data are nan, such as comparisons where it holds real or generated images only.

        Args:
            *args: arguments of ``update``.
            **kwargs: keyword arguments of ``update``.

        Returns:
            What ``compute`` returns for the batch.

        Raises:
            TorchMetricsUserError: if the metric is synchronized.
        """
        if self._is_synced:
            raise TorchMetricsUserError("The metric must not be synced in forward. To fix this, call unsync() first.")
        for name, state in self.metric_state.items():
            # metrics of one compute group hold the same objects, and each of them adds the batch
            setattr(self, name, state.clone() if isinstance(state, Tensor) else list(state))
        self.update(*args, **kwargs)
        states, count = self.metric_state, self._update_count
        try:
            for name, default in self._defaults.items():
                setattr(self, name, default.clone() if isinstance(default, Tensor) else [])
            self._to_sync = self.dist_sync_on_step
            self.update(*args, **kwargs)
            self._forward_cache = self.compute()
        finally:
            for name, state in states.items():
                setattr(self, name, state)
            self._to_sync, self._update_count, self._computed = self.sync_on_compute, count, None
        return self._forward_cache

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds the states of another metric, which count as an update: a result from before is computed anew."""
        super().merge_state(incoming_state)
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1
        self._computed = None

    def _sync_dist(self, dist_sync_fn: Gather = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        for state, reduction in self._reductions.items():
            default = self._defaults[state]
            if reduction is dim_zero_cat:
                self._type_rows(state, dist_sync_fn, group)
            elif reduction is dim_zero_sum and isinstance(default, Tensor) and 1 in default.shape:
                self._size_sums(state, dist_sync_fn, group)
        super()._sync_dist(dist_sync_fn, process_group)

    def _type_rows(self, state: str, gather: Gather, group: Any) -> None:
        """Gives an empty state the shape and type that its rows have on other processes."""
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

    def _size_sums(self, state: str, gather: Gather, group: Any) -> None:
        """Expands sums, whose axes of size one grow with the first rows, to the size that they have on other processes."""
        held: Tensor = getattr(self, state)
        sizes = torch.stack(gather(torch.tensor(held.shape, device=self.device), group=group)).amax(0)
        setattr(self, state, held.expand(*sizes.tolist()).contiguous())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # the configuration describes the arguments of this metric, not those of the saved one
        state_dict.pop(f"{prefix}configuration", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # a result must not share memory with the states, which later updates change
        wrapped = super()._wrap_compute(lambda: _Untouched(apply_to_collection(compute(), Tensor, torch.clone)))

        @functools.wraps(compute)
        def unwrapped() -> Any:
            return wrapped().value

        return unwrapped

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Diagnostic:
        """Moves all tensors as torchmetrics does, but casts floating-point rows only."""

        def moved(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        # torchmetrics recognises a cast by the name of the function
        @functools.wraps(fn)
        def cast_floats(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor) if tensor.is_floating_point() else moved(tensor)
            return result

        sums = [name for name, default in self._defaults.items() if isinstance(default, Tensor)]
        super()._apply(cast_floats, [*exclude_state, *sums])
        for name in sums:
            if name not in exclude_state:
                self._defaults[name] = moved(cast(Tensor, self._defaults[name]))
                setattr(self, name, moved(getattr(self, name)))
        return self

    def plot(
        self, val: Result | Sequence[Result] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | SubFigure, Axes]:
        """Draws one result as bars, or a sequence of results as curves.

        Requires matplotlib, which is installed by ``pip install 'lightning_gendiag[plot]'``.

        Args:
            val: a result, or several in order of time; by default ``self.compute()``.
            ax: matplotlib axes to draw into.

        Returns:
            ``(figure, axes)``, as torchmetrics' metrics return.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModuleNotFoundError("plot needs matplotlib: pip install 'lightning_gendiag[plot]'") from error
        results: list[Result] = [self.compute()] if val is None else [val] if hasattr(val, "scalars") else list(val)
        series = [
            {name: float(value) for name, value in result.scalars().items() if name.startswith(self.plotted or "")}
            for result in results
        ]
        if ax is None:
            ax = Figure().add_subplot()
        names = list(series[0])
        if len(series) == 1:
            ax.barh(names[::-1], [series[0][name] for name in names[::-1]])
        else:
            for name in names:
                ax.plot([step[name] for step in series], label=name, marker=".")
            ax.set_xlabel("evaluation")
            ax.legend()
        ax.set_title(type(self).__name__)
        return ax.figure, ax


def _canonical(value: object) -> str:
    """Returns a description of an argument that depends on its content alone."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(_canonical, value))})"
    return repr(value)


class Reservoir(Diagnostic):
    """Rows with labels, optionally a seeded random selection of bounded size.

    Whether a row is selected depends on a seeded hash of the row. The selection is therefore the same for any order of
    the rows, any batch size and any number of processes.

    Args:
        max_rows: largest number of rows selected over all processes; None selects all of them.
        seed: seed of the selection.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if ``max_rows`` is below 2.
    """

    latents: list[Tensor]
    labels: list[Tensor]

    def __init__(self, *, max_rows: int | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_rows is not None and max_rows < 2:
            raise ValueError(
                f"max_rows must be at least 2, got {max_rows}. To fix this, pass a larger number, or None to keep all rows."
            )
        self.max_rows, self.seed = max_rows, seed
        self.add_state("latents", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_configuration(max_rows=max_rows, seed=seed)

    def append(self, latents: Tensor, labels: Tensor) -> None:
        """Adds rows, and drops rows that cannot be selected any more once twice ``max_rows`` are held.

        Args:
            latents: (N, D) floats.
            labels: (N,) integers.

        Raises:
            ValueError: if D differs from that of the rows before.
        """
        if self.latents and self.latents[0].shape[1:] != latents.shape[1:]:
            raise ValueError(
                f"latents must be (N, {self.latents[0].shape[1]}) as before, got {tuple(latents.shape)}. "
                "To fix this, call reset() before passing latents of another length."
            )
        self.latents.append(latents.detach())
        self.labels.append(labels.detach().long())
        if self.max_rows is not None and sum(len(rows) for rows in self.latents) > 2 * self.max_rows:
            rows, labels = self.selected()
            self.latents, self.labels = [rows], [labels]

    def selected(self) -> tuple[Tensor, Tensor]:
        """Returns the selected rows in an order that depends on the rows alone.

        Returns:
            Latents (N, D) and labels (N,); (0, 1) and (0,) where there are none.
        """
        latents, labels = self.rows("latents"), self.rows("labels")
        if len(labels) == 0:
            return torch.zeros(0, 1, device=self.device), torch.zeros(0, dtype=torch.long, device=self.device)
        order = _row_keys(latents, labels, self.seed).argsort(stable=True)[: self.max_rows]
        return latents[order], labels[order]


def _row_keys(latents: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Returns (N,) int64 hashes of rows by exact integer arithmetic, so that they are the same on every machine."""
    bits = (latents.double() + 0.0).view(torch.int64)  # -0.0 and 0.0 are one number
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (latents.shape[1] + 1,), generator=generator).to(bits.device) * 2 + 1
    key = (bits * odd[:-1]).sum(1) + labels * odd[-1]
    for shift in (33, 29, 32):
        # mixes high bits into low ones, as SplitMix does; products wrap around
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * -49064778989728563
    return key
