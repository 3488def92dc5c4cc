"""Brings recorded observations to the thresholds of today, so that a record need not be made again when one changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_gendiag import Observation, Series
from lightning_gendiag.diagnostics.cosine_mean_similarity import monitor as cosine
from lightning_gendiag.diagnostics.generation_balance import monitor as balance
from lightning_gendiag.diagnostics.k_star import monitor as k_star
from lightning_gendiag.diagnostics.manifold_entropy import monitor as entropy
from lightning_gendiag.diagnostics.posterior_kl import monitor as divergence

DECLARED: dict[tuple[str, str], Series] = {
    ("cms", "component"): cosine.REGION,
    ("cms", "aggregate"): cosine.IMAGE,
    ("generation_balance", "component"): balance.CLASS,
    ("generation_balance", "aggregate"): balance.BALANCE,
    ("k_star", "component"): k_star.CLASS,
    ("k_star", "aggregate"): k_star.ALL,
    ("manifold_entropy", "component"): entropy.DIMENSION,
    ("manifold_entropy", "aggregate"): entropy.MEAN,
    ("manifold_entropy", "standalone"): entropy.PAIR,
    ("posterior_kl", "component"): divergence.DIMENSION,
    ("posterior_kl", "aggregate"): divergence.TOTAL,
}
"""Series by the name of the monitor and their role."""

SEVERITIES: dict[tuple[str, str], Callable[[float], float]] = {
    ("manifold_entropy", "standalone"): entropy.entanglement,
    ("posterior_kl", "component"): divergence.severity,
    ("posterior_kl", "aggregate"): divergence.shortfall,
}
"""Severities that follow from the value alone."""


def as_today(monitor: str, observation: Observation, real_shares: Sequence[float] = ()) -> Observation:
    """Returns a recorded observation with the thresholds and the severity that it would have today.

    Args:
        monitor: Name of the monitor.
        observation: As recorded.
        real_shares: Of the classes among real images, where they are known.
    """
    series, key = observation.series, (monitor, observation.series.role)
    if key in DECLARED:
        now = DECLARED[key]
        same = ("min_std", "min_delta", "small", "confirm", "stop", "patience")
        series = replace(series, **{name: getattr(now, name) for name in same})
    if series.name == divergence.UNUSED.name:
        series = replace(series, progress=divergence.UNUSED.progress)
    severity = observation.severity
    if math.isfinite(severity) and key in SEVERITIES:
        severity = SEVERITIES[key](observation.value)
    if key == ("cms", "rule") and series.name == cosine.UNREACHED.name and math.isfinite(observation.value):
        severity = math.inf if observation.value > cosine.MOST_UNREACHED else 0.0
    index = series.index
    if key == ("generation_balance", "component") and index is not None and index < len(real_shares):
        # the recorded severity holds an added share that depends on the number of images; newer records limit shares already
        most = balance.MOST * real_shares[index]
        added = 2**-severity - observation.value
        if observation.value > most and math.isfinite(severity) and added > 0:
            severity = -math.log2(most + added)
    return observation._replace(series=series, severity=severity)
