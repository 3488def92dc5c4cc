"""What the oldest versions that are supported lack; tests that need it are skipped there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, callbacks
from torch.distributed import fsdp


class Missing(callbacks.Callback):
    """Stands for a callback of Lightning that this version does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pytest.skip("this version of Lightning does not average weights")


WeightAveraging: Any = getattr(callbacks, "WeightAveraging", Missing)
EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", Missing)

fully_shard: Any = getattr(fsdp, "fully_shard", None)
"""torch's FSDP2; None where it does not run on CPUs."""


def _trains_in_bfloat16() -> bool:
    try:
        torch.nn.functional.mse_loss(*torch.rand(2, 3, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


needs_fsdp2 = pytest.mark.skipif(fully_shard is None, reason="this version of torch does not shard modules on CPUs")
needs_bfloat16 = pytest.mark.skipif(not _trains_in_bfloat16(), reason="this version of torch has no such loss on CPUs")
needs_weights_only = pytest.mark.skipif(
    "weights_only" not in inspect.signature(Trainer.fit).parameters,
    reason="this version of Lightning resumes with weights alone or not as torch chooses",
)
needs_second_derivatives = pytest.mark.skipif(
    torch.__version__ < "2.5", reason="this version of torch has one derivative of grid_sample only"
)
