"""Recognisers: one small function for each way in which models are written, in the order in which they are tried."""

from __future__ import annotations

from lightning_gendiag.model.adapters.base import Recogniser
from lightning_gendiag.model.adapters.flows import flows
from lightning_gendiag.model.adapters.libraries import LIBRARIES
from lightning_gendiag.model.adapters.own import children, decoded_samples, denoised, helpers, own

RECOGNISERS: tuple[Recogniser, ...] = (own, *LIBRARIES, children, helpers, decoded_samples, flows, denoised)
