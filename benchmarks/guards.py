"""What the guards of a run cost:  python benchmarks/guards.py [--rounds 8] [--save guards.cpu2]

Trains on the clips of `train_step.py --sets 3s` (about two seconds a step on one core, a shape 500 times below 7B) and
measures the CPU time that is spent inside of what looks after the run: losses and gradient norms that are no numbers,
the watchdog, the sum over ranks with a signal's word, the plan's checksum. The decoder's deadline is in `loader.py`
(`ours` beside `ours_no_deadline`). The last line is JSON: microseconds a step of each, and their share of a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from our_arms import our_trainer
from record import save
from transformers import PrinterCallback, TrainerCallback
from workload import Workload

from qwen2audio_train.training.trainers.guard import GuardedTrainer, StepGuard
from qwen2audio_train.training.trainers.packed import PackedTrainer
from qwen2audio_train.training.trainers.watchdog import Watchdog

GUARDS: tuple[tuple[type, str], ...] = (
    (StepGuard, "add"),
    (StepGuard, "take"),
    (StepGuard, "count"),
    (GuardedTrainer, "rotate"),
    (GuardedTrainer, "sum_over_ranks"),
    (PackedTrainer, "_count"),
    (Watchdog, "alive"),
)


class Steps(TrainerCallback):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def timed(owner: type, name: str, spent: Counter[str]) -> None:
    """Add up the CPU time of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[f"{owner.__name__}.{name}"] += time.process_time() - began  # type: ignore[assignment]

    setattr(owner, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps that are measured")
    parser.add_argument("--save", metavar="NAME", help="store the figures as benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"shape": "small", "dtype": "float32", "device": "cpu", "optim": "adamw_torch_fused", "micro_batches": 1}
    spent: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps()
        workload = Workload(argparse.Namespace(rounds=options.rounds, **shape), "3s", folder)
        trainer = our_trainer(workload, steps, lambda model: model)
        trainer.remove_callback(PrinterCallback)
        for owner, name in GUARDS:
            timed(owner, name, spent)
        with trainer.watchdog.watching(900.0):  # type: ignore[attr-defined]
            trainer.train()
    step_s = median(steps.seconds)
    each = {name: round(1e6 * seconds / len(steps.seconds)) for name, seconds in sorted(spent.items())}
    found = {"step_s": round(step_s, 3), "microseconds": each, "share": round(sum(each.values()) / 1e6 / step_s, 5)}
    if options.save:
        save(options.save, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
