"""Where in latent space does the decoder lose features: in clusters, at the margins between them, or where they overlap?

Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation* (margins and grey area). The authors
choose these regions by hand; here they are computed.
"""
