"""A deadline for work that may never return: it is done by a process of its own, which is killed and replaced.

A decoder that loops in C cannot be interrupted, and holds the interpreter if it is badly made. So each thread that
decodes keeps one helper, forked at its first call and fed through pipes; samples come back in shared memory, and are
used where they lie. A helper that crashes costs what it was working on, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import select
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from qwen2audio_train.errors import ExampleError

ARENA = 2**27
"""Bytes of shared memory: half an hour at 16 kHz in float32. It is virtual until it is used; more goes by pipe."""
KEPT = 2**23
"""Where an array ends beyond so many bytes of the arena, it is copied out of there and its pages are handed back."""
ALIGNMENT = 64
LONGEST_READ = 2**16
"""Bytes: what a pipe holds."""
PR_SET_PDEATHSIG = 1

Result = TypeVar("Result")
_LOCAL = threading.local()


class DeadlineError(ExampleError):
    """The work was not done in time, or its process died; says which."""


def within(timeout_s: float | None, work: Callable[..., Result], *args: Any) -> Result:
    """`work(*args)`, done by this thread's helper; without a time-out by this thread itself.

    Args:
        work: a function of a module, and arguments that pickle; what it raises is raised here.

    Raises:
        DeadlineError: no result after `timeout_s`, or the helper died (a new one is tried twice).
    """
    if timeout_s is None:
        return work(*args)
    helper = getattr(_LOCAL, "helper", None)
    if helper is not None and helper.owner == os.getpid():
        return _call(helper, timeout_s, work, args)
    # A fork inherits the locks that other threads held, and may never get past one. So what the first call of a helper
    # comes to is put down to its work only when a second helper comes to it too.
    try:
        return _call(Helper(), timeout_s, work, args)
    except DeadlineError:
        return _call(Helper(), timeout_s, work, args)


def _call(helper: Helper, timeout_s: float, work: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    """Keeps the helper for the next call, unless it died, or was interrupted and would answer that one with this."""
    _LOCAL.helper = helper
    try:
        return helper.call(timeout_s, work, args)
    except BaseException as error:
        if helper.is_stopped or not isinstance(error, Exception):
            helper.stop()
            _LOCAL.helper = None
        raise


class Helper:
    """A forked process that works for one thread of its parent and dies with it."""

    def __init__(self) -> None:
        self.owner, self.is_stopped = os.getpid(), False
        self._arena = mmap.mmap(-1, ARENA)
        self._folder = os.getcwd()
        self._lent: list[tuple[int, weakref.ref[np.ndarray]]] = []
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(requests, answers, self._arena, self.owner)
        os.close(requests)
        os.close(answers)
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)

    def call(self, timeout_s: float, work: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        folder = os.getcwd()  # paths are relative to it
        place = self._free()
        _send(self._requests, (None if folder == self._folder else folder, place, work, args))
        self._folder = folder
        if not self._poll.poll(timeout_s * 1000):
            self.stop()
            raise DeadlineError(f"was not done after {timeout_s:g} s")
        try:
            is_good, found = _receive(self._answers)
        except EOFError:
            code = os.waitstatus_to_exitcode(self.stop())
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            raise DeadlineError(f"crashed ({how})") from None
        if not is_good:
            raise found
        return self._taken(found, place) if isinstance(found, _Shared) else found

    def stop(self) -> int:
        """End the process; returns its status."""
        if self.is_stopped or self.owner != os.getpid():
            return 0
        self.is_stopped = True
        os.close(self._requests)
        os.close(self._answers)
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        return os.waitpid(self._pid, 0)[1]

    __del__ = stop

    def _free(self) -> int:
        """Where in the arena the next array goes: after those that somebody still holds."""
        self._lent = [(end, array) for end, array in self._lent if array() is not None]
        return max((end for end, _ in self._lent), default=0)

    def _taken(self, shared: _Shared, place: int) -> Any:
        """The array, where it lies: its place is free again once nobody holds it, nor a view of it."""
        array = np.ndarray(shared.shape, shared.dtype, self._arena, place)
        end = place + array.nbytes
        if end > KEPT:
            array = array.copy()
            first = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE
            self._arena.madvise(mmap.MADV_REMOVE, first, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE - first)
        else:
            self._lent.append((-(-end // ALIGNMENT) * ALIGNMENT, weakref.ref(array)))
        return array


class _Shared:
    """Stands for an array that lies in the arena."""

    def __init__(self, array: np.ndarray):
        self.shape, self.dtype = array.shape, array.dtype


def _serve(requests: int, answers: int, arena: mmap.mmap, parent: int) -> None:
    """The helper's life: it ends with its parent, and leaves Ctrl-C to it."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while os.getppid() == parent:
            folder, place, work, args = _receive(requests)
            try:
                if folder is not None:
                    os.chdir(folder)
                found, is_good = work(*args), True
            except Exception as error:
                found, is_good = error, False
            if isinstance(found, np.ndarray) and place + found.nbytes <= ARENA:
                np.ndarray(found.shape, found.dtype, arena, place)[...] = found
                found = _Shared(found)
            try:
                _send(answers, (is_good, found))
            except (pickle.PicklingError, TypeError):  # an exception that cannot be sent
                _send(answers, (False, RuntimeError(f"{type(found).__name__}: {found}")))
    finally:
        os._exit(0)


def _send(pipe: int, message: object) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    view = memoryview(len(data).to_bytes(8, "little") + data)
    while view:
        view = view[os.write(pipe, view) :]


def _receive(pipe: int) -> Any:
    """Raises EOFError where the other end is gone."""
    data = bytearray()
    end = 8
    while len(data) < end:  # there is one message at a time, most of them in one read
        more = os.read(pipe, LONGEST_READ)
        if not more:
            raise EOFError
        data += more
        if end == 8 and len(data) >= 8:
            end += int.from_bytes(data[:8], "little")
    return pickle.loads(memoryview(data)[8:])
