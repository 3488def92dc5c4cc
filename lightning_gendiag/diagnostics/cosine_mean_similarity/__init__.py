"""How close are generated images to real ones, region by region?

The cosine of the two mean embeddings in the space of an RBF kernel, per region of the image. Where regions are
independent the image's cosine is the product of the regions' (Theorem 1), so a fall of the whole divides among them.

Source: Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*, 2024,
arXiv 2409.01314.
"""

from lightning_gendiag.diagnostics.cosine_mean_similarity.mathematics import (
    CosineMeanSimilarityResult,
    cosine_mean_similarity,
)
from lightning_gendiag.diagnostics.cosine_mean_similarity.metric import CosineMeanSimilarity
from lightning_gendiag.diagnostics.cosine_mean_similarity.monitor import CosineMeanSimilarityMonitor

__all__ = [
    "CosineMeanSimilarity",
    "CosineMeanSimilarityMonitor",
    "CosineMeanSimilarityResult",
    "cosine_mean_similarity",
]
