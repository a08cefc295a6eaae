"""A script with several commands, each with keys of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen2audio_train.cli.compose import HELP, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import key_list
from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError

Commands = Mapping[str, tuple[type[Any], Callable[[Any], int]]]
"""Name -> the dataclass of its keys, and what runs it: options -> exit status."""


def run_command(commands: Commands, story: str | None, arguments: Sequence[str]) -> int:
    """Run `NAME [keys.yaml] key=value ...`; without a name, or with --help, print the script's `story`.

    `NAME --help` prints the keys of that command.

    Returns:
        The exit status of the command. Where the command line is wrong the process ends in `door`.
    """
    if not arguments or arguments[0] in HELP:
        print(story)
        return 0 if arguments else 2
    name, *rest = arguments
    with door():
        if name not in commands:
            raise ConfigError(f"{name}: no such command; {nearest(name, commands)}")
        schema, run = commands[name]
        if HELP & set(rest):
            print(key_list(schema))
            return 0
        return run(given(rest, schema))
