"""The stages: trainers over packed batches, sealed checkpoints, exact resume.

`checkpoints` and `reference` at the bottom, `trainers` over them, `stages` (a trainer from a recipe), `chain` on top.
The only place that imports TRL.
"""
