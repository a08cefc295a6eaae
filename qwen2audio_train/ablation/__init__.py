"""Ablations: a baseline recipe against overlays that change one thing each, over several seeds.

In: an AblationConfig. `study` says which runs there are and does those that are missing, each by the recipe's own
chain of stages; `order` sees that all of them met the same examples; `gather` makes table and page of their figures.
"""
