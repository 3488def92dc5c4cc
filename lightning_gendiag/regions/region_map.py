"""A partition of the image into regions, with a readable name for each region."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RegionMap:
    """A partition of the positions of an image into regions, with their names and statistics.

    Pass your own regions as ``RegionMap(labels)`` or ``RegionMap(labels, names=("face", "hair", "background"))``, or find
    regions in the data with :func:`find_regions`.

    Args:
        labels: (H, W) integers 0..R-1, where each number is used.
        names: R names; by default from the position of each region ("top left", "centre", "border").
        alignment: (R, R) mean CKA of pixels, within regions on the diagonal and between regions elsewhere; nan where
            unknown, and on the diagonal for a region of a single pixel.
        dependence: mean CKA over all pairs of pixels in different regions, 0 (independent) to 1; nan where unknown.
        stability: adjusted Rand index of the maps found on two halves of the images, 1 where they are the same;
            nan where unknown.
        background: number of the region in which real images never vary, None where there is no such region. It is named
            "background" by default.

    Raises:
        ValueError: if labels are not (H, W) integers, leave a number out, or do not match the other arguments.

    Example:
        >>> print(RegionMap(torch.arange(4).repeat(4, 1) // 2))
        2 regions of 4x4: left 50%, right 50%
    """

    labels: Tensor
    names: tuple[str, ...] = ()
    alignment: Tensor | None = None
    dependence: float = math.nan
    stability: float = math.nan
    background: int | None = None
    num_regions: int = field(init=False)

    def __post_init__(self) -> None:
        labels = torch.as_tensor(self.labels).detach().cpu()
        if labels.ndim != 2 or labels.numel() == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be an (H, W) tensor of integers 0..R-1, got {labels.dtype} of shape {tuple(labels.shape)}. "
                "To fix this, pass the number of the region for each position."
            )
        labels = labels.long()
        present = torch.unique(labels).tolist()
        if present != list(range(len(present))):
            raise ValueError(
                f"labels must use every number 0..R-1, got the numbers {present[:12]}. "
                "To fix this, renumber them: labels.unique(return_inverse=True)[1]."
            )
        names = tuple(self.names) or _names(labels, len(present), self.background)
        if len(set(names)) != len(names) or {"image", "samples"} & set(names):
            raise ValueError(
                f"names must be unique and none of 'image' and 'samples', got {', '.join(names)}. "
                "To fix this, rename the regions."
            )
        if len(names) != len(present):
            raise ValueError(
                f"names must hold one name for each of the {len(present)} regions, got {len(names)}. "
                "To fix this, leave names out, or pass one name per region."
            )
        if self.background is not None and self.background not in present:
            raise ValueError(
                f"background must be the number of a region, 0 to {len(present) - 1}, or None, got {self.background}. "
                "To fix this, leave background out."
            )
        alignment = torch.full((len(present), len(present)), math.nan) if self.alignment is None else self.alignment
        if tuple(alignment.shape) != (len(present), len(present)):
            raise ValueError(
                f"alignment must be ({len(present)}, {len(present)}), got {tuple(alignment.shape)}. "
                "To fix this, leave alignment out, or pass one row and one column per region."
            )
        # the dataclass is frozen
        vars(self).update(labels=labels, names=names, alignment=alignment.detach().cpu(), num_regions=len(present))

    @property
    def height(self) -> int:
        """Height H in pixels."""
        return self.labels.shape[0]

    @property
    def width(self) -> int:
        """Width W in pixels."""
        return self.labels.shape[1]

    @cached_property
    def sizes(self) -> Tensor:
        """(R,) number of positions of each region."""
        return torch.bincount(self.labels.flatten(), minlength=self.num_regions)

    @cached_property
    def boxes(self) -> Tensor:
        """(R, 4) smallest box around each region as top, left, bottom, right, of which the last two are exclusive."""
        from scipy.ndimage import find_objects

        found = find_objects(self.labels.numpy() + 1)
        return torch.tensor([(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in found])

    def mask(self, region: int) -> Tensor:
        """Returns (H, W) booleans, true inside the region."""
        return self.labels == region

    def overlap(self, region: int, mask: Tensor) -> float:
        """Computes the intersection over union of a region with a mask (H, W), 0 to 1."""
        inside, mask = self.mask(region), mask.bool().cpu()
        return float((inside & mask).sum() / (inside | mask).sum())

    def state_dict(self) -> dict[str, Any]:
        """Returns plain tensors, numbers and strings, which ``torch.load(weights_only=True)`` accepts."""
        return {
            "labels": self.labels,
            "names": list(self.names),
            "alignment": self.alignment,
            "dependence": self.dependence,
            "stability": self.stability,
            "background": self.background,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RegionMap:
        """Creates a map from what :meth:`state_dict` returned."""
        return cls(**{**state, "names": tuple(state["names"])})

    def save(self, path: str | Path) -> None:
        """Writes the map to a file that :meth:`load` reads."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> RegionMap:
        """Reads a map that :meth:`save` wrote."""
        return cls.from_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @classmethod
    def of(cls, regions: RegionMap | Tensor | str | Path) -> RegionMap:
        """Returns a map from a map, from (H, W) labels, or from the path of a saved map."""
        if isinstance(regions, RegionMap):
            return regions
        if isinstance(regions, (str, Path)):
            return cls.load(regions)
        return cls(regions)

    def __eq__(self, other: object) -> bool:
        """Returns whether labels and names are the same."""
        if not isinstance(other, RegionMap):
            return NotImplemented
        return self.names == other.names and torch.equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.names, self.labels.numpy().tobytes()))

    def __str__(self) -> str:
        total = self.labels.numel()
        parts = ", ".join(
            f"{name} {size / total:.0%}" for name, size in zip(self.names, self.sizes.tolist(), strict=True)
        )
        known = [
            f"; {name} {value:.2f}"
            for name, value in (("dependence", self.dependence), ("stability", self.stability))
            if not math.isnan(value)
        ]
        return f"{self.num_regions} regions of {self.height}x{self.width}: {parts}{''.join(known)}"


def _names(labels: Tensor, num_regions: int, background: int | None) -> tuple[str, ...]:
    """Returns a name for the position of each region, numbered where several would have the same."""
    height, width = labels.shape
    frame = torch.cat([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    names: list[str] = []
    for region in range(num_regions):
        mask = labels == region
        rows, columns = mask.nonzero(as_tuple=True)
        y, x = (float(rows.double().mean()) + 0.5) / height, (float(columns.double().mean()) + 0.5) / width
        vertical = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
        horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
        name = f"{vertical} {horizontal}".strip() or "centre"
        if name == "centre" and num_regions > 1 and (frame == region).double().mean() > 0.5:
            inner = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
            name = "most of the image" if inner.double().mean() > 0.3 else "border"
        if region == background:
            name = "background"
        count = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return tuple(names)


def features_in(labels: Tensor, what: str = "feature") -> list[str]:
    """Returns a name for each region of rows, which are numbered features (F,), or positions of series.

    Example:
        >>> features_in(torch.tensor([0, 1, 1, 1, 2, 0, 2, 0]))
        ['features 0, 5, 7', 'features 1 to 3', 'features 4, 6']
    """
    names = []
    for region in range(int(labels.max()) + 1):
        numbers = (labels == region).nonzero()[:, 0].tolist()
        if len(numbers) == 1:
            names.append(f"{what} {numbers[0]}")
        elif len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            names.append(f"{what}s {numbers[0]} to {numbers[-1]}")
        else:
            more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
            names.append(f"{what}s {', '.join(map(str, numbers[:4]))}{more}")
    return names
