"""Does the model copy its training images, or generate the same image again and again?

Sources: Alaa, van Breugel, Saveliev, van der Schaar, *How Faithful is your Synthetic Data?*, 2022, arXiv 2102.08921
(authenticity); Meehan, Chaudhuri, Dasgupta, *A Non-Parametric Test to Detect Data-Copying in Generative Models*, 2020,
arXiv 2004.05675; Friedman, Dieng, *The Vendi Score*, 2023, arXiv 2210.02410.
"""
