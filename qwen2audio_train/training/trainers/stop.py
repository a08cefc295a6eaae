"""A signal that asks a run to stop: the step is finished on all ranks and saved, and the process ends with a status.

The status is 75 (EX_TEMPFAIL of sysexits.h, "try again later"): not 0, or a scheduler would go on to what depends on
the run; not 2, which says that trying again is no use; and one number for every signal, as what is left to do is the
same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Asked for by schedulers and torchrun, by Ctrl-C, and by Slurm ahead of the end of a job (`--signal=USR1@300`)."""
STOPPED = 75
ONE_EVENT_S = 2.0
"""A scheduler may tell every process while torchrun passes the same on, some milliseconds later: that is one event."""


class StopSignals:
    """Signals that this process was sent while it heeded them.

    Attributes:
        received: the first one, None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Note the first signal, for the training loop to look at; a second one ends the process at once."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            # Not print: a handler may interrupt a write to the same buffer.
            os.write(2, f"{self.received.name}: finishing the step and saving; again to end at once\n".encode())
        elif time.monotonic() - self._since > ONE_EVENT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
