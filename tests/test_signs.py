"""Every room has a sign, and the map repeats it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_floors import PACKAGE, ROOT

ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def sign(room: Path) -> str:
    """First line of a room's docstring."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(ROOT).as_posix())
def test_a_room_has_a_sign(room: Path) -> None:
    assert sign(room).endswith((".", ":"))


@pytest.mark.parametrize("row", re.findall(r"^\| `([a-z/_]+)` \| (.+) \|$", MAP, re.MULTILINE), ids=lambda row: row[0])
def test_the_map_repeats_the_signs(row: tuple[str, str]) -> None:
    room, text = row
    assert sign(PACKAGE / room) == text


def test_files_that_the_map_names_are_there() -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|yaml))`", MAP))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (PACKAGE / name).exists() and not (ROOT / name).exists()] == []
