"""How the package warns: a warning never ends a run, even where warnings are errors."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_warn

LOG = logging.getLogger("lightning_gendiag")
"""Where a warning is written that was raised as an error, as with ``python -W error``."""


def warn(text: str, category: type[Warning]) -> None:
    """Warns on rank 0; logs the text where a filter turns the warning into an error.

    Args:
        text: What to say.
        category: Of the warning.
    """
    try:
        # the place of the warning is where this function is called
        rank_zero_warn(text, stacklevel=5, category=category)
    except Warning as error:
        LOG.warning("%s: %s", type(error).__name__, text)
