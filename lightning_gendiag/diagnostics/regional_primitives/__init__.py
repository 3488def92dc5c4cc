"""Which parts of the image does the generator draw together?

An intermediate feature is taken apart into components, each of which draws a set of regions and leaves the others alone.

Source: Chen, Cheng, Ding, Zhang, *Disentangling Regional Primitives for Image Generation*, arXiv 2410.04421.
"""

from lightning_gendiag.diagnostics.regional_primitives.mathematics import (
    Decomposition,
    MinimalFeatures,
    decompose,
    minimal_features,
    minimal_features_of,
    or_interactions,
)
from lightning_gendiag.diagnostics.regional_primitives.metric import RegionalPrimitives, RegionalPrimitivesResult
from lightning_gendiag.diagnostics.regional_primitives.monitor import RegionalPrimitivesMonitor

__all__ = [
    "Decomposition",
    "MinimalFeatures",
    "RegionalPrimitives",
    "RegionalPrimitivesMonitor",
    "RegionalPrimitivesResult",
    "decompose",
    "minimal_features",
    "minimal_features_of",
    "or_interactions",
]
