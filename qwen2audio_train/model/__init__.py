"""Audio language models on packed batches.

In: a packed batch. Out: summed loss and weights (or hidden states for preferences). `build` and `assemble` make models,
`freeze` and `adapters` (the only file that knows PEFT) say what is trained, one file per family has its classes. Knows
`layout`, `errors`, `families` and `config` only: nothing of `data`.
"""
