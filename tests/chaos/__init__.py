"""Runs that are killed, stalled or starved of disk end as if nothing had happened: `python -m tests.chaos`."""
