"""Which parts of the image does the generator draw together?

An intermediate feature is decomposed into components, each of which draws a set of regions and leaves the others unchanged.

Source: Chen, Cheng, Ding, Zhang, *Disentangling Regional Primitives for Image Generation*, arXiv 2410.04421.
"""
