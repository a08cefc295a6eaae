"""Whatever the package raises of its own is something that a user can mend."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

from tests.test_floors import place, sources

BUILTIN = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}


@pytest.mark.parametrize("path", sources(), ids=place)
def test_every_error_class_is_a_user_error(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name != "UserError":
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            assert not bases & BUILTIN, f"{node.name}: derive it from a UserError (errors.py)"
