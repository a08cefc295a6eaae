"""What is said of keys: in words, complete, and the same on the page and in --help."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import keys as page
from launch import pretrain
from qwen2audio_train.cli.compose import LAUNCH, launch
from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import Order, SampleRecipe
from qwen2audio_train.config.keys import Key, keys_of, meanings
from qwen2audio_train.config.schema import StageConfig

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain", "sft", "dpo", "grpo", "encoder"}


@dataclass
class Inner:
    """Something below.

    Attributes:
        share: a share
            of the whole.
    """

    share: float = at_least(0, 0.5, 1)


@dataclass
class Outer:
    """Something.

    Attributes:
        first, second: two: alike.
        order: which way.
        inner: what is below.
        many: more of it, by name.
        parts: some words.
    """

    first: str
    second: int | None = None
    order: Order = Order.shuffled
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    parts: list[str] = field(default_factory=lambda: ["a"], metadata={"choices": ("a", "b")})


def test_keys_of_a_schema() -> None:
    assert list(keys_of(Outer)) == [
        Key("first", "text", "required", "two: alike."),
        Key("second", "integer", "unset", "two: alike."),
        Key("order", "shuffled | short_first | sequential", "shuffled", "which way."),
        Key("inner", "keys", "", "what is below."),
        Key("inner.share", "number, 0 to 1", "0.5", "a share of the whole."),
        Key("many", "name: keys", "{}", "more of it, by name."),
        Key("many.<name>.share", "number, 0 to 1", "0.5", "a share of the whole."),
        Key("parts", "list of a | b", "[a]", "some words."),
    ]


def command_schemas() -> dict[str, Any]:
    """`script command` -> schema, of every script of launch/ that names them."""
    found: dict[str, Any] = {}
    for path in sorted(LAUNCH.glob("[!_]*.py")):
        module = importlib.import_module(f"launch.{path.stem}")
        found |= {f"{path.stem} {name}": schema for name, (schema, _) in getattr(module, "COMMANDS", {}).items()}
        found |= {path.stem: module.OPTIONS} if hasattr(module, "OPTIONS") else {}
    return found


@pytest.mark.parametrize("schema", [*page.SCHEMAS.values(), *command_schemas().values()])
def test_every_key_has_a_meaning_and_nothing_else_has_one(schema: Any) -> None:
    assert [key.name for key in keys_of(schema) if not key.meaning] == []
    assert set(meanings(schema)) == {one.name for one in dataclasses.fields(schema)}


def test_a_recipe_of_samples_says_no_more_than_it_has() -> None:
    assert set(meanings(SampleRecipe)) <= {one.name for one in dataclasses.fields(SampleRecipe)}


def test_the_page_has_every_command() -> None:
    listed = {name for names in page.SCHEMAS for name in names.split(", ")}
    assert listed >= STAGES | {name for name in command_schemas() if not name.startswith("texts")}


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs/config_keys.md").read_text(encoding="utf-8") == page.page(), "run `make docs-keys`"


def test_help_of_a_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    launch(pretrain.main, "pretrain", StageConfig)
    said = capsys.readouterr().out
    assert said.startswith("Stage one, multi-task pre-training:")
    assert "  adapter=lora | lora_all |" in said
    assert "  data.packs_per_step = 8   (integer, 1 or more)\n      packs of one optimiser step, over all ranks" in said


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("launch.data").main(["convert", "--help"]) == 0
    said = capsys.readouterr().out
    assert "  skip_bad = false   (true | false)\n      leave bad rows out; else nothing is written" in said
