"""Feature components of regions, averaged over images and processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.diagnostics.regional_primitives.mathematics import FAINT, MAX_REGIONS, largest_first, memberships

CARRIED = 0.9
"""The components are counted that carry this share of all squared norms."""


class RegionalPrimitivesResult(NamedTuple):
    """Means over images of n regions; components by bit mask. All nan where there was none."""

    norms: Tensor
    """(2^n,) of the feature components, over that of the whole feature's distance from the baseline."""
    effects: Tensor
    """(2^n, n) squared change of each region by a component, over the whole image's change from the baseline."""
    curve: Tensor
    """(2^n,) squared error of the image after so many components, the largest first, over the same; 1 with none."""
    relevant: Tensor
    """(n,) squared error of a region drawn by the components that cover it, over its change from the baseline."""
    irrelevant: Tensor
    """(n,) squared change of a region by all other components, over the same."""
    converged: Tensor
    """() share of the optimisations that converged."""
    images: Tensor
    """() number of images."""
    invalid: Tensor
    """() share of images with nan or inf, which are left out."""

    @property
    def order(self) -> Tensor:
        """(2^n - 1,) bit masks of the components, the largest mean norm first."""
        return largest_first(self.norms)

    @property
    def members(self) -> Tensor:
        """(2^n, n) bool: which regions a component covers."""
        return memberships(len(self.relevant), self.norms.device)

    @property
    def components(self) -> Tensor:
        """() how many components carry nine tenths of all squared norms; nan where there are none."""
        squares = self.norms[self.order].square()
        carried = squares.cumsum(0) / squares.sum()
        return torch.where(carried[-1].isnan(), carried[-1], (carried < CARRIED).sum() + 1.0)

    @property
    def sparsity(self) -> Tensor:
        """() the same as a share of all components; lower is sparser."""
        return self.components / (len(self.norms) - 1)

    @property
    def leakage(self) -> Tensor:
        """(n,) of the effect of the components that cover a region, the share that lies outside their own regions, 0 to 1."""
        outside = (self.effects * ~self.members).sum(1)
        # what draws next to nothing leaks nothing
        return (self.members.T * outside).sum(1) / ((self.members.T * self.effects.sum(1)).sum(1) + FAINT)

    @property
    def strength(self) -> Tensor:
        """(n,) of a region's components: root of the sum of their squared norms, each shared by its regions."""
        sizes = self.members.sum(1).clamp(min=1)
        return ((self.norms.square() / sizes)[:, None] * self.members).sum(0).sqrt()

    @property
    def together(self) -> Tensor:
        """(n, n) of the norms of components that cover one region or the other, the share that covers both; diagonal 0."""
        m = self.members.to(self.norms.dtype)
        both = m.T @ (self.norms[:, None] * m)
        own = both.diagonal()
        shares = both / (own[:, None] + own - both)
        return shares - shares.diagonal().diag()

    def scalars(self) -> dict[str, Tensor]:
        """The whole, and each region."""
        values = {
            "components": self.components.to(self.norms),
            "sparsity": self.sparsity,
            "leakage": self.leakage.mean(),
            "relevant": self.relevant.mean(),
            "irrelevant": self.irrelevant.mean(),
            "error_after_tenth": self.curve[max(1, (len(self.curve) - 1) // 10)],
            "converged": self.converged,
            "images": self.images,
            "invalid": self.invalid,
        }
        values |= {f"strength_{r}": value for r, value in enumerate(self.strength)}
        return values | {f"leakage_{r}": value for r, value in enumerate(self.leakage)}


class RegionalPrimitives(Diagnostic):
    """Means over images of what :func:`decompose` finds, over batches and processes: memory (2^n, n), however many images.

    Args:
        num_regions: n.

    Raises:
        ValueError: if it is out of its range.

    Example:
        >>> import torch
        >>> from lightning_gendiag import decompose, minimal_features
        >>> regions, tail = torch.tensor([[0, 1]]), lambda u: u[:, None, None]  # each number draws a pixel
        >>> feature, baseline = torch.tensor([2.0, 1.0]), torch.zeros(2)
        >>> minimal = minimal_features(tail, feature, baseline, regions, penalty=1e-6)
        >>> metric = RegionalPrimitives(2)
        >>> metric.update(*decompose(tail, feature, regions, minimal))
        >>> [round(norm, 3) for norm in metric.compute().norms.tolist()]  # none, the first, the second, both
        [0.0, 0.894, 0.447, 0.0]
    """

    higher_is_better = None
    plotted = ("strength_", "leakage_")
    images: Tensor
    left_out: Tensor

    def __init__(self, num_regions: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= num_regions <= MAX_REGIONS:
            raise ValueError(f"num_regions must be 1 to {MAX_REGIONS}, got {num_regions}.")
        self.num_regions = num_regions
        sets = 2**num_regions
        self.shapes = {"norms": (sets,), "effects": (sets, num_regions), "curve": (sets,), "relevant": (num_regions,),
                       "irrelevant": (num_regions,), "converged": ()}  # fmt: skip
        for name, shape in {**self.shapes, "images": (), "left_out": ()}.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, norms: Tensor, effects: Tensor, curve: Tensor, relevant: Tensor, irrelevant: Tensor, converged: Tensor
    ) -> None:
        """Add one image, ``metric.update(*decompose(...))``.

        Args:
            norms: (2^n,)
            effects: (2^n, n)
            curve: (2^n,)
            relevant: (n,)
            irrelevant: (n,)
            converged: ()
        """
        given = dict(zip(self.shapes, (norms, effects, curve, relevant, irrelevant, converged), strict=True))
        for name, shape in self.shapes.items():
            if given[name].shape != shape:
                raise ValueError(
                    f"{name} must be {tuple(shape)} for {self.num_regions} regions, got {tuple(given[name].shape)}."
                )
        if not all(bool(value.isfinite().all()) for value in given.values()):
            self.left_out += 1
            return
        for name, value in given.items():
            setattr(self, name, getattr(self, name) + value.detach().double())
        self.images += 1

    def compute(self) -> RegionalPrimitivesResult:
        """Means over all images."""
        means = {name: getattr(self, name) / self.images for name in self.shapes}
        seen = self.images + self.left_out
        return RegionalPrimitivesResult(**means, images=self.images, invalid=self.left_out / seen.clamp(min=1))
