"""Faults planted in regions of generated digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    ModelAdapter,
    RegionMap,
)
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, trainer

QUADRANTS = RegionMap(torch.arange(16)[:, None].ge(8).long() * 2 + torch.arange(16).ge(8).long())


def planted(fault: str, where: str, start: int, regions: RegionMap = QUADRANTS) -> Any:
    """Returns a script that breaks a region, or the whole ``"image"``, from an epoch on."""
    everywhere = torch.ones(regions.labels.shape, dtype=torch.bool)
    inside = everywhere if where == "image" else regions.mask(regions.names.index(where))
    still = digits(16)[0][7]

    def script(images: Tensor, epoch: int) -> Tensor:
        if epoch < start:
            return images
        broken = {
            "frozen": still.expand_as(images),
            "blurred": images.mean(0, keepdim=True).expand_as(images),
            "dark": (images - 1) / 2,
            "noise": torch.rand_like(images) * 2 - 1,
            "slide": torch.lerp(images, images.mean(0, keepdim=True).expand_as(images), min(1, 0.08 * (epoch - start))),
            "nan": images / 0 * 0,
        }[fault]
        return torch.where(inside, broken, images)

    return script


def run_with_fault(
    script: Any, *more: Any, epochs: int = 30, stopping: CollapseStopping | None = None, **options: Any
) -> Any:
    stopping = stopping or CollapseStopping()
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, adapter=ModelAdapter(reference=digits(16)[0], num_samples=500))
    own = trainer(monitor, stopping, *more, max_epochs=epochs, **options)
    own.fit(ScriptedGenerator(script), batches(16, 32))
    return own, stopping
