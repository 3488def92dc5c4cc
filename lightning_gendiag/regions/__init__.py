"""Regions of an image: which pixels belong together.

Source: Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*,
2024, arXiv 2409.01314.
"""
