"""A deadline for work that may never return: it is done by a process of its own, which is killed and replaced.

A decoder that loops in C cannot be interrupted, and holds the interpreter if it is badly made. So each thread that
decodes keeps one helper, forked at its first call and fed through pipes; samples come back in shared memory. A helper
that crashes costs what it was working on, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import select
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from qwen2audio_train.errors import ExampleError

ARENA = 2**27
"""Bytes of shared memory: half an hour at 16 kHz in float32. It is virtual until it is used; more goes by pipe."""
KEPT = 2**23
"""Of the arena's pages, so many bytes are kept for the next clip, the rest is handed back."""
LONGEST_READ = 2**20
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
        _send(self._requests, (os.getcwd(), work, args))
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
        return self._taken(found) if isinstance(found, _Shared) else found

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

    def _taken(self, shared: _Shared) -> Any:
        size = int(np.prod(shared.shape)) * shared.dtype.itemsize
        array = np.frombuffer(self._arena, shared.dtype, size // shared.dtype.itemsize).reshape(shared.shape).copy()
        if size > KEPT:
            self._arena.madvise(mmap.MADV_REMOVE)
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
            folder, work, args = _receive(requests)
            try:
                os.chdir(folder)  # paths are relative to where the parent stands now
                found, is_good = work(*args), True
            except Exception as error:
                found, is_good = error, False
            if isinstance(found, np.ndarray) and found.nbytes <= ARENA:
                np.frombuffer(arena, found.dtype, found.size).reshape(found.shape)[...] = found
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
    size = int.from_bytes(_exactly(pipe, 8), "little")
    return pickle.loads(_exactly(pipe, size))


def _exactly(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = os.read(pipe, min(size - len(data), LONGEST_READ))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
