"""Where in latent space does the decoder lose features: in clusters, at the margins between them, or where they overlap?

Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation* (margins and grey area), with what
they placed by hand computed.
"""

from lightning_gendiag.diagnostics.latent_regions.mathematics import KINDS, LatentRegionsResult, latent_regions
from lightning_gendiag.diagnostics.latent_regions.metric import LatentRegions
from lightning_gendiag.diagnostics.latent_regions.monitor import LatentRegionsMonitor

__all__ = ["KINDS", "LatentRegions", "LatentRegionsMonitor", "LatentRegionsResult", "latent_regions"]
