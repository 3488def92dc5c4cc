"""Small models of many kinds, trained on real data with and without faults; see ``python -m benchmarks.zoo --help``."""
