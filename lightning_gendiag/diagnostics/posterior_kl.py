"""Does the decoder still need the latent? KL divergence of a VAE's posterior from its prior, dimension by dimension.

Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation* (vanishing KL); active units after
Burda, Grosse, Salakhutdinov, arXiv 1509.00519.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.functional import as_images
from lightning_gendiag.monitor import Monitor, Reading

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

ACTIVE = 0.01
"""Variance over the data of a posterior's mean above which a dimension counts as active, as in the source."""

FEW = 1.0
"""Nats: a dimension that carries as much is in use, and how much more is no matter of life and death."""

LEAST = 1e-4
"""Nats, below which no dimension is told from another."""

MAX_DIMENSION_TAGS = 20
"""Up to so many dimensions each has a scalar of its own."""

WATCHED = 256
"""Up to so many dimensions each is watched for its death; of more, such as spatial latents, the total only."""

FULL_COVARIANCE = 512
"""Up to so many dimensions the aggregate posterior's covariance is kept whole, beyond its diagonal."""

CHUNK = 128
"""Images that go through the encoder at a time."""

Spread = Literal["log_variance", "variance", "log_std", "std"]


class PosteriorKLResult(NamedTuple):
    """What a Gaussian posterior tells of each latent dimension, in nats."""

    per_dimension: Tensor
    """(L,) mean over the data of KL(q(z_i | x) | N(0, 1)), 0 or more."""
    variance_of_mean: Tensor
    """(L,) variance over the data of the posterior's mean; 0 where the dimension says nothing of the image."""
    aggregate_mean: Tensor
    """(L,) of the aggregate posterior, 0 where it meets the prior."""
    aggregate_variance: Tensor
    """(L,) of the aggregate posterior, 1 where it meets the prior."""
    aggregate_kl: Tensor
    """() KL of the Gaussian with the aggregate posterior's moments from the prior: a lower bound of the true one."""
    invalid: Tensor
    """() share of rows with nan or inf, which are left out."""
    threshold: Tensor
    """() of ``variance_of_mean``, above which a dimension is active."""

    @property
    def total(self) -> Tensor:
        """() KL of all dimensions together."""
        return self.per_dimension.sum()

    @property
    def active(self) -> Tensor:
        """(L,) bool."""
        return self.variance_of_mean > self.threshold

    @property
    def active_units(self) -> Tensor:
        """() number of active dimensions."""
        return self.active.sum()

    @property
    def dead_share(self) -> Tensor:
        """() share of dimensions that are not active."""
        return 1 - self.active.double().mean()

    @property
    def information(self) -> Tensor:
        """() upper bound of the mutual information of image and latent: what of the total is not mismatch with the prior."""
        return (self.total - self.aggregate_kl).clamp(min=0)

    def scalars(self) -> dict[str, Tensor]:
        """The whole, and each dimension where they are few."""
        values = {
            "total": self.total,
            "active_units": self.active_units.double(),
            "dead_share": self.dead_share,
            "aggregate_kl": self.aggregate_kl,
            "information": self.information,
            "highest": self.per_dimension.max(),
            "lowest": self.per_dimension.min(),
            "invalid": self.invalid,
        }
        if len(self.per_dimension) <= MAX_DIMENSION_TAGS:
            values |= {f"dimension_{i}": value for i, value in enumerate(self.per_dimension)}
        return values


