"""At which noise levels does a diffusion or flow matching model get worse, overfit or fail, while its mean loss still falls?

Sources: Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv 2006.11239; Salimans, Ho, *Progressive
Distillation for Fast Sampling of Diffusion Models*, 2022, arXiv 2202.00512 (prediction of the velocity); Kingma, Salimans,
Poole, Ho, *Variational Diffusion Models*, 2021, arXiv 2107.00630 (log-SNR); Lipman, Chen, Ben-Hamu, Nickel, Le, *Flow Matching
for Generative Modeling*, 2023, arXiv 2210.02747; Lin, Liu, Li, Yang, *Common Diffusion Noise Schedules and Sample Steps are
Flawed*, 2024, arXiv 2305.08891 (schedules that end before pure noise).
"""
