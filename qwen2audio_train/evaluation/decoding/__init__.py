"""Texts of a model: packed encoder, left-padded decoder with the stock KV cache, even work on every rank.

In: a model, a tokenizer, samples. Out: one text per sample, the same at every batch size.
"""