def posterior_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) | N(0, 1)) of each row and dimension, in nats.

    ``(mean^2 + variance - 1 - log variance) / 2``, in float64.

    Args:
        mean: any shape.
        log_variance: of the same shape.

    Returns:
        float64 of that shape, 0 or more.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> posterior_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([0., 2.], dtype=torch.float64)
    """
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"log_variance must have the shape of mean, {tuple(mean.shape)}, got {tuple(log_variance.shape)}."
        )
    m, v = mean.double(), log_variance.double()
    # expm1 keeps what is near to the prior
    return 0.5 * (m.square() + torch.expm1(v) - v)


class PosteriorKL(Diagnostic):
    """KL of a VAE's posterior by dimension, active units, and the aggregate posterior against the prior.

    Whatever the loss weighs or scales, these are nats of the posterior itself. Memory: sums of (L,), and (L, L) up to 512
    dimensions; constant however many rows.

    Args:
        latent_dim: L.
        threshold: a dimension is active where the variance over the data of its mean is above.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = PosteriorKL(2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.tensor([[-2.0, 0.0], [-2.0, 0.0]]))
        >>> metric.compute().active
        tensor([ True, False])
    """

    higher_is_better = None
    plotted = ("dimension_", "total")
    rows_seen: Tensor
    left_out: Tensor
    divergence: Tensor
    means: Tensor
    products: Tensor
    variances: Tensor

    def __init__(self, latent_dim: int, *, threshold: float = ACTIVE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}.")
        if threshold < 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}.")
        self.latent_dim, self.threshold = latent_dim, threshold
        square = (latent_dim, latent_dim) if latent_dim <= FULL_COVARIANCE else (latent_dim,)
        shapes = {"rows_seen": (), "left_out": (), "divergence": (latent_dim,), "means": (latent_dim,),
                  "products": square, "variances": (latent_dim,)}  # fmt: skip
        for name, shape in shapes.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add the posteriors of images.

        Args:
            mean: (N, L)
            log_variance: (N, L), the natural logarithm of the variance. Rows with nan or inf are left out.
        """
        for name, given in (("mean", mean), ("log_variance", log_variance)):
            if given.ndim != 2 or given.shape[1] != self.latent_dim or not given.is_floating_point():
                raise ValueError(
                    f"{name} must be (N, {self.latent_dim}) of floats, got {given.dtype} of shape {tuple(given.shape)}."
                )
        divergence = posterior_kl(mean.detach(), log_variance.detach())
        finite = divergence.isfinite().all(1)
        m, v = mean.detach().double()[finite], log_variance.detach().double()[finite].exp()
        self.rows_seen += len(m)
        self.left_out += (~finite).sum()
        self.divergence += divergence[finite].sum(0)
        self.means += m.sum(0)
        self.variances += v.sum(0)
        self.products += m.T @ m if self.products.ndim == 2 else m.square().sum(0)

    def compute(self) -> PosteriorKLResult:
        """All rows together; nan where there was none."""
        n = self.rows_seen
        mean, inner = self.means / n, self.variances / n
        if self.products.ndim == 2:
            between = self.products / n - mean[:, None] * mean
            covariance = between + inner.diag()
            spread = between.diagonal().clamp(min=0)
            finite = covariance.isfinite().all()
            log_volume = torch.linalg.slogdet(covariance)[1] if finite else torch.full_like(n, math.nan)
        else:
            spread = (self.products / n - mean.square()).clamp(min=0)
            log_volume = (spread + inner).log().sum()
        aggregate = 0.5 * ((spread + inner + mean.square() - 1).sum() - log_volume)
        return PosteriorKLResult(
            per_dimension=self.divergence / n,
            variance_of_mean=spread,
            aggregate_mean=mean,
            aggregate_variance=spread + inner,
            aggregate_kl=aggregate.clamp(min=0),
            invalid=self.left_out / (n + self.left_out),
            threshold=torch.full_like(n, self.threshold),
        )


