"""Parts that begin to learn later, or stop earlier, than the run: their learning rate is 0 meanwhile.

The rate is a function of the step alone, so a resumed run has it from the first step on, and every backend obeys it
(ZeRO cannot take parameters out of a running engine). The price: a part that waits has its gradient computed, it counts
in `trainer.max_grad_norm`, and its moments gather. A part that is frozen for the whole run belongs into `model.freeze`,
which saves that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qwen2audio_train.config.schema import ConfigError, OptimizerConfig

Factor = Callable[[int], float]
"""Step -> factor on the rate of a group."""


def freeze_by_step(scheduler: Any, rates: OptimizerConfig) -> None:
    """Make the factors of a `LambdaLR` 0 where the part of their group is frozen.

    Args:
        scheduler: whose optimizer has groups of `freeze.parameter_groups`, named `part.decay.N`.

    Raises:
        ConfigError: a named part has no trainable parameter, or begins to learn when it no longer may.
    """
    if not (rates.frozen_until or rates.frozen_from):
        return
    parts = [group["name"].split(".")[0] for group in scheduler.optimizer.param_groups]
    for key, steps in (("frozen_until", rates.frozen_until), ("frozen_from", rates.frozen_from)):
        if idle := sorted(set(steps) - set(parts)):
            raise ConfigError(f"optimizer.{key}: {', '.join(idle)} has no trainable parameter; see model.freeze")
    for part in rates.frozen_until.keys() & rates.frozen_from.keys():
        first, end = rates.frozen_until[part], rates.frozen_from[part]
        if first >= end:
            raise ConfigError(f"optimizer.frozen_from.{part}={end}: not after frozen_until={first}, so it never learns")
    scheduler.lr_lambdas = [
        partial(_gated, factor, rates.frozen_until.get(part, 0), rates.frozen_from.get(part))
        for factor, part in zip(scheduler.lr_lambdas, parts, strict=True)
    ]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def _gated(factor: Factor, first: int, end: int | None, step: int) -> float:
    return factor(step) if first <= step and (end is None or step < end) else 0.0
