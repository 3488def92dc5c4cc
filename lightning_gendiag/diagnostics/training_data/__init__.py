"""Does the training data itself change while a model trains: its classes, its range, its regions, its variety?

Sources: Clopper and Pearson, *The use of confidence or fiducial limits*, 1934 (shares of classes); Hurlbert, *The nonconcept
of species diversity*, 1971 (expected number of different images in a sample).
"""
