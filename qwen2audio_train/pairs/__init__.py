"""Preference pairs made with a model or by rules, for stage three.

In: examples and (for sampled pairs) a checkpoint. Out: a manifest of pairs with their provenance. It makes training
data; it evaluates nothing.
"""
