"""An alarm as it is reported."""

from __future__ import annotations

from typing import Any

from lightning_gendiag import Alarm


def alarm(**options: Any) -> Alarm:
    """Returns an alarm about the centre of the image; ``options`` replace its fields."""
    fields: dict[str, Any] = {
        "step": 5, "epoch": 1, "diagnostic": "cms", "label": "centre", "before": 0.9, "after": 0.4, "score": 7.0, "since": 4,
        "evaluations_to_false_alarm": 2e6, "quantity": "cosine mean similarity", "names": ["centre"],
    }  # fmt: skip
    return Alarm(**(fields | options))
