"""What `--help` says: the script's own story, then every key with its type, default and meaning."""

from __future__ import annotations

import textwrap
from pathlib import Path

from qwen2audio_train.config.keys import keys_of

WIDTH = 110


def script_help(story: str | None, schema: object) -> str:
    """The story of a script without a recipe, and its keys."""
    return f"{story or ''}\n{key_list(schema)}"


def recipe_help(story: str | None, schema: object, recipes: Path, root: str) -> str:
    """The story of a script with a recipe, the choices of its groups, and its keys."""
    named = (recipes / f"{root}.yaml").read_text(encoding="utf-8")
    groups = {path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in recipes.iterdir() if path.is_dir()}
    lines = [f"  {name}={' | '.join(groups[name])}" for name in sorted(groups) if f"- {name}:" in named]
    files = "\n".join(["Files of keys, one of each folder in recipes/:", *_wrapped(lines), ""]) if lines else ""
    defaults = f"recipes/{root}.yaml sets other defaults than the schema's below; `--cfg job` prints them all."
    return f"{story or ''}\n{defaults}\n\n{files}\n{key_list(schema)}"


def key_list(schema: object) -> str:
    """All keys of a schema, one below the other."""
    lines = ["Keys (key=value):"]
    for key in keys_of(schema):
        default = f" = {key.default}" if key.default else ""
        lines += [f"  {key.name}{default}   ({key.type})", *_wrapped([f"      {key.meaning}"])]
    return "\n".join(lines)


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="      ") or [line]]
