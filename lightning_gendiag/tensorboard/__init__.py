"""The tab "GenDiag" of TensorBoard: what is written for it, what serves it, and the page. TensorBoard imports this package."""
