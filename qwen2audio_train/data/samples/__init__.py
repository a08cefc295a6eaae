"""From an example to a packed batch, inside the loader's workers.

In: an `Example`. Out: a `Sample` (token ids, labels, mel of its clips) and, for the samples of a pack, the flat dict of
tensors that the model reads. No padding anywhere. Imports `audio`, `prompts` and what is below them.
"""
