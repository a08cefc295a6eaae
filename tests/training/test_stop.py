"""A signal ends a run after a whole step, which is saved; what goes on from there is the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from qwen2audio_train.training.chain import run_script
from qwen2audio_train.training.stages.run import fit
from qwen2audio_train.training.trainers.stop import ONE_EVENT_S, SIGNALS, STOPPED
from tests.runs import build_trainer, logged, recipe, train
from tests.training.test_resume import assert_same_end

STEPS = ["trainer.max_steps=5", "adapter.kind=lora", "adapter.r=2", "adapter.dropout=0.3"]


class SendSignal(TrainerCallback):
    """Send this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_stopped_run_goes_on_to_the_same_end(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three times in a row, by each signal; nothing but the signals saves a checkpoint before the last step."""
    train(recipe(noise, tmp_path / "whole", *STEPS))
    config = recipe(noise, tmp_path / "run", *STEPS)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    for step, number in enumerate(SIGNALS, 1):
        trainer = build_trainer(config)
        trainer.add_callback(SendSignal(number, step - 1))
        with pytest.raises(SystemExit) as ended:
            fit(trainer, config)
        assert ended.value.code == STOPPED == 75
        assert f"stopped by a signal after step {step} of 5, which is saved" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    train(config)
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert logged(config, *names) == logged(recipe(noise, tmp_path / "whole", *STEPS), *names)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_signal_in_the_last_step_lets_the_run_finish(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path, "trainer.max_steps=2")
    trainer = build_trainer(config)
    trainer.add_callback(SendSignal(signal.SIGTERM, 1))
    fit(trainer, config)
    assert trainer.stopped


def test_it_saves_before_it_evaluates(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation may take longer than a scheduler waits."""
    held_out = [f"data.eval_sources.speech.path=[{noise}/speech.jsonl]", "trainer.eval_steps=1"]
    config = recipe(noise, tmp_path, *held_out)
    config.trainer["eval_strategy"] = "steps"
    trainer = build_trainer(config)
    trainer.add_callback(SendSignal(signal.SIGTERM, 0))
    there: list[bool] = []
    evaluate = trainer.evaluate

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        there.append((tmp_path / "checkpoint-1" / "MANIFEST.json").is_file())
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    with pytest.raises(SystemExit):
        fit(trainer, config)
    assert there == [True]


HEED = """
import time
from qwen2audio_train.training.trainers.stop import StopSignals
with (stop := StopSignals()).heeded():
    print("ready", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    print(stop.received.name, flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    """The same event told twice, as by a scheduler and torchrun, is one signal."""
    with subprocess.Popen([sys.executable, "-c", HEED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(ONE_EVENT_S + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.slow
def test_a_recipe_passes_a_signal_on_to_its_ranks(tmp_path: Path) -> None:
    """They get SIGTERM through torchrun, and the recipe ends with the status of a run that was stopped."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"got = lambda *_: (open({str(tmp_path / 'got')!r}, 'w').close(), sys.exit({STOPPED}))\n"
        "signal.signal(signal.SIGTERM, got)\n"
        f"os.kill({os.getpid()}, signal.SIGUSR1)\n"
        "time.sleep(30)\n"
    )
    with pytest.raises(SystemExit) as ended:
        run_script(script, [], 1)
    assert ended.value.code == STOPPED
    assert (tmp_path / "got").is_file()
