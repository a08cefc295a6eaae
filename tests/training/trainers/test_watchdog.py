"""A process that does not get on prints where it stands and ends, also where Python itself cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwen2audio_train.training.trainers.watchdog import Watchdog

PROGRAM = """
import ctypes, sys, time
from qwen2audio_train.training.trainers.watchdog import Watchdog

def holding_the_lock():
    ctypes.PyDLL(None).sleep(60)  # PyDLL: a foreign function that keeps the interpreter's lock

def waiting():
    time.sleep(60)

dog = Watchdog()
with dog.watching(1.0):
    for _ in range(15):
        time.sleep(0.1)
        dog.alive()
    print("alive", flush=True)
    {stall}()
"""


@pytest.mark.parametrize("stall", ["waiting", "holding_the_lock"])
def test_a_stall_ends_with_a_stack_trace(stall: str) -> None:
    command = [sys.executable, "-c", PROGRAM.replace("{stall}", stall)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert done.stderr.startswith("Timeout (0:00:01)!\n")
    assert f"in {stall}\n" in done.stderr


def test_it_rests_outside_of_training_and_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[float] = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **_: started.append(seconds))
    dog = Watchdog()
    dog.alive()
    with dog.watching(0):
        dog.alive()
    assert started == []
    with dog.watching(7):
        dog.alive()
    dog.alive()
    assert started == [7, 7]
