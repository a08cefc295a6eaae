"""What Trainer's and TRL's arguments demand of each other, asked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

DEFAULT_SCHEDULE = "cosine"
DEFAULT_MAX_STEPS = 1000

SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})

NEEDS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("eval_steps", "trainer.eval_strategy=steps", lambda given: _evaluates(given)),
    ("eval_delay", "trainer.eval_strategy=steps", lambda given: _evaluates(given)),
    ("save_steps", "trainer.save_strategy=steps", lambda given: given.get("save_strategy", "steps") == "steps"),
    (
        "logging_steps",
        "trainer.logging_strategy=steps",
        lambda given: given.get("logging_strategy", "steps") == "steps",
    ),
    ("metric_for_best_model", "trainer.save_strategy=best", lambda given: given.get("save_strategy") == "best"),
    ("greater_is_better", "trainer.metric_for_best_model", lambda given: bool(given.get("metric_for_best_model"))),
    (
        "f_alpha_divergence_coef",
        "trainer.f_divergence_type=alpha_divergence",
        lambda given: given.get("f_divergence_type") == "alpha_divergence",
    ),
    ("discopop_tau", "trainer.loss_type=[discopop]", lambda given: "discopop" in _losses(given)),
    (
        "label_smoothing",
        f"trainer.loss_type one of {', '.join(sorted(SMOOTHED_LOSSES))}",
        lambda given: bool(SMOOTHED_LOSSES & set(_losses(given))),
    ),
)
"""Arguments that do nothing without another: the argument, what it needs, and whether that is given."""


LOWER = {"loss", "wer", "cer", "hallucination", "aas_ms"}
"""Metrics in the names of held-out figures that are errors; Trainer takes every figure but `loss` for a score."""


def misfits_together(given: Mapping[str, Any]) -> Iterator[str]:
    """Describe arguments that would be ignored or fail beside the others.

    Args:
        given: keys below `trainer`, each of them known and of its right type.
    """
    for key, needed, met in NEEDS:
        if given.get(key) and not met(given):
            yield f"trainer.{key}={given[key]}: does nothing without {needed}"
    if given.get("save_strategy") == "best" and not _evaluates(given):
        yield "trainer.save_strategy=best: nothing says which is best; set trainer.eval_strategy=steps"
    if given.get("save_strategy") == "best" and not given.get("metric_for_best_model"):
        yield "trainer.save_strategy=best: set trainer.metric_for_best_model, such as eval_loss"
    yield from _best_misfits(given)
    for interval in ("logging_steps", "eval_steps", "save_steps"):
        if (steps := given.get(interval)) is not None and steps <= 0:
            yield f"trainer.{interval}: {steps} is too small; expected 1 or more, or a share of max_steps"
    yield from _preference_misfits(given)
    yield from _schedule_misfits(given)


def _best_misfits(given: Mapping[str, Any]) -> Iterator[str]:
    best = str(given.get("metric_for_best_model") or "")
    *kinds, _ = best.removeprefix("eval_").split("/")
    if LOWER & set(kinds) and given.get("greater_is_better") is None:
        yield f"trainer.metric_for_best_model={best}: the lower the better; set trainer.greater_is_better=false"


def _preference_misfits(given: Mapping[str, Any]) -> Iterator[str]:
    losses, weights = _losses(given), given.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield f"trainer.loss_weights: {len(weights)} weights for {len(losses)} losses ({', '.join(losses)})"
    if "robust" in losses and given.get("label_smoothing", 0.0) >= 0.5:
        yield "trainer.label_smoothing: the robust loss needs a share below 0.5"
    if "exo_pair" in losses and not given.get("label_smoothing"):
        yield "trainer.loss_type=exo_pair: set trainer.label_smoothing above 0, such as 1e-3"
    if given.get("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        yield "trainer.use_weighting: aot and aot_unpaired compare sorted pairs, which have no weights of their own"
    allowed = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
    if given.get("f_divergence_type", "reverse_kl") != "reverse_kl" and (others := set(losses) - allowed):
        kind = given["f_divergence_type"]
        yield f"trainer.f_divergence_type={kind}: {', '.join(sorted(others))} knows reverse_kl alone"


def _schedule_misfits(given: Mapping[str, Any]) -> Iterator[str]:
    """Build the schedule once, on a stand-in, and step through its corners."""
    name = given.get("lr_scheduler_type", DEFAULT_SCHEDULE)
    options = given.get("lr_scheduler_kwargs") or {}
    steps, warmup = given.get("max_steps", DEFAULT_MAX_STEPS), given.get("warmup_steps", 0)
    if isinstance(options, str):
        yield f"trainer.lr_scheduler_kwargs: {options!r} is a str, expected key: value pairs"
        return
    if name == "constant" and warmup:
        yield f"trainer.warmup_steps={warmup}: the schedule constant has no warmup; use constant_with_warmup, or 0"
    if name.startswith("constant") and options:
        yield f"trainer.lr_scheduler_kwargs: the schedule {name} takes nothing besides"
    try:
        schedule = get_scheduler(
            name,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=int(warmup if warmup >= 1 else warmup * steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(options),
        )
        for step in {0, steps // 2, steps}:
            schedule.lr_lambdas[0](step)
    except (TypeError, ValueError, KeyError) as error:
        make: Callable[..., Any] = TYPE_TO_SCHEDULER_FUNCTION[name]  # type: ignore[assignment]
        taken = inspect.signature(make).parameters
        known = sorted(set(taken) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})
        yield f"trainer.lr_scheduler_kwargs: {name} refuses {dict(options)} ({error}); it takes {', '.join(known)}"


def _evaluates(given: Mapping[str, Any]) -> bool:
    return given.get("eval_strategy", "no") != "no"


def _losses(given: Mapping[str, Any]) -> list[str]:
    losses = given.get("loss_type", ["sigmoid"])
    return [losses] if isinstance(losses, str) else list(losses)
