"""A Gaussian mixture over latents with its clusters, margins and grey area, regions from which latents can be sampled."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable
from lightning_gendiag.model.features import SKLEARN_MISSING

Kind = Literal["prior", "cluster", "margin", "grey"]
KINDS: tuple[Kind, ...] = ("prior", "cluster", "margin", "grey")
"""Kinds of points: from the prior N(0, 1), deep inside one component, in the valley between two, where components overlap."""

SURE, UNSURE = 0.9, 0.6
"""The largest responsibility is at least SURE inside a cluster, and at most UNSURE in the grey area."""

INSIDE = 0.9
"""A cluster is the part of its component that contains this probability."""

DEEP = 0.05
"""Nats by which a valley must lie below the lower of its two peaks to count as a margin."""

BELOW = 3.0
"""Nats below the saddle of a margin down to which points still belong to it."""

GRID = 65
"""Number of points on a segment between two means."""

COLLAPSED = 1e-3
"""Standard deviation over all dimensions below which the latents count as one point."""

REGULARISATION = 1e-6
"""Fraction of the variance of the latents that is added to variances."""

MAX_DIMS = 64
"""Largest number of dimensions of the mixture; of longer latents, it is fitted to so many principal components."""

FULL_ROWS = 20
"""Smallest number of rows per dimension for full covariances; they are diagonal for fewer rows."""


@loggable
class LatentRegionsResult(NamedTuple):
    """Regions of a latent space with K components, M margins and C classes.

    Latents of L > 64 dimensions are described by points of D = 64 principal components, others by themselves, so D = L.
    Without latents all fields are nan or empty.
    """

    weights: Tensor
    """(K,) weights of the components, adding to one."""
    means: Tensor
    """(K, D) means of the components."""
    covariances: Tensor
    """(K, D, D) covariances of the components."""
    margins: Tensor
    """(M, 2) neighbouring components with a valley of density between them."""
    saddles: Tensor
    """(M, D) points of lowest density on the segments between the means of these components."""
    depths: Tensor
    """(M,) nats by which the saddle lies below the lower of the two peaks."""
    widths: Tensor
    """(M,) length of the part of the segment that lies in the lower half of this depth."""
    typical: Tensor
    """() median log density of the latents, above which the grey area lies."""
    overlap: Tensor
    """() mean over the latents of one minus the largest responsibility: how often the component is guessed wrongly."""
    grey_share: Tensor
    """() fraction of the latents that lie in the grey area."""
    spread: Tensor
    """() standard deviation of the latents over all dimensions."""
    invalid: Tensor
    """() fraction of the latents that contain nan or inf and are left out."""
    classes: Tensor
    """(C,) labels that occur, ascending."""
    class_share: Tensor
    """(K, C) shares of the classes among the latents of each component; rows add to one."""
    grey_classes: Tensor
    """(C,) fraction of the latents of each class that lie in the grey area."""
    fid: Tensor
    """(4,) Fréchet distance of images decoded from each of ``KINDS`` to real images; nan where not measured."""
    inception: Tensor
    """(4,) inception score of the same images, 1 to C; nan where not measured."""
    decoded_share: Tensor
    """(K, C) shares of the classes among images decoded from inside each component; nan where not measured."""
    axes: Tensor
    """(L, D) principal components of the latents; (0, 0) where D = L."""
    centre: Tensor
    """(L,) mean of the latents; (0,) where D = L."""

    # ---- the coordinates ----

    def project(self, latents: Tensor) -> Tensor:
        """Returns the points (n, D) of latents (n, L)."""
        return (latents.to(self.axes) - self.centre) @ self.axes if len(self.axes) else latents

    def latents_of(self, points: Tensor) -> Tensor:
        """Returns the latents (n, L) of points (n, D)."""
        return points.to(self.axes) @ self.axes.T + self.centre if len(self.axes) else points

    # ---- the mixture ----

    def log_density(self, z: Tensor) -> Tensor:
        """Computes the log density (n,) at latents (n, L)."""
        return self._joint(self.project(z)).logsumexp(1)

    def responsibilities(self, z: Tensor) -> Tensor:
        """Computes the posterior probabilities of the components (n, K) at latents (n, L); rows add to one."""
        return self._joint(self.project(z)).softmax(1)

    def _joint(self, z: Tensor) -> Tensor:
        """Computes the log of weight times density of each component (n, K) at points (n, D)."""
        joint: Tensor = self.weights.log() - 0.5 * (
            self._distances(z) + torch.linalg.slogdet(self.covariances)[1] + self.means.shape[1] * math.log(2 * math.pi)
        )
        return joint

    def _distances(self, z: Tensor) -> Tensor:
        """Computes squared Mahalanobis distances (n, K) of points (n, D) from the components."""
        roots = torch.linalg.cholesky(self.covariances)
        whitening = torch.linalg.inv(roots)  # (K, D, D)
        # relative to a point among the means, so that no digits are lost where all are far from 0
        centre = self.means.mean(0)
        means = (whitening @ (self.means - centre)[..., None]).flatten()
        white = (z.to(centre) - centre) @ whitening.flatten(0, 1).T - means  # (n, D) @ (D, K * D) -> (n, K * D)
        distances: Tensor = white.square_().unflatten(1, self.means.shape).sum(2)
        return distances

    # ---- the regions ----

    def inside(self, kind: Kind, z: Tensor) -> Tensor:
        """Returns booleans (n,), true for latents (n, L) that are of a kind; all are of the kind ``"prior"``."""
        return self._inside(kind, self.project(z))

    def _inside(self, kind: Kind, z: Tensor) -> Tensor:
        """Returns booleans (n,), true for points (n, D) that are of a kind."""
        if kind == "prior" or not self._has(kind):
            return torch.full((len(z),), kind == "prior", device=z.device)
        if kind == "cluster":
            from scipy.stats import chi2

            sure, own = surest(self._joint(z))
            near = self._distances(z).gather(1, own[:, None])[:, 0] <= float(chi2.ppf(INSIDE, self.means.shape[1]))
            return (sure >= SURE) & near
        if kind == "grey":
            joint = self._joint(z)
            return (surest(joint)[0] <= UNSURE) & (joint.logsumexp(1) >= self.typical)
        nearest = torch.cdist(z.double(), self.saddles).argmin(1)
        above = self._joint(z).logsumexp(1) - self._joint(self.saddles).logsumexp(1)[nearest]
        return (above <= self.depths[nearest] / 2) & (above >= -BELOW)

    def _has(self, kind: Kind) -> bool:
        """Returns whether there may be points of a kind other than ``"prior"``."""
        return len(self.margins if kind == "margin" else self.weights) > 0

    def sample(
        self, kind: Kind, n: int, generator: torch.Generator | None = None, component: int | None = None
    ) -> Tensor:
        """Samples latents of a kind, on the CPU.

        Those of the prior vary in all L dimensions, and others in the D of the mixture. Inside clusters and in the grey
        area they follow the mixture restricted to the region. At a margin they follow a normal distribution around the
        saddle, restricted to the valley, whose standard deviation is a quarter of the width.

        Args:
            kind: one of ``KINDS``.
            n: number of latents.
            generator: source of randomness; None for the global one.
            component: cluster from which to sample; None for all clusters.

        Returns:
            (n, L) latents in float64; (0, L) where there is no such region, and fewer than n where the region is too small
            to be found by chance.

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}. To fix this, pass one of these.")
        dims = self.means.shape[1]
        length = len(self.centre) or dims
        if kind == "prior":
            return torch.randn(n, length, generator=generator, dtype=torch.float64)
        own = LatentRegionsResult(*(part.cpu() for part in self))
        if not own._has(kind):
            return torch.zeros(0, length, dtype=torch.float64)
        roots = torch.linalg.cholesky(own.covariances)
        found: list[Tensor] = []
        for _ in range(50):
            noise = torch.randn(4 * n, dims, generator=generator, dtype=torch.float64)
            if kind == "margin":
                which = torch.randint(len(own.margins), (4 * n,), generator=generator)
                z = own.saddles[which] + noise * own.widths[which, None] / 4
            else:
                which = torch.multinomial(own.weights, 4 * n, replacement=True, generator=generator)
                which = which if component is None else torch.full_like(which, component)
                spread = (noise @ roots.flatten(0, 1).T).unflatten(1, own.means.shape)  # (4 n, K, D)
                z = own.means[which] + spread[torch.arange(4 * n), which]
            inside = own._inside(kind, z)
            if component is not None:
                # a broad component may surround a narrow one
                inside &= own._joint(z).argmax(1) == component
            found.append(z[inside])
            if sum(map(len, found)) >= n:
                break
        return own.latents_of(torch.cat(found)[:n])

    # ---- derived quantities ----

    @property
    def class_entropy(self) -> Tensor:
        """(K,) entropy in nats of the classes within each component, 0 where it contains one class."""
        return entropy(self.class_share)

    @property
    def decoded_entropy(self) -> Tensor:
        """(K,) entropy in nats of the classes that each component decodes to."""
        return entropy(self.decoded_share)

    @property
    def collapsed(self) -> bool:
        """Whether all latents are one point."""
        return bool(self.spread < COLLAPSED)

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of the geometry, and those of the quality where it was measured, each of shape ()."""
        nan = torch.full_like(self.spread, math.nan)
        values = {
            "components": nan.new_tensor(len(self.weights)),
            "margins": nan.new_tensor(len(self.margins)),
            "overlap": self.overlap,
            "grey_share": self.grey_share,
            "spread": self.spread,
            "invalid": self.invalid,
        }
        if len(self.margins):
            values |= {"margin_width": self.widths.mean(), "margin_depth": self.depths.mean()}
        if len(self.classes):
            values["class_entropy"] = weighted(self.class_entropy, self.weights)
        if not self.decoded_share.isnan().all():
            values["decoded_entropy"] = weighted(self.decoded_entropy, self.weights)
        for name, numbers in (("fid", self.fid), ("inception_score", self.inception)):
            values |= {f"{name}_{kind}": v for kind, v in zip(KINDS, numbers, strict=True) if not v.isnan()}
        for kind in ("margin", "grey"):
            gap = self.fid[KINDS.index(kind)] / self.fid[0]
            if not gap.isnan():
                values[f"gap_{kind}"] = gap
        return values


def latent_regions(
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    components: int | None = None,
    max_components: int = 12,
    seed: int = 0,
) -> LatentRegionsResult:
    """Fits a Gaussian mixture to latents, or to 64 principal components of them, and finds its clusters, margins and grey area.

    The mixture is that of scikit-learn, with full covariances for at least 20 rows per dimension and diagonal ones
    otherwise. For each pair of means the deepest valley of the density on the segment between them is found. It counts as a
    margin unless a third component has most of the density somewhere on the segment.

    Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation*.

    Args:
        latents: (N, D) floats; rows with nan or inf are left out.
        labels: (N,) integers, negative where a class is unknown; None where all are unknown.
        components: K; None for the number up to ``max_components`` with the lowest Bayesian information criterion.
        max_components: largest number that is considered.
        seed: seed of the first guess of the mixture.

    Returns:
        The regions, on the CPU.

    Raises:
        ValueError: if shapes or types do not match.
        ModuleNotFoundError: if scikit-learn is not installed.

    Example:
        >>> z = torch.cat([torch.randn(200, 2) - 4, torch.randn(200, 2) + 4])
        >>> regions = latent_regions(z, components=2)
        >>> bool(regions.saddles.abs().max() < 1), regions.sample("margin", 100).shape
        (True, torch.Size([100, 2]))
    """
    check(latents, labels)
    z = latents.detach().double().cpu()
    known = torch.full((len(z),), -1) if labels is None else labels.detach().long().cpu()
    finite = z.isfinite().all(1)
    nan = torch.full((), math.nan, dtype=torch.float64)
    invalid = 1 - finite.double().mean() if len(z) else torch.zeros((), dtype=torch.float64)
    z, known = z[finite], known[finite]
    classes = torch.unique(known[known >= 0])
    spread = (z - z.mean(0)).square().sum(1).mean().sqrt() if len(z) else nan
    centre, axes = (
        principal_components(z) if len(z) and z.shape[1] > MAX_DIMS else (nan.new_zeros(0), nan.new_zeros(0, 0))
    )
    if len(z) == 0:
        weights, means, covariances = nan.new_zeros(0), nan.new_zeros(0, z.shape[1]), nan.new_zeros(0, *2 * z.shape[1:])
    else:
        weights, means, covariances = fit_mixture(
            (z - centre) @ axes if len(axes) else z, components, max_components, seed
        )
    k = len(weights)
    result = LatentRegionsResult(
        weights, means, covariances,
        margins=torch.zeros(0, 2, dtype=torch.long), saddles=nan.new_zeros(0, means.shape[1]), depths=nan.new_zeros(0),
        widths=nan.new_zeros(0), typical=nan, overlap=nan, grey_share=nan,
        spread=spread, invalid=invalid, classes=classes, class_share=nan.new_full((k, len(classes)), math.nan),
        grey_classes=nan.new_full((len(classes),), math.nan),
        fid=nan.expand(4).clone(), inception=nan.expand(4).clone(), decoded_share=nan.new_full((k, len(classes)), math.nan),
        axes=axes, centre=centre,
    )  # fmt: skip
    if k == 0:
        return result
    sure, own = result.responsibilities(z).max(1)
    result = result._replace(typical=result.log_density(z).median(), overlap=(1 - sure).mean())
    grey = result.inside("grey", z)
    member = torch.nn.functional.one_hot(own, k).double()
    which = (known[:, None] == classes).double()  # (N, C)
    counts = member.T @ which
    margins, saddles, depths, widths = _margins(result)
    return result._replace(
        margins=margins,
        saddles=saddles,
        depths=depths,
        widths=widths,
        grey_share=grey.double().mean(),
        class_share=counts / counts.sum(1, keepdim=True),
        grey_classes=(which * grey[:, None]).sum(0) / which.sum(0),
    )


def principal_components(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (L,) and the first min(64, L, N) principal components (L, D) of rows (N, L), N > 0."""
    centre, dims = z.mean(0), min(MAX_DIMS, *z.shape)
    away = z - centre
    if len(z) >= z.shape[1]:
        return centre, torch.linalg.eigh(away.T @ away)[1][:, -dims:].flip(1)
    rows = torch.linalg.eigh(away @ away.T)[1][:, -dims:].flip(1)
    # orthonormal also where latents vary in fewer directions than are asked for
    return centre, torch.linalg.qr(away.T @ rows)[0]


