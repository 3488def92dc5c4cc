"""Why does the generator of a GAN stall: is the discriminator frozen, too strong, or overfitted, or do gradients fail?

Source: Karras et al., arXiv 2006.06676 (StyleGAN2-ADA: overfitting heuristics); Arjovsky and Bottou, arXiv 1701.04862
(vanishing gradients of the generator); Miyato et al., arXiv 1802.05957 (spectral normalization); Liu et al., *Spectral
Regularization for Combating Mode Collapse in GANs*, 2019; Hanley and McNeil, *The meaning and use of the area under a
receiver operating characteristic (ROC) curve*, 1982.
"""