class PosteriorKLMonitor(Monitor):
    """Follow :class:`PosteriorKL` of a VAE's encoder while it trains, on the reference images.

    A dimension dies when its KL falls from what it was to next to nothing; how much a living one carries is no alarm, so
    that a warm-up of the KL term is none. The whole has vanished when no dimension is active in ``patience`` evaluations
    in a row, from the beginning of training too. Of more than 256 dimensions the whole alone is watched.

    Args:
        posterior: what gives mean and spread (N, L) of images: the name of a method of the module, a callable
            ``(module, images)``; by default the probe's ``encode``. A pair of tensors, or a distribution.
        spread: what the second of the pair is.
        threshold: see :class:`PosteriorKL`.
        patience: evaluations without an active dimension before the whole counts as vanished.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [PosteriorKLMonitor(spread="std")]  # of a Trainer
    """

    stem = "posterior_kl"
    needs = ()
    # a quarter more or less of what little a dimension carries is no news
    grain = 0.25
    question = "KL in nats"

    def __init__(
        self,
        posterior: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        spread: Spread = "log_variance",
        threshold: float = ACTIVE,
        patience: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if spread not in ("log_variance", "variance", "log_std", "std"):
            raise ValueError(f"spread must be 'log_variance', 'variance', 'log_std' or 'std', got {spread!r}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        self.posterior, self.spread, self.threshold, self.patience = posterior, spread, threshold, patience
        self.silent = 0

    def check(self, probe: Probe) -> None:
        """The encoder must be there."""
        self._encoder(probe)

    def _encoder(self, probe: Probe) -> Callable[..., Any]:
        if self.posterior is None:
            return probe.encoder  # type: ignore[no-any-return]
        if isinstance(self.posterior, str):
            found = getattr(probe.module, self.posterior, None)
            if not callable(found):
                raise ValueError(
                    f"posterior must be a callable or name a method of {type(probe.module).__name__}, got {self.posterior!r}."
                )
            return found  # type: ignore[no-any-return]
        given = self.posterior
        return lambda images: given(probe.module, images)

    def _moments(self, output: Any, n: int) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, L) in what the encoder gave."""
        if isinstance(getattr(output, "mean", None), Tensor) and isinstance(getattr(output, "variance", None), Tensor):
            pair = output.mean, output.variance.log()
        elif (
            isinstance(output, (tuple, list))
            and len(output) == 2
            and all(isinstance(part, Tensor) and len(part) == n for part in output)
            and output[0].shape == output[1].shape
        ):
            raw = output[1].double()
            logs = {"log_variance": lambda: raw, "variance": raw.log, "log_std": lambda: 2 * raw,
                    "std": lambda: 2 * raw.log()}  # fmt: skip
            pair = output[0], logs[self.spread]()
        else:
            got = f"{len(output)} of them" if isinstance(output, (tuple, list)) else type(output).__name__
            raise ValueError(
                f"encode must return a pair of mean and log variance, or a distribution, got {got}. "
                "To fix this, pass PosteriorKLMonitor(posterior=lambda module, images: (mean, log_variance))."
            )
        return pair[0].flatten(1), pair[1].flatten(1)

    def try_out(self, probe: Probe, images: Tensor) -> None:
        """See whether the encoder gives a mean and a variance for images (n, C, H, W); nothing of the module changes.

        Raises:
            ValueError: if it gives anything else.
        """
        with probe.looking(parameters=True, exact=True):
            self._moments(self._encoder(probe)(probe.as_input(as_images(images))), len(images))

    def build(self, probe: Probe) -> PosteriorKL:
        """A metric for as many dimensions as the encoder gives."""
        assert probe.reference is not None
        with probe.looking(exact=True):
            images = probe.as_input(as_images(probe.reference.images[:2]))
            mean, _ = self._moments(self._encoder(probe)(images), 2)
        return PosteriorKL(mean.shape[1], threshold=self.threshold)

    def feed(self, probe: Probe, step: int) -> None:
        """This rank's share of the reference."""
        assert self.metric is not None
        if self.posterior is None:
            for part in probe.encoded(step):
                self.metric.update(*self._moments(part.output, part.size))
            return
        encoder = self._encoder(probe)
        with probe.looking(exact=True):
            images = probe.real_share().images
            for start in range(0, len(images), CHUNK):
                some = probe.as_input(as_images(images[start : start + CHUNK]))
                self.metric.update(*self._moments(encoder(some), len(some)))

    def readings(self, result: PosteriorKLResult) -> dict[str, Reading]:
        """Each dimension, as far as it carries little; the total; and whether all is silent for long."""
        values, total = result.per_dimension.tolist(), float(result.total)
        watched = values if len(values) <= WATCHED else []
        readings = {f"dimension {i}": Reading(value, _silence(value), fault="died") for i, value in enumerate(watched)}
        readings["the latent"] = Reading(total, _silence(total), "whole", fault="vanished")
        self.silent = self.silent + 1 if total == total and int(result.active_units) == 0 else 0
        gone = self.silent >= self.patience
        readings["all of the latent"] = Reading(
            total,
            math.inf if gone else 0.0,
            "other",
            words=f"the latent vanished: KL is {total:.3f} nats, and none of {len(values)} dimensions has been active in "
            f"{self.silent} evaluations",
        )
        return readings

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each dimension's part of the fall of the total."""
        names = [name for name in before if name.startswith("dimension ") and math.isfinite(before[name])]
        falls = {name: before[name] - after.get(name, math.nan) for name in names}
        total = sum(falls.values())
        return {name: fall / total for name, fall in falls.items()} if total > 0 else {}

    def kept(self) -> dict[str, Any]:
        """How long all has been silent."""
        return {"silent": self.silent}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`."""
        self.silent = state["silent"]

    # ---- pictures ----

    def curve(self, result: PosteriorKLResult) -> list[float]:
        """The total."""
        return [float(result.total)]

    def draw(self, result: PosteriorKLResult, board: Board) -> None:
        """Histogram, charts and panel."""
        board.histogram("per dimension", result.per_dimension)
        if len(result.per_dimension) <= MAX_DIMENSION_TAGS:
            board.chart("every dimension", "Multiline", [f"dimension_{i}" for i in range(len(result.per_dimension))])
        board.chart("active units", "Multiline", ["active_units"])
        board.picture("panel", self._panel(result, board.step, []))

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel with the dimensions marked."""
        marked = [int(name.split()[1]) for name in finding.names if name.startswith("dimension ")]
        board.picture("picture", self._panel(self.result, finding.step, marked, str(finding)))

    def _panel(self, result: PosteriorKLResult, step: int, marked: list[int], note: str = "") -> Tensor:
        order = result.per_dimension.nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        names, alarmed = [str(i) for i in order], [i in marked for i in order]
        dead = [str(i) for i, alive in enumerate(result.active.tolist()) if not alive]
        rows = [
            panels.Row(
                panels.INK,
                f"total {float(result.total):.2f} nats; {float(result.aggregate_kl):.2f} or more is mismatch with the prior",
            )
        ]
        if dead:
            shown = ", ".join(dead[:12]) + (f" and {len(dead) - 12} more" if len(dead) > 12 else "")
            rows.insert(0, panels.Row(panels.ALARM, f"not active: {shown}", strong=True))
        steps, totals = [int(row[0]) for row in self._curve], [row[1] for row in self._curve]
        most = max([value for value in totals if math.isfinite(value)] or [1.0]) * 1.05 or 1.0
        return panels.panel(
            f"{float(result.total):.1f} nats in {int(result.active_units)} of {len(order)} latent dimensions (step {step})",
            [
                panels.Tile(
                    "KL of each dimension, nats",
                    panels.bars(result.per_dimension[order].tolist(), names, alarmed, floor=0.0),
                ),
                panels.Tile(
                    "its std over all data, 1 = prior",
                    panels.bars(result.aggregate_variance[order].sqrt().tolist(), names, alarmed, floor=0.0),
                ),
                panels.Tile("total KL, nats", panels.line(totals, steps, most)),
            ],
            rows,
            note,
        )


def _silence(nats: float) -> float:
    """0 for what carries a nat or more, then the logarithm of how much less it is."""
    return math.nan if nats != nats else max(0.0, math.log(FEW / max(nats, LEAST)))
