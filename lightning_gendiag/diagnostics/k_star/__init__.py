r"""Does the latent space keep its classes together?

The value of a sample is the fraction of its class that is nearer to it than any sample of another class. A class that lies
together and apart from the others has values near one; a class that is split into pieces has many small values.

Source: Kotyan, Ueda, Vargas, *k\\* Distribution*, 2024; Kotyan, Chen, Vargas, arXiv 2408.09065.
"""
