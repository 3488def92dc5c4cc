r"""Does the latent space keep its concepts together?

For each sample, how many of its neighbours are of its class before the first of another comes: a class that lies together
has values near one, one that is split in pieces has many small values.

Source: Kotyan, Ueda, Vargas, *k\\* Distribution*, 2024; Kotyan, Chen, Vargas, arXiv 2408.09065.
"""

from lightning_gendiag.diagnostics.k_star.mathematics import KStarResult, k_star
from lightning_gendiag.diagnostics.k_star.metric import KStar
from lightning_gendiag.diagnostics.k_star.monitor import KStarMonitor

__all__ = ["KStar", "KStarMonitor", "KStarResult", "k_star"]
