"""Does a quantizer use its codebook, or has it collapsed to a few codes?

Source: van den Oord, Vinyals, Kavukcuoglu, arXiv 1711.00937 (VQ-VAE, perplexity); Chao and Shen, *Nonparametric estimation of
Shannon's index of diversity when there are unseen species in sample*, 2003; Chao, *Nonparametric estimation of the number of
classes in a population*, 1984.
"""
