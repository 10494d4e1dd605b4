"""Captioned audio in, separated audio out: clips, mixtures, STFTs, the model and its training."""
