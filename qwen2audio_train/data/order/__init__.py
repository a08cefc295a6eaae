"""Which example stands where, from metadata alone.

In: manifests' lengths and weights, a seed. Out: for every step the examples of its packs: a pure function of
(seed, epoch, position) with O(1) state. Nothing here opens audio.
"""
