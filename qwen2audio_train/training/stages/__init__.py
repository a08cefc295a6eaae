"""From a recipe to a stage that runs: process, tokenizer, policy, batches, trainer, start and resume.

`language_model`, `encoder` and `preference` each build one kind of trainer; the rest is what they share, as functions.
"""