def entropy(shares: Tensor) -> Tensor:
    """Computes the entropy (K,) in nats of shares (K, C)."""
    terms: Tensor = torch.special.entr(shares)
    return terms.sum(1)


def inception_score(probabilities: Tensor) -> Tensor:
    """Inception score: ``exp`` of the mean divergence ``KL(p_i || mean p)`` of images' class probabilities from their mean.

    Salimans et al., *Improved Techniques for Training GANs*, 2016.

    Args:
        probabilities: (n, K), rows add to one.

    Returns:
        () from 1, where all images have the same probabilities, to K.

    Example:
        >>> inception_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        tensor(1.5874)
    """
    mean = probabilities.mean(0, keepdim=True)  # (1, K)
    score: Tensor = (entropy(mean)[0] - entropy(probabilities).mean()).exp()
    return score


def surest(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest of the probabilities that are proportional to the exponentials of (n, K), and its number, (n,)."""
    most, own = joint.max(1)
    return (most - joint.logsumexp(1)).exp(), own


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Computes the () mean of values (K,) with weights (K,) over the values that are not nan; nan where all are."""
    known = ~values.isnan()
    return (values[known] * weights[known]).sum() / weights[known].sum()


def check(latents: Tensor, labels: Tensor | None) -> None:
    """Checks the arguments of :func:`latent_regions`.

    Raises:
        ValueError: if shapes or types do not match.
    """
    if latents.ndim != 2 or not latents.is_floating_point() or latents.shape[1] == 0:
        raise ValueError(
            f"latents must be (N, D) of floats, got {latents.dtype} of shape {tuple(latents.shape)}. "
            "To fix this, flatten them: latents.flatten(1)."
        )
    if labels is not None and (labels.shape != latents.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be ({len(latents)},) integers, got {labels.dtype} of shape {tuple(labels.shape)}. "
            "To fix this, pass one class number per latent, negative where it is unknown."
        )


def fit_mixture(z: Tensor, components: int | None, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fits a mixture to latents, with components in the order of falling weight.

    Args:
        z: (N, D) latents in float64, on the CPU.
        components: K, or None to choose it.
        most: largest K that is considered.
        seed: seed of the first guess.

    Returns:
        Weights (K,), means (K, D) and covariances (K, D, D).

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ModuleNotFoundError(SKLEARN_MISSING.format(who="a Gaussian mixture")) from error
    centre = z.mean(0)
    # latents are standardised, so that what is added to variances does not depend on their scale
    scale = float((z - centre).square().mean().sqrt())
    scale = scale if scale > 1e-12 else 1.0
    x = ((z - centre) / scale).numpy()
    distinct = len(torch.unique(z, dim=0))
    most = min(distinct, max(1, len(z) // 2), components or most)
    shape = "full" if len(z) >= FULL_ROWS * z.shape[1] else "diag"
    best, lowest, since = None, math.inf, 0
    for k in [most] if components else range(1, most + 1):
        model = GaussianMixture(k, covariance_type=shape, reg_covar=REGULARISATION, random_state=seed)
        with warnings.catch_warnings():
            # a fit that has not converged is good enough for regions, and k-means warns of few distinct points
            warnings.simplefilter("ignore")
            try:
                model.fit(x if len(x) > 1 else x.repeat(2, 0))
            except ValueError:
                # ill-conditioned, so a mixture of fewer components is used
                continue
        bic = model.bic(x)
        since = 0 if bic < lowest else since + 1
        if bic < lowest or best is None:
            best, lowest = model, bic
        if since == 3:
            break
    if best is None:
        flat = (scale**2) * (torch.eye(z.shape[1], dtype=torch.float64) + ((z - centre) / scale).T.cov(correction=0))
        return torch.ones(1, dtype=torch.float64), centre[None], flat[None]
    weights, means = torch.from_numpy(best.weights_), torch.from_numpy(best.means_)
    covariances = torch.from_numpy(best.covariances_)
    covariances = torch.diag_embed(covariances) if shape == "diag" else covariances
    order = weights.argsort(descending=True, stable=True)
    return weights[order], means[order] * scale + centre, covariances[order] * scale**2


def _margins(mixture: LatentRegionsResult) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds margins and returns pairs (M, 2), saddles (M, D), depths (M,) and widths (M,)."""
    k = len(mixture.means)
    pairs = torch.triu_indices(k, k, 1).T  # (P, 2)
    start, stop = mixture.means[pairs[:, 0]], mixture.means[pairs[:, 1]]

    def along(t: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the log density, and the responsibility of the pair, at positions (P, T) of the segments."""
        points = start[:, None] + t[..., None] * (stop - start)[:, None]
        joint = mixture._joint(points.flatten(0, 1))
        share = joint.softmax(1).view(*t.shape, k)
        own = share.gather(2, pairs[:, None].expand(-1, t.shape[1], -1)).sum(2)
        return joint.logsumexp(1).view(t.shape), own

    t = torch.linspace(0, 1, GRID, dtype=torch.float64).expand(len(pairs), -1)
    density, own = along(t)
    peak_before, peak_after = density.cummax(1)[0], density.flip(1).cummax(1)[0].flip(1)
    depth, place = (torch.minimum(peak_before, peak_after) - density).max(1)
    # refines the position of the lowest point of each valley five times
    centre, half = t.gather(1, place[:, None]), 1 / (GRID - 1)
    for _ in range(5):
        fine = (centre + torch.linspace(-half, half, 33, dtype=torch.float64)).clamp(0, 1)
        lows, index = along(fine)[0].min(1)
        centre, half = fine.gather(1, index[:, None]), half / 16
    lower = torch.minimum(peak_before, peak_after).gather(1, place[:, None])[:, 0]
    depth = torch.where(depth > 0, lower - lows, depth)
    margin = (depth > DEEP) & (own.amin(1) >= 0.5)
    # the part of the segment around the saddle that lies in the lower half
    below = density < (lows + depth / 2)[:, None]
    index = torch.arange(GRID)
    left = torch.where(~below & (index <= place[:, None]), index, -1).amax(1)
    right = torch.where(~below & (index >= place[:, None]), index, GRID).amin(1)
    length = (stop - start).norm(dim=1)
    width = (right - left - 1).clamp(min=1) / (GRID - 1) * length
    saddles = start + centre * (stop - start)
    return pairs[margin], saddles[margin], depth[margin], width[margin]
