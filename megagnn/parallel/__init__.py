"""Ranks and what they say to each other; the only folder that imports torch.distributed."""
