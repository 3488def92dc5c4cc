"""Recognisers: one small function for each way in which models are written, in the order in which they are tried."""
