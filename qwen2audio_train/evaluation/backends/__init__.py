"""Answers that something else gives: transformers' own classes, models behind an API, exported checkpoints in vLLM.

In: held-out examples. Out: their texts, scored as those of our own path.
"""
