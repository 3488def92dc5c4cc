"""Errors of round trips, log-determinants and condition numbers over batches and processes."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.round_trip.functional import (
    TERMS,
    Errors,
    RoundTripResult,
    check_pair,
    errors_of,
    jacobian_volume,
    sums_of,
)
from lightning_gendiag.functional.arrays import kth_smallest
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better

Kind = Literal["data", "held_out", "latents", "noise"]
"""Of what a round trip is."""

KINDS: tuple[Kind, ...] = ("data", "held_out", "latents", "noise")


class RoundTrip(Diagnostic):
    """What data lose when they are encoded and decoded, and latents when they are decoded and encoded, by position.

    Of flows it also compares reported log-determinants with those of Jacobians, and looks at each layer alone.

    Memory: five numbers for each position of the data and for each latent dimension, and five for each Jacobian.

    Args:
        regions: (P,) or (H, W) numbers 0..R-1 of the region of each position of the data; by default one region.
        num_layers: K, the number of layers that are looked at alone.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = RoundTrip()
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
        >>> metric.update(x, x * torch.tensor([1.0, 0.5]))
        >>> metric.compute().worst_positions(1)
        [1]
    """

    higher_is_better = False
    plotted = ("data_error", "latent_error", "noise_error", "unexplained", "held_out_unexplained", "latent_unexplained")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "data_error": less_is_better(
            "Root mean squared error of data that are encoded and decoded.", "standard deviations"
        ),
        "invalid": less_is_better("Largest fraction of data or latents whose round trip has nan or inf."),
        "unexplained": less_is_better(
            "Fraction of the variance that reconstructions lose, the mean over regions; 1 is no better than the mean.",
            optional=True,
        ),
        "unexplained_{r}": less_is_better("The same of the region, for 2 to 20 regions.", optional=True),
        "held_out_unexplained": less_is_better(
            "Fraction of the variance that reconstructions of validation images lose.", optional=True
        ),
        "held_out_unexplained_{r}": less_is_better("The same of the region, for 2 to 20 regions.", optional=True),
        "latent_error": less_is_better(
            "Root mean squared error of latents that are decoded and encoded.", "standard deviations", optional=True
        ),
        "latent_unexplained": less_is_better(
            "Fraction of the variance of a latent dimension that is lost, the mean over dimensions.", optional=True
        ),
        "noise_error": less_is_better(
            "As data_error, of noise in the range of the data.", "standard deviations", optional=True
        ),
        "condition": less_is_better(
            "Condition number of the Jacobian of a flow, 1 or more; the geometric mean over images.", optional=True
        ),
        "log_det_error": less_is_better(
            "Difference of reported log-determinants from the Jacobian's, for each dimension.", "nats", optional=True
        ),
        "layer_error_{k}": less_is_better(
            "As data_error, of what passes the layer, for up to 20 layers.", "standard deviations", optional=True
        ),
        "layer_condition_{k}": less_is_better("Median condition number of the layer.", optional=True),
        "layer_log_det_error_{k}": less_is_better(
            "Difference of the layer's log-determinant from its Jacobian's, for each dimension.", "nats", optional=True
        ),
    }
    data: Tensor
    held_out: Tensor
    latents: Tensor
    noise: Tensor
    layers: Tensor
    volumes: list[Tensor]

    def __init__(self, regions: Tensor | None = None, num_layers: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_layers < 0:
            raise ValueError(f"num_layers must be 0 or more, got {num_layers}. To fix this, pass the number of layers.")
        numbers = torch.zeros(0, dtype=torch.long) if regions is None else torch.as_tensor(regions).flatten().cpu()
        if numbers.is_floating_point() or (
            len(numbers) and set(numbers.tolist()) != set(range(int(numbers.max()) + 1))
        ):
            raise ValueError(
                f"regions must be integers 0..R-1 where each number is used, got {numbers.dtype} of shape "
                f"{tuple(numbers.shape)}. To fix this, pass RegionMap(labels).labels."
            )
        self.num_layers, self.regions = num_layers, numbers.long()
        self.add_sums(**{kind: (len(TERMS), 1) for kind in KINDS}, layers=(num_layers, len(KINDS), len(TERMS)))
        self.add_state("volumes", default=[], dist_reduce_fx="cat")
        self.add_configuration(regions=self.regions, num_layers=num_layers)

    def update(
        self,
        before: Tensor,
        after: Tensor,
        kind: Kind = "data",
        layer: int | None = None,
        log_det: Tensor | None = None,
        gram: Tensor | None = None,
    ) -> None:
        """Adds values before and after a round trip.

        Args:
            before: (N, P) values, or (N, C, ...) whose positions are those behind C.
            after: the same values after a round trip. Rows with nan or inf are counted and left out.
            kind: what the values are: data and reconstructions, those of data that the model was not trained on, latents, or
                noise in place of data; of a layer, what the model was given.
            layer: number of the layer that the round trip is through; by default the whole model.
            log_det: (M,) log-determinants in nats that the model, or the layer, reports for M of these data.
            gram: (M, D, D) products ``J'J`` of the Jacobians of the same data.

        Raises:
            ValueError: if an argument has another shape or value.
        """
        check_pair(before, after)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}. To fix this, pass one of them.")
        if layer is not None and not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer must be 0 to {self.num_layers - 1}, got {layer}. To fix this, pass RoundTrip(num_layers=...)."
            )
        sums = sums_of(before, after).to(self.device)
        held: Tensor = self.layers if layer is not None else getattr(self, kind)
        if layer is None and kind in ("data", "held_out") and len(self.regions) not in (0, sums.shape[1]):
            raise ValueError(
                f"before must be of {len(self.regions)} positions as the regions are, got {tuple(before.shape)}. "
                "To fix this, pass regions of the size of the data."
            )
        if layer is None and held.shape[1] not in (1, sums.shape[1]):
            raise ValueError(
                f"before must be of {held.shape[1]} positions as earlier data are, got {tuple(before.shape)}. "
                "To fix this, call reset() before passing data of another size."
            )
        volumes = self._volumes(layer, log_det, gram)
        if layer is None:
            self.accumulate(**{kind: sums})
        else:
            # positions of a layer are not told apart: the sums are those of its mean position
            row = torch.zeros_like(self.layers)
            row[layer, KINDS.index(kind)] = sums.mean(1)
            self.accumulate(layers=row)
        if volumes is not None:
            self.volumes = [*self.volumes, volumes]

    def _volumes(self, layer: int | None, log_det: Tensor | None, gram: Tensor | None) -> Tensor | None:
        """Rows (M, 5) of the layer's number, the log-determinants reported and exact, condition numbers, and D."""
        if gram is None:
            return None
        exact, condition = jacobian_volume(gram)
        reported = torch.full_like(exact, math.nan) if log_det is None else log_det.detach().to(exact)
        if reported.shape != exact.shape:
            raise ValueError(
                f"log_det must be ({len(exact)},) as there are matrices in gram, got {tuple(reported.shape)}. "
                "To fix this, pass both of the same data."
            )
        number, dims = (torch.full_like(exact, value) for value in (-1 if layer is None else layer, gram.shape[1]))
        return torch.stack([number, reported, exact, condition, dims], 1).to(self.device)

    def _regional(self, errors: Errors) -> Tensor:
        """Fraction (R,) of the variance of each region that is lost."""
        if not len(self.regions) or errors.mean_square.shape != self.regions.shape:
            labels = torch.zeros_like(errors.mean_square, dtype=torch.long)
        else:
            labels = self.regions.to(errors.mean_square.device)
        count = max(int(self.regions.max()) + 1 if len(self.regions) else 1, 1)
        weights = torch.nn.functional.one_hot(labels, count).to(errors.mean_square)  # (P, R)
        weights = weights / weights.sum(0)
        error, variance = errors.mean_square @ weights, errors.variance @ weights
        means = Errors(error, variance, errors.invalid)
        least = errors.variance.mean() / 100
        return means.mean_square / means.variance.clamp(min=float(least.nan_to_num(0.0)))

    def compute(self) -> RoundTripResult:
        """Computes all errors; nan where nothing was measured."""
        data, held_out, latents, noise = (errors_of(getattr(self, kind)) for kind in KINDS)
        # what a layer loses of data, samples or noise, each in its own unit, whichever is more
        layers = errors_of(self.layers.flatten(0, 1).T)
        errors = (layers.mean_square / layers.variance).sqrt().view(self.num_layers, len(KINDS))
        largest = errors.nan_to_num(-1.0, posinf=math.inf).amax(1)
        n, bad = self.layers[..., 0].sum(1), self.layers[..., 1].sum(1)
        volumes = self.rows("volumes").reshape(-1, 5)
        for column in (3, 1, 2):
            # an order that does not depend on that of the updates
            volumes = volumes[volumes[:, column].nan_to_num(-math.inf).argsort(stable=True)]
        whole = volumes[volumes[:, 0] < 0]
        reported = whole[~whole[:, 1].isnan()]
        difference, condition = self._by_layer(volumes)
        return RoundTripResult(
            data_error=data.relative,
            unexplained=self._regional(data),
            held_out_unexplained=self._regional(held_out),
            latent_error=latents.relative,
            latent_unexplained=latents.unexplained,
            latent_share=latents.variance / latents.variance.mean(),
            noise_error=noise.total,
            invalid=torch.stack([errors.invalid for errors in (data, held_out, latents, noise)]),
            log_det=reported[:, 1],
            exact_log_det=reported[:, 2],
            condition=whole[:, 3],
            dims=whole[:, 4].amax() if len(whole) else whole.new_tensor(math.nan),
            layer_error=largest.where(largest >= 0, math.nan),
            layer_invalid=bad / (n + bad),
            layer_log_det_error=difference,
            layer_condition=condition,
            first_offset=reported.new_tensor(math.nan),
            kept=torch.zeros_like(self._regional(data), dtype=torch.bool),
            latents_kept=torch.zeros_like(latents.variance, dtype=torch.bool),
        )

    def _by_layer(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean absolute difference of log-determinants in nats for each dimension, and median condition number, (K,) each."""
        differences, conditions = (torch.full((self.num_layers,), math.nan).to(self.layers) for _ in range(2))
        for k in range(self.num_layers):
            rows = volumes[volumes[:, 0] == k]
            difference = ((rows[:, 1] - rows[:, 2]) / rows[:, 4]).abs()
            if len(rows):
                conditions[k] = kth_smallest(rows[:, 3], (len(rows) - 1) // 2)
                differences[k] = difference.nanmean()
        return differences, conditions
