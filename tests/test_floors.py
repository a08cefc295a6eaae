"""The walls between the rooms, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen2audio_train"

GROUND = {"layout", "combinations", "config", "config_check", "config_data"}

FLOORS = {
    "layout": set(),
    "combinations": set(),
    "config_check": set(),
    "config_data": {"config_check"},
    "config": {"combinations", "config_check", "config_data"},
    "data": GROUND,
    "model": GROUND,
    "evaluation": GROUND | {"data", "model"},
    "training": GROUND | {"data", "model", "evaluation"},
    "launch": GROUND | {"data", "model", "evaluation", "training"},
}
"""What each room may import besides itself."""

HOMES = {
    "trl": ("training/",),
    "peft": ("model/adapters.py",),
    "hydra": ("launch/",),
    "wandb": ("training/", "evaluation/"),
    "deepspeed": ("training/", "evaluation/"),
}
"""Where a third party may be imported."""

LONGEST = 350


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def place(path: Path) -> str:
    """`training/stage.py`, `launch/dpo.py`."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sources(), ids=place)
def test_imports_keep_the_floors(path: Path) -> None:
    room = place(path).split("/")[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == PACKAGE.name:
            other = rest.split(".")[0]
            assert other == room or other in FLOORS.get(room, set()), f"{room} may not import {name}"
        elif top in HOMES:
            assert place(path).startswith(HOMES[top]), f"{top} may only be imported in {' or '.join(HOMES[top])}"


@pytest.mark.parametrize("path", sources(), ids=place)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST


def test_every_room_has_a_floor() -> None:
    rooms = {place(path).split("/")[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert rooms == set(FLOORS)
