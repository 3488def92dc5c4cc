"""Galperin and Koethe, *Analyzing Generative Models by Manifold Entropic Metrics*: moons, a torus, flows and beta-VAEs."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type, union-attr, no-untyped-call"

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import trained
from benchmarks.papers.data import padded_digits, split_digits
from benchmarks.papers.study import Finding, Part, holds
from benchmarks.zoo.flows import Coupling, Flow, Glow, RealNVP
from example_models.vae import VAE
from lightning_gendiag import (
    ManifoldEntropy,
    ManifoldEntropyResult,
    decoder_gram,
    manifold_cross_information,
    manifold_entropy,
    posterior_kl,
)
from lightning_gendiag.diagnostics.manifold_entropy.functional import HALF_LOG_2PIE, latent_correlation

MOON_STEPS, TORUS_STEPS, DENSE_STEPS, CONVOLUTION_STEPS, BETA_EPOCHS = 1000, 2000, 1200, 700, 6
"""How long the models of each part are trained."""

Loss = Callable[[Flow, Tensor, Tensor], Tensor]
"""A loss of a flow, its latents and the data."""


class Dense(Flow):
    """Affine couplings of rows, which are scaled and shifted at last.

    Args:
        features: Length of the rows.
        width: Of the networks.
        layers: Number of couplings.
    """

    def __init__(self, features: int, width: int, layers: int) -> None:
        order = torch.arange(features)
        masks = [(order % 2 == number % 2).float() for number in range(layers)]
        super().__init__((features,), 1e-3, (Coupling(mask, width) for mask in masks))

    def folded(self, x: Tensor) -> Tensor:
        """Returns rows (N, D)."""
        return x

    def unfolded(self, z: Tensor) -> Tensor:
        """Returns rows (N, D)."""
        return z


def nll(flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns latents (N, L) and the negative log density (N,) in nats."""
    z, determinant = flow.transform(x)
    return z, 0.5 * (z.square() + math.log(2 * math.pi)).sum(1) - determinant


