"""How close are generated images to real ones, region by region?

The cosine of the two mean embeddings in the space of an RBF kernel is computed for each region of the image. Where regions
are independent, the cosine of the image is the product of the regions' cosines (Theorem 1), so a drop of the image's cosine
can be divided among the regions.

Source: Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*, 2024,
arXiv 2409.01314.
"""
