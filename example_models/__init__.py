"""Small generative models that are trained with the diagnostics; each runs with ``python -m example_models.<name>``."""