def kept(flow: Flow, z: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """Returns the squared error (N,) of data that are decoded from those latents alone that are kept."""
    return (flow.decode(z * keep) - x).flatten(1).square().sum(1)


def fitted(flow: Flow, batch: Callable[[], Tensor], steps: int, extra: Loss | None = None, lr: float = 2e-3) -> Flow:
    """Trains a flow by its likelihood and an additional loss."""
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        x = batch()
        z, losses = nll(flow, x)
        loss = losses.mean() + (extra(flow, z, x) if extra else 0.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return flow.eval().requires_grad_(False)


def jacobians(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Returns the Jacobians (N, X, L) of a decoder."""
    stacked: Tensor = torch.func.vmap(torch.func.jacfwd(lambda row: decode(row[None])[0].flatten()))(z)
    return stacked


def moon_points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns standardised points (n, 2) on two half circles, and the number of the half circle of each."""
    points, moon = make_moons(n, noise=0.1, random_state=seed)
    x = torch.from_numpy(points).float()
    return (x - x.mean(0)) / x.std(0), torch.from_numpy(moon)


def moons(seed: int) -> Part:
    """Figure 1: three flows of equal likelihood with different representations."""
    points, moon = moon_points(4096, seed)
    held_out, of_held_out = moon_points(4096, seed + 1)
    chosen = torch.zeros(128, dtype=torch.long)

    def batch() -> Tensor:
        chosen.random_(len(points))
        return points[chosen].requires_grad_()

    def shared(z: Tensor, x: Tensor) -> Tensor:
        """The information that both share: columns of a 2x2 Jacobian meet at the angle of its inverse's rows."""
        rows = [torch.autograd.grad(z[:, i].sum(), x, create_graph=True)[0] for i in range(2)]
        cosine = F.cosine_similarity(*rows)
        return -0.5 * torch.log1p(-cosine.square() * 0.9999).mean()

    def entangled(flow: Flow, z: Tensor, x: Tensor) -> Tensor:
        return -0.3 * shared(z, x).clamp(max=1.0)

    def inconsistent(flow: Flow, z: Tensor, x: Tensor) -> Tensor:
        # each moon has a dimension of its own that draws it
        keep = F.one_hot(moon[chosen], 2).float()
        return shared(z, x) + 2 * kept(flow, z, x, keep).mean()

    def aligned(flow: Flow, z: Tensor, x: Tensor) -> Tensor:
        return shared(z, x) + 2 * kept(flow, z, x, torch.tensor([1.0, 0.0])).mean()

    losses = {"A, entangled": entangled, "B, orthogonal, not aligned": inconsistent, "C, aligned": aligned}
    rows, values = [], []
    for name, loss in losses.items():
        flow = fitted(Dense(2, 32, 8), batch, MOON_STEPS, loss)
        z, density = nll(flow, held_out)
        j = jacobians(flow.decode, z)
        r = manifold_entropy(j)
        by_moon = [manifold_entropy(j[of_held_out == k]).entropy for k in range(2)]
        row = [float(density.mean()), *r.entropy.tolist(), float(r.mutual_information[0, 1]), float(r.total)]
        swaps = "yes" if (by_moon[0].argmax() != by_moon[1].argmax()) else "no"
        rows.append([name, *row, swaps])
        values.append(row)
    a, b, c = values
    densities, totals = [row[0] for row in values], [row[4] for row in values]
    spread = max(densities) - min(densities)
    likeliest = max(abs(row[1] + row[2] - row[3] - row[4]) for row in values)
    findings = [
        Finding(
            "Figure 1: three models have equal accuracy, and the total entropy is the signed sum of three terms",
            f"likelihoods differ by {spread:.2f} nats, totals by {max(totals) - min(totals):.2f}; the sum is "
            f"exact to {likeliest:.0e}",
            holds(spread < 0.1, likeliest < 1e-6),
        ),
        Finding(
            "A: high mutual information shows that the latents are entangled",
            f"{a[3]:.2f} nats against {b[3]:.2f} of B and {c[3]:.2f} of C",
            holds(a[3] > 3 * max(b[3], c[3])),
        ),
        Finding(
            "B: low mutual information, but both entropies are comparable, since each moon has its own main dimension",
            f"{b[3]:.2f} nats; the entropies differ by {abs(b[1] - b[2]):.2f} nats; the main dimension changes "
            f"between moons: {rows[1][-1]}",
            holds(b[3] < a[3] / 3, abs(b[1] - b[2]) < abs(c[1] - c[2]) / 2, rows[1][-1] == "yes"),
        ),
        Finding(
            "C: high entropy of the important dimension, low entropy of the other, and little mutual information",
            f"{c[1]:.2f} against {c[2]:.2f} nats, which share {c[3]:.2f}",
            holds(c[1] > c[2] + 1, c[3] < a[3] / 3),
        ),
    ]
    return Part(["flow", "negative log likelihood", "H_c", "H_d", "I", "H", "moons swap dimensions"], rows, findings)


ANGLES = 10
ANGLE_SPREADS = torch.linspace(0.5, 1.1, ANGLES).flip(0)
RADIUS_SPREADS = torch.linspace(0.04, 0.12, ANGLES).flip(0)


@cache
def rotation() -> Tensor:
    """(20, 20) rotation."""
    return torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1))).Q


def torus_points(z: Tensor) -> Tensor:
    """Returns the points (N, 20) of ten angles and ten radii, which are latents (N, 20) times their spreads."""
    angle, radius = z[:, :ANGLES] * ANGLE_SPREADS, 1 + z[:, ANGLES:] * RADIUS_SPREADS
    flat = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)
    return (flat - _torus_centre()) @ rotation().T


def _torus_centre() -> Tensor:
    """(20,) mean of the points before the rotation."""
    return torch.stack([(-ANGLE_SPREADS.square() / 2).exp(), torch.zeros(ANGLES)], 1).flatten()


