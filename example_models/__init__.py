"""Small, real generative models with the diagnostics attached; each runs with ``python -m example_models.<name>``."""
