"""From labelled structures on disk to balanced batches: formats, store, neighbour lists, splits, sampler."""
