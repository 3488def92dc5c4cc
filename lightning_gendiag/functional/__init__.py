"""Mathematics that several diagnostics share: tensors in, tensors out."""
