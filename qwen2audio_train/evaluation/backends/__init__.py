"""Answers that something else gives: models behind an API, and exported checkpoints in vLLM.

In: held-out examples. Out: their texts, scored as those of our own path.
"""
