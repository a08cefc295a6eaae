"""Texts and references to metrics: normalise, compare, count, interval.

In: decoded texts with their items. Out: metrics per source, task and language; what cannot be scored is counted.
"""
