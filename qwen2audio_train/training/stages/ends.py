"""When a run is over: after `max_steps`, with the data, or because a held-out figure no longer improves.

A run that is over stays so when it is started again; what lifts the limit (steps, epochs, patience) lets it go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.trainers.packed import PackedTrainer
from qwen2audio_train.training.trainers.stop import STOPPED

MOST_PLANNED = 5_000_000
"""Examples whose packs are counted before the first step: some 50 seconds of planning."""


def end_of(trainer: PackedTrainer, point: Path) -> str | None:
    """Why the run whose newest checkpoint is `point` is over; None when there is something left to do."""
    if folders.step_of(point) >= trainer.args.max_steps:
        return "is of the last step"
    if trainer.loader.is_over(json.loads((point / "data_state.json").read_text())):
        return "is of the last step that the data have (data.sources.*.epochs)"
    history = TrainerState.load_from_json(str(point / TRAINER_STATE_NAME)).log_history
    for guard in early_stops(trainer):
        if reason := guard.over(history):
            return f"is where the run stopped, as {reason}"
    return None


def early_stops(trainer: PackedTrainer) -> Iterator[Any]:
    """The callbacks that may stop a run before its last step."""
    return (callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "over"))


def check_watched(trainer: PackedTrainer) -> None:
    """Raises ConfigError when evaluation will not log a figure that something goes by."""
    watched = [("preference.watch", guard.watched) for guard in early_stops(trainer)]
    if best := trainer.args.metric_for_best_model:
        watched.append(("trainer.metric_for_best_model", best if best.startswith("eval_") else f"eval_{best}"))
    for key, figure in watched:
        known = trainer.held_out_figures()
        if not any(fnmatchcase(figure, pattern) for pattern in known):
            raise ConfigError(f"{key}={figure}: no held-out figure of this run; {nearest(figure, known)}")


def warn_of_early_end(trainer: PackedTrainer) -> None:
    """Say on rank 0 when the data end before `max_steps`: the schedule of the rate is cut off there."""
    steps = trainer.args.max_steps
    if not trainer.args.should_save or steps * trainer.loader.packs_per_step > MOST_PLANNED:
        return
    last = trainer.loader.last_step(steps)
    if last is not None:
        print(
            f"the data end after step {last} (data.sources.*.epochs), trainer.max_steps is {steps}: the rate's "
            f"schedule, made for {steps} steps, will be cut off there; trainer.max_steps={last} gives the whole of it"
        )


def say_how_it_ended(trainer: PackedTrainer) -> None:
    """One line on rank 0 for an end before `max_steps`, and one for the best checkpoint where it is not the last."""
    state, args = trainer.state, trainer.args
    if not args.should_save:
        return
    if trainer.stopped:
        print(
            f"stopped by a signal after step {state.global_step} of {args.max_steps}, which is saved: start it again "
            f"to go on (exit status {STOPPED})"
        )
    if trainer.data_ended:
        print(f"the data have ended after step {state.global_step} of {args.max_steps}: the run is finished")
    if args.metric_for_best_model and state.best_global_step not in (None, state.global_step):
        print(
            f"the best {args.metric_for_best_model} was {state.best_metric:.4g}, at step {state.best_global_step}: "
            f"checkpoint-{state.best_global_step} is kept beside that of the last step"
        )
