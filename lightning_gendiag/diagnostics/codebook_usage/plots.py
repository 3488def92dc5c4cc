"""The panel of codebook usage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.detection.alarm import counted, listed
from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.codebook_usage.functional import CodebookUsageResult
from lightning_gendiag.plots import canvas, charts, pictures

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_TILES = 4
"""Largest number of codebooks that are drawn."""

PAGE_ROWS, PAGE_CELLS, PAGE_COLUMNS = 64, 4096, 64
"""Largest number of rows of codes over all steps in the tab, of cells of one codebook, and of cells of each of several."""

MAX_BARS = 40
"""Largest number of bars; of more codes, each bar is of several."""

NEVER: canvas.Colour = (232, 234, 237)
BEYOND: canvas.Colour = (255, 255, 255)
"""Colours of codes that were not chosen, and of cells that are none."""

LIGHTEST = 1e-2
"""Share, relative to that of codes in even use, from which on a code that was chosen is darker than the lightest one."""


def panel(result: CodebookUsageResult, perplexity: Curve, occasion: canvas.Occasion) -> Tensor:
    """Draws each code as a cell that is darker the more it is used, the shares in order, and the perplexity over time.

    Args:
        result: Of the evaluation.
        perplexity: The geometric mean of all codebooks over time.
        occasion: When it is drawn, and what an alarm adds.

    Returns:
        (H, W, 3) uint8.
    """
    number, sizes = len(result.sizes), [int(size) for size in result.sizes]
    order = [*occasion.marked, *(q for q in range(number) if q not in occasion.marked)]
    shown = sorted(order[:MAX_TILES])
    tiles = []
    for q in shown:
        name = f"codebook {q}: " if number > 1 else ""
        caption = f"{name}{int(result.seen[q]):,} of {counted(sizes[q], 'code')} used"
        tiles.append(canvas.Tile(caption, _cells(result, q)))
    if number == 1:
        tiles.append(canvas.Tile(*_bars(result, 0)))
    most = max([value for value in perplexity.values if math.isfinite(value)] or [1.0]) * 1.05
    tiles.append(canvas.Tile("perplexity", charts.line(perplexity.values, perplexity.steps, most)))
    rows = []
    for q in shown:
        name = f"codebook {q}: " if number > 1 else ""
        died = [str(code) for code in result.died_codes(q)]
        dead = [str(code) for code in result.dead[q].nonzero()[:, 0].tolist()]
        if died:
            rows.append(canvas.Row(canvas.ALARM, f"{name}died: {listed(died, 8)}", strong=True))
        elif dead:
            rows.append(canvas.Row(NEVER, f"{name}never chosen: {listed(dead, 8)}"))
        tenths = float(result.nine_tenths[q])
        rows.append(canvas.Row(canvas.INK, f"{name}nine tenths of all assignments go to {tenths:.0%} of the codes"))
    bound, drift = float(result.unseen_bound.max()), result.scalars().get("drift")
    rows.append(canvas.Row(canvas.INK, f"a code that was never chosen has a share below {bound:.2%}"))
    if drift is not None:
        rows.append(canvas.Row(canvas.INK, f"{float(drift):.0%} of the positions changed their code"))
    mean = float(result.scalars()["perplexity"])
    of = f"of {sizes[0]:,}" if len(set(sizes)) == 1 else f"on average of {number} codebooks"
    title = f"Perplexity {mean:.1f} {of} (step {occasion.step})"
    return canvas.panel(title, tiles, rows, occasion.note)


class Bins(NamedTuple):
    """Codes next to each other, of a codebook."""

    codebook: int
    first: int
    last: int
    """The last code, included."""


def page_bins(sizes: Sequence[int]) -> list[Bins]:
    """Returns the rows of codes whose use the tab shows over all steps: at most 64 in all, equally many of each codebook.

    Example:
        >>> page_bins([3])
        [Bins(codebook=0, first=0, last=0), Bins(codebook=0, first=1, last=1), Bins(codebook=0, first=2, last=2)]
    """
    most = max(1, PAGE_ROWS // len(sizes))
    return [
        Bins(q, first, min(first + step, size) - 1)
        for q, size in enumerate(sizes[:PAGE_ROWS])
        for step in [math.ceil(size / most)]
        for first in range(0, size, step)
    ]


def page_use(result: CodebookUsageResult) -> list[float]:
    """Returns how often codes of each of :func:`page_bins` are chosen, relative to all codes in even use; nan without any."""
    use = _relative(result)
    return [
        float(f"{float(use[q, first : last + 1].mean()):.2g}")
        for q, first, last in page_bins([int(n) for n in result.sizes])
    ]


def page_cells(result: CodebookUsageResult) -> tuple[int, dict[str, NDArray[Any]]]:
    """Returns the codes of the newest evaluation as the tab shows them: those of one codebook as a square, else a row of each.

    Returns:
        The number of codes in a cell, and arrays (rows, columns): ``use`` relative to even use, nan beyond the last code, and
        ``died``, 1 where codes died.
    """
    use, died = _relative(result)[:PAGE_ROWS], result.died[:PAGE_ROWS].to(torch.float64)
    alone, codes = len(result.sizes) == 1, use.shape[1]
    group = math.ceil(codes / (PAGE_CELLS if alone else PAGE_COLUMNS))
    cells = math.ceil(codes / group)
    columns = math.ceil(math.sqrt(cells)) if alone else cells
    beyond = (-(-cells // columns) * columns if alone else cells) * group - codes
    binned = [F.pad(x, (0, beyond), value=math.nan).view(-1, columns, group).nanmean(2) for x in (use, died)]
    return group, {
        "use": binned[0].to(torch.float16).numpy(),
        "died": (binned[1] > 0).to(torch.uint8).numpy(),
    }


def _relative(result: CodebookUsageResult) -> Tensor:
    """Returns the share of each code (Q, K) relative to that of codes in even use, nan where there is no code."""
    return (result.shares * result.sizes[:, None]).where(result.exists, math.nan)


def _cells(result: CodebookUsageResult, codebook: int) -> Tensor:
    """A square of all codes in their order; those that died are red, and those that were never chosen are grey."""
    size = int(result.sizes[codebook])
    side = math.ceil(math.sqrt(size))
    # on a logarithmic scale up to ten times an even share
    relative = (result.shares[codebook, :size] * size).nan_to_num(0.0)
    position = ((relative / LIGHTEST).clamp(min=1).log10() / 3).clamp(0, 1) * 0.9 + 0.1
    low, high = (torch.tensor(colour, dtype=torch.float64) for colour in ((158, 202, 225), (8, 48, 107)))
    colours = low + position[:, None] * (high - low)
    colours[result.dead[codebook, :size]] = torch.tensor(NEVER, dtype=torch.float64)
    colours[result.died[codebook, :size]] = torch.tensor(canvas.ALARM, dtype=torch.float64)
    cells = torch.tensor(BEYOND, dtype=torch.float64).repeat(side * side, 1)
    cells[:size] = colours
    return canvas.on_white_tile(pictures.enlarged(cells.view(side, side, 3).round().byte()))


def _bars(result: CodebookUsageResult, codebook: int) -> tuple[str, Tensor]:
    """Shares in order, the largest first, and a line at that of codes in even use."""
    size = int(result.sizes[codebook])
    shares = result.shares[codebook, :size].sort(descending=True).values
    group = math.ceil(size / MAX_BARS)
    padded = torch.cat([shares, shares.new_zeros(-size % group)])
    heights = 100 * padded.view(-1, group).sum(1)
    even = 100 * group / size
    names = [str(number) for number in range(len(heights))]
    picture = charts.bars(
        heights.tolist(), [""] * len(names), [False] * len(names), floor=0.0, targets=[even] * len(names)
    )
    of = f"each {group:,} codes" if group > 1 else "each code"
    return f"% of {of}, line = even", picture
