"""Does what a flow or an autoencoder encodes come back when it is decoded, and is a flow's log-determinant right?

Sources: Behrmann, Vicol, Wang, Grosse, Jacobsen, *Understanding and Mitigating Exploding Inverses in Invertible Neural
Networks*, 2021, arXiv 2006.09347; Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2017, arXiv 1605.08803;
Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018, arXiv 1807.03039.
"""
