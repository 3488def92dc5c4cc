"""Which latent directions does the decoder use, and how much do they share?

A decoder maps the prior to a manifold in data space. The entropy of each latent dimension on that manifold, the total
correlation and the mutual information of dimensions follow from averages over the Gram matrix ``J'J`` of the decoder's
Jacobian, without training anything.

Source: Galperin and Koethe, *Analyzing Generative Models by Manifold Entropic Metrics*, 2025, arXiv 2410.19426.
"""

from lightning_gendiag.diagnostics.manifold_entropy.gram import active_dims, decoder_gram
from lightning_gendiag.diagnostics.manifold_entropy.mathematics import (
    ManifoldEntropyResult,
    latent_correlation,
    manifold_cross_information,
    manifold_entropy,
)
from lightning_gendiag.diagnostics.manifold_entropy.metric import ManifoldEntropy
from lightning_gendiag.diagnostics.manifold_entropy.monitor import ManifoldEntropyMonitor

__all__ = [
    "ManifoldEntropy",
    "ManifoldEntropyMonitor",
    "ManifoldEntropyResult",
    "active_dims",
    "decoder_gram",
    "latent_correlation",
    "manifold_cross_information",
    "manifold_entropy",
]
