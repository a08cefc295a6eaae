"""A rank that no longer gets on says where it stands, and ends: so a job that hangs is restarted instead of paid for.

A rank may stall by itself (a reader, a lock, a stopped process), or wait for another in a collective. Where one stalls,
the others come to wait for it, so each of them prints its own stack traces after the same time. The clock is a thread
in C, which needs no Python: it also goes off while something holds the interpreter's lock.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Watchdog:
    """Ends the process with status 1, after the stack traces of all its threads, when `alive` is not called in time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Expect `alive` every so many seconds; 0: never."""
        self.seconds = seconds
        self.alive()
        try:
            yield
        finally:
            self.seconds = 0.0
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Start the clock anew: some 50 microseconds."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or 2)
