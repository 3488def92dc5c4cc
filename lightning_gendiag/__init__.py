"""Which part of a generative model goes wrong, while it trains: metrics and callbacks for Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gendiag.automatic import GenerativeDiagnostics
    from lightning_gendiag.detectors import ChangePoint
    from lightning_gendiag.diagnostic import Diagnostic
    from lightning_gendiag.diagnostics.cosine_mean_similarity import (
        CosineMeanSimilarity,
        CosineMeanSimilarityMonitor,
        CosineMeanSimilarityResult,
        cosine_mean_similarity,
    )
    from lightning_gendiag.diagnostics.generation_balance import (
        GenerationBalance,
        GenerationBalanceMonitor,
        GenerationBalanceResult,
    )
    from lightning_gendiag.diagnostics.k_star import KStar, KStarMonitor, KStarResult, k_star
    from lightning_gendiag.diagnostics.latent_regions import (
        LatentRegions,
        LatentRegionsMonitor,
        LatentRegionsResult,
        latent_regions,
    )
    from lightning_gendiag.diagnostics.manifold_entropy import (
        ManifoldEntropy,
        ManifoldEntropyMonitor,
        ManifoldEntropyResult,
        decoder_gram,
        manifold_cross_information,
        manifold_entropy,
    )
    from lightning_gendiag.diagnostics.posterior_kl import (
        PosteriorKL,
        PosteriorKLMonitor,
        PosteriorKLResult,
        posterior_kl,
    )
    from lightning_gendiag.diagnostics.regional_primitives import (
        Decomposition,
        MinimalFeatures,
        RegionalPrimitives,
        RegionalPrimitivesMonitor,
        RegionalPrimitivesResult,
        decompose,
        minimal_features,
        minimal_features_of,
        or_interactions,
    )
    from lightning_gendiag.monitor import DiagnosticWarning, Monitor, Reading
    from lightning_gendiag.probe import Probe
    from lightning_gendiag.regions import RegionMap, find_regions, pixel_cka
    from lightning_gendiag.stopping import CollapseStopping, CollapseWarning, Finding

__version__ = "0.1.0"

_HOMES = {
    "automatic": ("GenerativeDiagnostics",),
    "detectors": ("ChangePoint",),
    "diagnostic": ("Diagnostic",),
    "diagnostics.cosine_mean_similarity": (
        "CosineMeanSimilarity",
        "CosineMeanSimilarityMonitor",
        "CosineMeanSimilarityResult",
        "cosine_mean_similarity",
    ),
    "diagnostics.generation_balance": (
        "GenerationBalance",
        "GenerationBalanceMonitor",
        "GenerationBalanceResult",
    ),
    "diagnostics.k_star": ("KStar", "KStarMonitor", "KStarResult", "k_star"),
    "diagnostics.latent_regions": ("LatentRegions", "LatentRegionsMonitor", "LatentRegionsResult", "latent_regions"),
    "diagnostics.manifold_entropy": (
        "ManifoldEntropy",
        "ManifoldEntropyMonitor",
        "ManifoldEntropyResult",
        "decoder_gram",
        "manifold_cross_information",
        "manifold_entropy",
    ),
    "diagnostics.posterior_kl": ("PosteriorKL", "PosteriorKLMonitor", "PosteriorKLResult", "posterior_kl"),
    "diagnostics.regional_primitives": (
        "Decomposition",
        "MinimalFeatures",
        "RegionalPrimitives",
        "RegionalPrimitivesMonitor",
        "RegionalPrimitivesResult",
        "decompose",
        "minimal_features",
        "minimal_features_of",
        "or_interactions",
    ),
    "monitor": ("DiagnosticWarning", "Monitor", "Reading"),
    "probe": ("Probe",),
    "regions": ("RegionMap", "find_regions", "pixel_cka"),
    "stopping": ("CollapseStopping", "CollapseWarning", "Finding"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ChangePoint",
    "CollapseStopping",
    "CollapseWarning",
    "CosineMeanSimilarity",
    "CosineMeanSimilarityMonitor",
    "CosineMeanSimilarityResult",
    "Decomposition",
    "Diagnostic",
    "DiagnosticWarning",
    "Finding",
    "GenerationBalance",
    "GenerationBalanceMonitor",
    "GenerationBalanceResult",
    "GenerativeDiagnostics",
    "KStar",
    "KStarMonitor",
    "KStarResult",
    "LatentRegions",
    "LatentRegionsMonitor",
    "LatentRegionsResult",
    "ManifoldEntropy",
    "ManifoldEntropyMonitor",
    "ManifoldEntropyResult",
    "MinimalFeatures",
    "Monitor",
    "PosteriorKL",
    "PosteriorKLMonitor",
    "PosteriorKLResult",
    "Probe",
    "Reading",
    "RegionMap",
    "RegionalPrimitives",
    "RegionalPrimitivesMonitor",
    "RegionalPrimitivesResult",
    "cosine_mean_similarity",
    "decoder_gram",
    "decompose",
    "find_regions",
    "k_star",
    "latent_regions",
    "manifold_cross_information",
    "manifold_entropy",
    "minimal_features",
    "minimal_features_of",
    "or_interactions",
    "pixel_cka",
    "posterior_kl",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for, so that the door itself costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
