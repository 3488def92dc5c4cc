"""How a model is looked at: samples, codes and a reference of real images, without leaving a trace."""

from lightning_gendiag.probe.batches import Images, images_of, labels_of
from lightning_gendiag.probe.isolation import untouched
from lightning_gendiag.probe.probe import Encoded, Probe, is_kind, shared_probe

__all__ = ["Encoded", "Images", "Probe", "images_of", "is_kind", "labels_of", "shared_probe", "untouched"]
