"""Trainers: what transformers and TRL assume about padded batches, overridden for packed ones.

`packed` holds what all share (loader as it is, loss over the whole step, sealed checkpoints); `language_model`,
`encoder`, `preference` (with `dpo` and `kto`) hold what is particular to an objective. None knows a recipe.
"""
