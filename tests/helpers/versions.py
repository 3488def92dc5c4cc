"""What the oldest versions that are supported lack; tests that need it are skipped there."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import callbacks


class Missing(callbacks.Callback):
    """Stands for a callback of Lightning that this version does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pytest.skip("this version of Lightning does not average weights")


WeightAveraging: Any = getattr(callbacks, "WeightAveraging", Missing)
EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", Missing)


def fully_shard(*args: Any, **kwargs: Any) -> Any:
    """torch's FSDP2, which was in another place before torch 2.6."""
    try:
        from torch.distributed.fsdp import fully_shard as shard
    except ImportError:
        from torch.distributed._composable.fsdp import fully_shard as shard  # type: ignore[no-redef]
    return shard(*args, **kwargs)
