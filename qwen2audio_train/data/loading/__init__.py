"""Loaders: batches of this rank, and where in the data they stand.

In: the recipe's `data`, a tokenizer, rank and world size. Out: a loader that yields packed batches, says which sources
they come from, and gives and takes a small JSON state, so that a run resumes exactly on any number of ranks. `indexed`
reads examples at random through an index; `streaming` reads shards in order.
"""
