"""What may differ between a recipe and the checkpoint that it goes on from: a rule for every key.

A checkpoint's state never overrules the recipe in silence. At every resume the recipe that saved it is compared with
the one that goes on: what differs is printed, and applied or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qwen2audio_train.config.combinations import ADAMW, ADAMW_OFFLOADED


class Rule(StrEnum):
    """What becomes of a key that differs."""

    call = "call"
    """Belongs to the command, not to the run."""
    free = "free"
    """Nothing that is learned depends on it (rounding aside); the recipe's value holds at once."""
    applied = "applied"
    """Holds from the next step on, with the state as it is. A finished run is another run with it."""
    data = "data"
    """The state of the data refuses it, or goes on as `data.on_changed_data` says."""
    content = "content"
    """Names weights, which are compared by their checksums."""
    refused = "refused"
    """What was learned belongs to the value that it was learned with."""


RULES: dict[str, Rule] = {
    "stage": Rule.refused,
    "name": Rule.call,
    "run_dir": Rule.call,
    "seed": Rule.refused,
    "init_from": Rule.content,
    "resume": Rule.call,
    "dry_run": Rule.call,
    "num_threads": Rule.free,
    "watchdog_s": Rule.free,
    "keep_every_steps": Rule.free,
    "model": Rule.refused,
    "model.path": Rule.content,
    "model.audio_encoder": Rule.content,
    "model.language_model": Rule.content,
    "model.activation_checkpointing": Rule.free,
    "model.activation_checkpointing_policy": Rule.free,
    "model.compile": Rule.free,
    "model.encoder_cache_dir": Rule.free,
    "model.encoder_cache_max_gib": Rule.free,
    "data": Rule.data,
    "data.augment": Rule.applied,
    "data.loss_weighting": Rule.refused,
    "data.eval_sources": Rule.free,
    "data.packs_per_forward": Rule.free,
    "data.share_prefixes": Rule.free,
    "data.num_workers": Rule.free,
    "data.prefetch_factor": Rule.free,
    "data.max_bad_examples": Rule.free,
    "data.max_bad_share": Rule.free,
    "data.network_retries": Rule.free,
    "data.network_timeout_s": Rule.free,
    "data.decode_timeout_s": Rule.free,
    "data.cache_dir": Rule.free,
    "data.cache_max_gib": Rule.free,
    "data.on_changed_data": Rule.free,
    "decoded": Rule.free,
    "adapter": Rule.refused,
    "optimizer": Rule.applied,
    "trainer": Rule.applied,
    "trainer.optim": Rule.refused,
    "trainer.bf16": Rule.refused,
    "trainer.loss_type": Rule.refused,
    **{f"trainer.{start}": Rule.free for start in ("eval", "log", "logging", "save")},
    "trainer.use_cpu": Rule.free,
    "deepspeed": Rule.free,
    "deepspeed.extra": Rule.applied,
    "tracker": Rule.free,
    "grpo": Rule.applied,
    "ctc": Rule.refused,
    "preference": Rule.refused,
    "preference.reference": Rule.applied,
    "preference.cache_dir": Rule.free,
    "preference.probe_examples": Rule.free,
    "preference.watch": Rule.applied,
    "preference.watch_lower": Rule.applied,
    "preference.patience": Rule.applied,
}
"""A key's rule is that of its longest beginning here, up to a dot or an underscore."""

SAME_STATE = frozenset({ADAMW})
"""Values of `trainer.optim` that keep the same state."""

PER_WEIGHT = ADAMW | ADAMW_OFFLOADED | {"sgd"}
"""Optimizers whose state is one number per weight, which other ranks and backends can share out anew."""


@dataclass(frozen=True)
class Change:
    """A key that differs: what it was when saved, and is now."""

    key: str
    then: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.then)} when saved, {_shown(self.now)} now"


def _shown(value: Any) -> str:
    return "unset" if value is UNSET else repr(value)


UNSET: Any = object()


def rule_of(key: str) -> Rule:
    """The rule of a key's full name, such as `trainer.learning_rate`; a key without one is refused."""
    fitting = [start for start in RULES if key == start or (key.startswith(start) and key[len(start)] in "._")]
    return RULES[max(fitting, key=len)] if fitting else Rule.refused


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of everything in a nested mapping; lists are values."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def changes(then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """What differs between two recipes, as plain values; a key that the earlier one did not know had its default."""
    saved, known = dict(flat(then)), dict(flat(defaults))
    found = []
    for key, value in flat(now):
        before = saved.get(key, known.get(key, UNSET))
        if before != value:
            found.append(Change(key, before, value, rule_of(key)))
    gone = [key for key in saved if key not in dict(flat(now)) and key.startswith(("trainer.", "data.", "model."))]
    found += [Change(key, saved[key], UNSET, rule_of(key)) for key in gone if saved[key] not in ({}, None)]
    return [change for change in found if not _same(change)]


def _same(change: Change) -> bool:
    """Whether two values mean the same."""
    if change.key == "trainer.optim":
        return any({change.then, change.now} <= names for names in SAME_STATE)
    empty: tuple[Any, ...] = ({}, [], None, UNSET)
    return any(change.then is e or change.then == e for e in empty) and any(
        change.now is e or change.now == e for e in empty
    )
