"""The most memory that something takes: of a GPU what torch's allocator holds, else the process's resident set."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """Bytes beyond what the process holds when this is made. Without a GPU it needs Linux."""

    def __init__(self) -> None:
        gc.collect()
        self.on_gpu = torch.cuda.is_available()
        self.baseline = torch.cuda.memory_allocated() if self.on_gpu else _status("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            # glibc keeps freed blocks for later ones; what an earlier trial freed is not this one's.
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most that was held since `reset`."""
        held = torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")
        return held - self.baseline


def _status(name: str) -> int:
    """A figure of this process in /proc, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
