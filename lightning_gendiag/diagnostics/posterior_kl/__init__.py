"""How far is a VAE's posterior from its prior in each dimension, and does the decoder still need the latent?

Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation* (vanishing KL); Burda, Grosse,
Salakhutdinov, arXiv 1509.00519 (active units).
"""
