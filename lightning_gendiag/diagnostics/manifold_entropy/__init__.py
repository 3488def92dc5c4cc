"""Which latent directions does the decoder use, and how much information do they share?

A decoder maps the prior to a manifold in data space. The entropy of each latent dimension on this manifold, the total
correlation and the mutual information of dimensions are averages of functions of the Gram matrix ``J'J`` of the decoder's
Jacobian. Nothing has to be trained.

Source: Galperin and Koethe, *Analyzing Generative Models by Manifold Entropic Metrics*, 2025, arXiv 2410.19426.
"""
