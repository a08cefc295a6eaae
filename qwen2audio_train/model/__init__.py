"""Qwen2-Audio on packed batches.

In: a packed batch. Out: summed loss and weights (or hidden states for preferences). `build` and `assemble` make models,
`freeze` and `adapters` (the only file that knows PEFT) say what is trained. Knows `layout`, `config` and `errors` only:
nothing of `data`.
"""
