"""The one table of Trainer's and TRL's arguments (`arguments.yaml`): what works here, and why the others are refused.

What would be taken and ignored, or would mean something else on packed rows, is refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig

from qwen2audio_train.config.bounds import nearest, no_choice, too_small
from qwen2audio_train.config.combinations import OWN_OPTIMIZERS
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.stages.argument_rules import misfits_together

SECTIONS: dict[type, tuple[str, ...]] = {
    TrainingArguments: ("TrainingArguments",),
    DPOConfig: ("TrainingArguments", "Preference", "DPOConfig"),
    KTOConfig: ("TrainingArguments", "Preference", "KTOConfig"),
}


@cache
def arguments_table() -> dict[str, dict[str, dict[str, Any]]]:
    """Entries of every argument by section, as `arguments.yaml` describes them."""
    table: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("arguments.yaml").read_text())
    return table


def entries(kind: type[TrainingArguments]) -> dict[str, dict[str, Any]]:
    """The entries of one class, without the arguments that the installed transformers does not have yet."""
    sections = [arguments_table()[section] for section in SECTIONS[kind]]
    installed = {field.name for field in dataclasses.fields(kind)}
    return {name: entry for section in sections for name, entry in section.items() if name in installed}


def check_trainer_keys(given: Mapping[str, Any], kind: type[TrainingArguments]) -> None:
    """Refuse keys below `trainer` that do not work here, values that do not, and values that do not go together.

    Raises:
        ConfigError: with the key, what was found, and what to use instead.
    """
    hints, known = get_type_hints(kind), entries(kind)
    for key, value in given.items():
        if key not in known:
            works = [name for name, entry in known.items() if "works" in entry]
            raise ConfigError(f"trainer.{key}: {kind.__name__} has no such argument; {nearest(key, works, 'trainer.')}")
        for reason in wrong(key, value, known[key], hints[key]):
            raise ConfigError(f"trainer.{key}: {reason}")
    for reason in misfits_together(given):
        raise ConfigError(reason)


def wrong(key: str, value: Any, entry: Mapping[str, Any], hint: Any) -> Iterator[str]:
    """Why an argument or its value is refused, the first reason first."""
    if "set" in entry:
        yield f"decided elsewhere in the recipe; set {entry['set']} instead"
    if "refused" in entry:
        instead = f"; use {entry['instead']} instead" if "instead" in entry else "; leave it out"
        yield f"has no place in this project: {entry['refused']}{instead}"
    if key == "optim" and value in OWN_OPTIMIZERS:
        return
    choices = entry.get("values", ())
    for word in value if isinstance(value, list) else [value]:
        if choices and word is not None and word not in choices:
            yield _no_value(key, word, choices)
    if not matches(value, hint):
        yield f"{value!r} is a {type(value).__name__}, expected {_readable(hint)}"
    for reason in too_small(f"trainer.{key}", value, entry.get("least")):
        yield reason.removeprefix(f"trainer.{key}: ")
    if isinstance(value, int | float) and value > entry.get("most", value):
        yield f"{value} is too large; expected {entry['most']} or less"


def _no_value(key: str, word: Any, choices: list[str]) -> str:
    if word == "epoch":
        return "an epoch here is the whole run, so it would happen once, at the end; use steps"
    if word in ("reduce_lr_on_plateau", "greedy"):
        return f"{word} follows evaluations, which neither a plan nor a resumed run can know; use one of {choices}"
    return no_choice(f"trainer.{key}", word, choices).removeprefix(f"trainer.{key}: ")


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits a type hint; hints that YAML cannot express are left to the class itself."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in get_args(hint))
    plain = origin or hint
    if plain is Any or not isinstance(plain, type):
        return True
    if plain is type(None):
        return value is None
    if plain is bool:
        return isinstance(value, bool)
    if plain in (int, float):
        allowed = (int,) if plain is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    if plain in (str, list, dict):
        return isinstance(value, plain)
    return isinstance(value, (str, dict, list, plain))


def _readable(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def table() -> str:
    """The table in Markdown, as docs/arguments.md shows it."""
    lines = []
    for section, rows in arguments_table().items():
        lines += [f"## {section}", "", "| key below `trainer` | here |", "| --- | --- |"]
        lines += [f"| `{name}` | {_cell(entry)} |" for name, entry in rows.items()]
        lines.append("")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any]) -> str:
    if "set" in entry:
        return f"set `{entry['set']}`"
    if "refused" in entry:
        instead = f"; use `{entry['instead']}`" if "instead" in entry else ""
        return f"refused: {entry['refused']}{instead}"
    values = f" (one of {', '.join(entry['values'])})" if "values" in entry else ""
    untested = f"; untested: {entry['untested']}" if "untested" in entry else ""
    return f"{entry['works']}{values}{untested}"
