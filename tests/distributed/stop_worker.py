"""Two ranks of which one is sent a signal: `python -m tests.distributed.stop_worker CORPUS FOLDER` under torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from qwen2audio_train.training.stages.run import fit
from qwen2audio_train.training.trainers.stop import STOPPED
from tests.runs import build_trainer, recipe, train


def main(corpus: Path, folder: Path) -> None:
    from tests.training.test_stop import SendSignal

    train(recipe(corpus, folder / "whole", "trainer.max_steps=5"))
    config = recipe(corpus, folder / "run", "trainer.max_steps=5")
    trainer = build_trainer(config)
    if os.environ["RANK"] == "1":
        trainer.add_callback(SendSignal(signal.SIGTERM, 2))
    with pytest.raises(SystemExit, match=str(STOPPED)):
        fit(trainer, config)
    assert trainer.state.global_step == 3
    assert trainer.stopped
    train(config)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
