"""How a module is used: what samples, encodes and decodes, on an isolated copy."""
