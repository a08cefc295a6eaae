"""From a checkpoint and held-out examples to numbers that can be compared.

`decoding` (texts of a model) -> `scoring` (metrics with intervals) -> `judging` (a model as judge) -> `reporting`
(tables, pages). Training may import evaluation, never the reverse.
"""
