"""The results of the five papers behind the diagnostics, shown again: ``python -m benchmarks.papers NAME``."""
