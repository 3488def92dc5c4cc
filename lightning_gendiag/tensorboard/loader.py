"""Entry point of the tab.

TensorBoard imports this module at its start, and ends if that raises; so it imports next to nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin


class GenDiagLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Loads the tab, or logs one warning if that fails; TensorBoard then runs without the tab."""

    def load(self, context: Any) -> Any:
        """Returns the plugin, or None if it cannot be loaded."""
        try:
            from lightning_gendiag.tensorboard.plugin import GenDiagPlugin

            return GenDiagPlugin(context)
        except Exception as error:
            logging.getLogger("tensorboard").warning(
                "The tab GenDiag is not available: %s: %s. To fix this, update lightning_gendiag and tensorboard.",
                type(error).__name__,
                error,
            )
            return None
