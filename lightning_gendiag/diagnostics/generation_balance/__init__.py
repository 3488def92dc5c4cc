"""Are all classes generated, each as often as it should be, and how well?

Source: Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation* (unbalanced generation, data
composition analysis, FID by class).
"""