class Turned(Dense):
    """The same after a rotation that is learnt."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__(features, width, layers)
        self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(features, features, bias=False))

    def folded(self, x: Tensor) -> Tensor:
        """Returns rotated rows (N, D)."""
        return x @ self.turn.weight.T

    def unfolded(self, z: Tensor) -> Tensor:
        """Returns rows (N, D) that are rotated back."""
        return z @ self.turn.weight


def torus(seed: int) -> Part:
    """Figure 2: a torus of known spectrum, learnt and not learnt."""

    def batch() -> Tensor:
        return torus_points(torch.randn(256, 2 * ANGLES))

    def nested(flow: Flow, z: Tensor, x: Tensor) -> Tensor:
        size = torch.randint(1, 2 * ANGLES, (len(z), 1))
        return 20 * kept(flow, z, x, (torch.arange(2 * ANGLES) < size).float()).mean()

    truth = torch.randn(256, 2 * ANGLES, generator=torch.Generator().manual_seed(2))
    x = torus_points(truth)
    j = jacobians(torus_points, truth)
    spectrum = manifold_entropy(j).spectrum
    exact = HALF_LOG_2PIE + torch.cat([ANGLE_SPREADS, RADIUS_SPREADS]).double().log()
    rows, values = [], {}
    for name, loss in (("likelihood alone", None), ("likelihood and nested reconstruction", nested)):
        flow = fitted(Turned(2 * ANGLES, 96, 10), batch, TORUS_STEPS, loss)
        z, density = nll(flow, x)
        own = jacobians(flow.decode, z)
        error = float((manifold_entropy(own).spectrum - spectrum).abs().mean())
        cross, pearson = manifold_cross_information(own, j), latent_correlation(z, truth).abs()
        shares = [_matched(matrix) for matrix in (cross, pearson)]
        correlation = float(manifold_entropy(own).total_correlation)
        rows.append([name, float(density.mean()), error, correlation, *shares])
        values[name] = rows[-1][1:]
    plain, learnt = values.values()
    known = float((manifold_entropy(j).entropy - exact).abs().max())
    findings = [
        Finding(
            "the spectrum is known: half of (1 + log 2 pi) plus the log of each spread, with no mutual information",
            f"the metric of the true decoder differs from it by at most {known:.3f} nats",
            holds(known < 0.05),
        ),
        Finding(
            "Figure 2: cross information is diagonal if the true process was learnt, and not otherwise",
            f"{learnt[3]:.0%} of it is on the diagonal with nested reconstruction, {plain[3]:.0%} with "
            "likelihood alone",
            holds(learnt[3] > 0.6, plain[3] < learnt[3] - 0.2),
        ),
        Finding(
            "Figure 2: diagonal cross information goes with a diagonal Pearson correlation",
            f"{learnt[4]:.0%} and {plain[4]:.0%} of the correlation are on the diagonal",
            holds(learnt[4] > plain[4]),
        ),
        Finding(
            "Figure 2: the spectrum shows whether the true process was learnt",
            f"it differs by {learnt[1]:.2f} nats from the true one, by {plain[1]:.2f} with likelihood alone",
            holds(learnt[1] < plain[1]),
        ),
    ]
    columns = [
        "flow",
        "negative log likelihood",
        "mean difference of the spectrum",
        "total correlation",
        "share of cross information on the diagonal",
        "share of correlation on the diagonal",
    ]
    return Part(columns, rows, findings)


def _matched(matrix: Tensor) -> float:
    """The share of a matrix that is on its diagonal after the best permutation."""
    rows, columns = linear_sum_assignment(-matrix.numpy())
    return float(matrix[rows, columns].sum() / matrix.sum())


SIDE = 16


class WaveletFlow(Flow):
    """Couplings of Haar coefficients, level by level: details are changed by what coarser coefficients show.

    Args:
        width: Number of channels of the networks.
        steps: Number of couplings on each level.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__((1, SIDE, SIDE), 1e-3, [])
        haar = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        self.register_buffer("haar", haar)
        self.levels = nn.ModuleList(
            nn.ModuleList(DetailStep(width, number % 3) for number in range(steps)) for _ in range(4)
        )
        self.coarse = nn.Parameter(torch.zeros(2))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns latents (N, D), fine details first, and the logarithm of the determinant (N,)."""
        total, parts = torch.zeros(len(x)), []
        for steps in self.levels:
            blocks = torch.einsum("ij,njhw->nihw", self.haar, F.pixel_unshuffle(x, 2))
            x, details = blocks[:, :1], blocks[:, 1:]
            for step in steps:
                details, determinant = step(details, x)
                total = total + determinant
            parts.append(details.flatten(1))
        parts.append(x.flatten(1) * self.coarse[0].exp() + self.coarse[1])
        return torch.cat(parts, 1), total + self.coarse[0]

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        sizes = [3 * (SIDE >> level) ** 2 for level in range(1, 5)]
        *parts, last = z.split([*sizes, 1], 1)
        x = ((last - self.coarse[1]) * (-self.coarse[0]).exp()).view(-1, 1, 1, 1)
        for steps, part in zip(reversed(self.levels), reversed(parts), strict=True):
            details = part.view(-1, 3, x.shape[2], x.shape[3])
            for step in list(steps)[::-1]:
                details = step.inverse(details, x)
            x = F.pixel_shuffle(torch.einsum("ji,njhw->nihw", self.haar, torch.cat([x, details], 1)), 2)
        return x


class DetailStep(nn.Module):
    """Scales and shifts one of three channels of details by what the coarser image and the other two show.

    Args:
        width: Number of channels of the network.
        channel: The channel that is changed.
    """

    def __init__(self, width: int, channel: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(3) == channel).float()[:, None, None])
        self.net = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, 6, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def terms(self, details: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logarithms of scales, and shifts."""
        scale, shift = self.net(torch.cat([details * (1 - self.mask), coarse], 1)).chunk(2, 1)
        return torch.tanh(scale / 3) * 3 * self.mask, shift * self.mask

    def forward(self, details: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result (N, 3, H, W) and the logarithm of the determinant (N,)."""
        scale, shift = self.terms(details, coarse)
        return details * scale.exp() + shift, scale.flatten(1).sum(1)

    def inverse(self, details: Tensor, coarse: Tensor) -> Tensor:
        """Returns what ``forward`` was given."""
        scale, shift = self.terms(details, coarse)
        return (details - shift) * (-scale).exp()


class Preserving(Coupling):
    """A coupling that preserves volume, as in GIN: the logarithms of its scales add up to zero."""

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logarithms of scales, and shifts."""
        scale, shift = super().terms(x)
        free = 1 - self.mask
        return (scale - scale.sum(1, keepdim=True) / free.sum()) * free, shift


class GIN(RealNVP):
    """A flow that preserves volume, whose latents are normal in each class with a mean and a spread that are learnt.

    Args:
        width: Of the networks.
        layers: Number of couplings.
        num_classes: K.
    """

    def __init__(self, width: int, layers: int, num_classes: int) -> None:
        super().__init__((1, SIDE, SIDE), width, 1e-3, layers)
        self.layers = nn.ModuleList(Preserving(layer.mask, width) for layer in self.layers)
        self.mean = nn.Parameter(torch.zeros(num_classes, self.latent_dim))
        self.log_spread = nn.Parameter(torch.zeros(num_classes, self.latent_dim))

    def density(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the negative log density (N,) in nats."""
        z, _ = self.transform(x)
        spread = self.log_spread[labels]
        scaled = (z - self.mean[labels]) * (-spread).exp()
        return (0.5 * (scaled.square() + math.log(2 * math.pi)) + spread).sum(1)


NOISE, HELD_OUT, LATENTS = 0.1, 500, 24
"""Standard deviation of noise on images, as a density of grey levels needs; images not trained on; latents evaluated."""


def flow_entropies(flow: Flow) -> ManifoldEntropyResult:
    """Returns the entropies of a flow at latents of the prior."""
    generator = torch.Generator().manual_seed(0)
    metric = ManifoldEntropy(flow.latent_dim)
    for _ in range(LATENTS // 8):
        if isinstance(flow, GIN):
            labels = torch.randint(len(flow.mean), (8,), generator=generator)
            spread = flow.log_spread[labels].exp()
            z = flow.mean[labels] + spread * torch.randn(8, flow.latent_dim, generator=generator)
            metric.update(decoder_gram(flow.decode, z) * spread[:, :, None] * spread[:, None, :])
        else:
            metric.update(decoder_gram(flow.decode, torch.randn(8, flow.latent_dim, generator=generator)))
    return metric.compute()


def flows(seed: int) -> Part:
    """Figures 3 to 5: flows of digits by architecture and by loss."""
    images, labels, held_out, of_held_out = split_digits(HELD_OUT, seed)
    held_out = held_out + NOISE * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(128, dtype=torch.long)

    def batch() -> Tensor:
        chosen.random_(len(images))
        return images[chosen] + NOISE * torch.randn(len(chosen), 1, SIDE, SIDE)

    def core(size: int, flow: Flow, z: Tensor, x: Tensor) -> Tensor:
        return 5 * kept(flow, z, x, (torch.arange(z.shape[1]) < size).float()).mean()

    def dense() -> Flow:
        return RealNVP((1, SIDE, SIDE), 192, 1e-3, 8)

    kinds: dict[str, tuple[Flow, Loss | None, int]] = {
        "couplings of pixels": (dense(), None, DENSE_STEPS),
        "the same, reconstruction from 10": (dense(), partial(core, 10), DENSE_STEPS),
        "the same, reconstruction from 20": (dense(), partial(core, 20), DENSE_STEPS),
        "GLOW-like": (Glow((1, SIDE, SIDE), 48, 1e-3, 8), None, CONVOLUTION_STEPS),
        "wavelet": (WaveletFlow(32, 6), None, CONVOLUTION_STEPS),
    }
    results: dict[str, tuple[float, ManifoldEntropyResult]] = {}
    for name, (flow, loss, steps) in kinds.items():
        fitted(flow, batch, steps, loss)
        results[name] = float(nll(flow, held_out)[1].mean()) / flow.latent_dim, flow_entropies(flow)
    gin = GIN(192, 8, 10)
    optimizer = torch.optim.Adam(gin.parameters(), 2e-3)
    for _ in range(DENSE_STEPS):
        x = batch()
        optimizer.zero_grad()
        gin.density(x, labels[chosen]).mean().backward()
        nn.utils.clip_grad_norm_(gin.parameters(), 10.0)
        optimizer.step()
    gin.eval().requires_grad_(False)
    density = float(gin.density(held_out, of_held_out).mean()) / gin.latent_dim
    results["GIN"] = density, flow_entropies(gin)
    rows = [
        [
            name,
            density,
            float(r.effective_dimensions),
            _norms(r)[0],
            _norms(r)[1],
            float(r.total_correlation) / 256,
            float(r.mutual_information.sum()) / (256 * 255),
        ]
        for name, (density, r) in results.items()
    ]
    spreads = gin.encode(held_out).std(0)
    by_entropy = results["GIN"][1].entropy
    rank = float(spearmanr(spreads, by_entropy).statistic)
    common = len(set(spreads.topk(20).indices.tolist()) & set(by_entropy.topk(20).indices.tolist()))
    plain, ten, twenty = (results[name][1] for name in list(kinds)[:3])
    steps_at = [float(r.entropy[:n].mean() - r.entropy[n:].mean()) for r, n in ((plain, 10), (ten, 10), (twenty, 20))]
    glow, wavelet = (results[name][1] for name in ("GLOW-like", "wavelet"))
    own, other = ((float(r.effective_dimensions), float(r.total_correlation) / 256) for r in (wavelet, glow))
    names = sorted(results, key=lambda name: float(results[name][1].total_correlation))
    measures = [
        [float(value) for value in values]
        for values in zip(*((r.total_correlation, r.effective_dimensions) for _, r in results.values()), strict=True)
    ]
    ratios = [max(values) / min(values) for values in measures]
    most_aligned = sorted(results, key=lambda name: float(results[name][1].effective_dimensions))
    findings = [
        Finding(
            "Figure 3: with a reconstruction loss on 10 or 20 core dimensions, these have the high entropies, unsorted",
            f"their mean entropy is {steps_at[1]:.2f} and {steps_at[2]:.2f} nats above that of the others, and "
            f"without the loss {steps_at[0]:.2f}",
            holds(steps_at[1] > 1, steps_at[2] > 1, steps_at[0] < 0.5),
        ),
        Finding(
            "Figure 4: sorting GIN's latents by their standard deviation misleads about their importance",
            f"the rank correlation with entropy is {rank:.2f}; {common} of the 20 with the largest deviations "
            "are among the 20 with the largest entropies",
            holds(rank < 0.8, common < 15),
        ),
        Finding(
            "Figure 5: a GLOW-like flow and a wavelet flow differ in their spectra and in their matrices of "
            "mutual information",
            f"the wavelet flow has {own[1]:.2f} nats of total correlation a dimension and {own[0]:.0f} effective "
            f"dimensions, the GLOW-like one {other[1]:.2f} and {other[0]:.0f}",
            holds(own[1] < other[1]),
        ),
        Finding(
            "architectures and ways of training can be ranked by how aligned and how disentangled they become",
            f"from little to much total correlation: {'; '.join(names)}. From few to many effective "
            f"dimensions: {'; '.join(most_aligned)}",
            # a ranking of models that hardly differ is none
            holds(ratios[0] > 2, ratios[1] > 1.5),
        ),
    ]
    columns = [
        "flow",
        "negative log likelihood a pixel",
        "effective dimensions of 256",
        "highest entropy",
        "median entropy",
        "total correlation a dimension",
        "mean information of a pair",
    ]
    return Part(columns, rows, findings)


def _norms(r: ManifoldEntropyResult) -> tuple[float, float]:
    """The highest and the median entropy."""
    return float(r.entropy.max()), float(r.entropy.median())


BETAS = (0.01, 0.1, 1.0, 10.0, 30.0, 100.0)


def betas(seed: int) -> Part:
    """The beta-VAEs of the paper: ten and a hundred latent dimensions."""
    images, labels = padded_digits()
    rows: list[list[Any]] = []
    used: dict[int, list[float]] = {10: [], 100: []}
    for length, beta in itertools.product(used, BETAS):
        torch.manual_seed(seed)
        model = VAE(length, beta)
        loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, drop_last=True)
        trained(model, loader, BETA_EPOCHS)
        metric = ManifoldEntropy(length)
        z = torch.randn(64, length, generator=torch.Generator().manual_seed(0))
        model.eval().requires_grad_(False)
        metric.update(decoder_gram(model.decode, z))
        r = metric.compute()
        mean, log_variance = model.encode(images[:1000])
        kl = posterior_kl(mean, log_variance).mean(0)
        strong = int((r.relative > 0.1).sum())
        used[length].append(float(r.effective_dimensions))
        rows.append(
            [length, beta, float(r.effective_dimensions), strong, int((kl > 0.1).sum()), float(r.total_correlation)]
        )
    falls = {length: [b - a for a, b in itertools.pairwise(series)] for length, series in used.items()}
    findings = [
        Finding(
            f"a larger beta silences dimensions one by one, L = {length}",
            f"{', '.join(f'{value:.1f}' for value in used[length])} effective dimensions with beta "
            f"{', '.join(f'{beta:g}' for beta in BETAS)}",
            holds(
                used[length][-1] < 0.7 * used[length][0], sum(change < 0.05 * length for change in falls[length]) >= 4
            ),
        )
        for length in used
    ]
    columns = [
        "L",
        "beta",
        "effective dimensions",
        "dimensions above a tenth of the strongest",
        "dimensions with KL above 0.1 nats",
        "total correlation",
    ]
    return Part(columns, rows, findings)


PARTS = {"moons": moons, "torus": torus, "flows": flows, "betas": betas}
