"""Tensors and JSON in plain WebDataset tars: written atomically, sealed, verified, and read back exactly and fast."""
