"""The walls between the rooms, read from the imports."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen2audio_train"

GROUND = ("layout", "batch", "errors", "families", "config")
DATA = (
    *("data.storage", "data.examples", "data.quarantine", "data.prompts", "data.manifests", "data.order", "data.audio"),
    *("data.samples", "data.loading", "data.tools"),
)
EVALUATION = (
    *("evaluation.decoding", "evaluation.scoring", "evaluation.judging", "evaluation.backends"),
    "evaluation.reporting",
)
TRAINING = (
    *("training.checkpoints", "training.reference", "training.trainers", "training.stages", "training.chain"),
    "planning",
    "finetune",
    "ablation",
)
MODEL = ("model",)

TOWERS = (
    (*GROUND, *DATA),
    (*GROUND, *MODEL),
    (*GROUND, "selfmade"),
    (*GROUND, "cli"),
    (
        *GROUND,
        *DATA,
        *MODEL,
        *EVALUATION,
        "export",
        "card",
        "pairs",
        "selfmade",
        "parts",
        "chat",
        *TRAINING,
        "cli",
        "launch",
    ),
)
"""Rooms from the ground up. A room imports only what stands below it in each tower that it stands in: so `data` and
`model` know nothing of each other, and `selfmade` knows the ground alone."""

HOMES = {
    "trl": ("training/",),
    "peft": ("model/adapters.py",),
    "hydra": ("cli/",),
    "wandb": ("training/", "evaluation/"),
    "gradio": ("chat/page.py",),
    "deepspeed": ("training/", "evaluation/"),
}
"""Where a third party may be imported."""

LONGEST = 350


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def place(path: Path) -> str:
    """`training/stages/run.py`, `launch/dpo.py`."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def module(path: Path) -> str:
    """`qwen2audio_train.training.stages.run`; a package is called by its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> frozenset[str]:
    return frozenset(map(module, sources()))


def room(name: str) -> str:
    """The room of a module of ours: `data.order`, `model`, `launch`; "" for the package itself."""
    parts = name.removeprefix(f"{PACKAGE.name}").strip(".").split(".")
    return ".".join(parts[:2]) if parts[0] in ("data", "evaluation", "training") else parts[0]


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports, at its top, inside a function or for its types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules() else str(node.module))
    return frozenset(names)


@pytest.mark.parametrize("path", sources(), ids=place)
def test_imports_keep_the_floors(path: Path) -> None:
    here = room(module(path))
    for name in imports(path):
        if name.split(".")[0] == PACKAGE.name:
            other = room(name)
            if other in (here, ""):
                continue
            for tower in (tower for tower in TOWERS if here in tower):
                assert other in tower[: tower.index(here)], f"{here} may not import {name}"
        elif name.split(".")[0] in HOMES:
            homes = HOMES[name.split(".")[0]]
            assert place(path).startswith(homes), f"{name} may only be imported in {' or '.join(homes)}"


def test_no_module_imports_in_a_circle() -> None:
    arrows = {module(path): imports(path) & modules() for path in sources()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("path", sources(), ids=place)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST


def test_every_room_has_a_floor() -> None:
    rooms = {room(module(path)) for path in sources()} - {"", "data", "evaluation", "training"}
    assert rooms == {name for tower in TOWERS for name in tower}
