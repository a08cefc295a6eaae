"""The console script: every script of launch/ by its name, from any folder.

qwen2audio-train                                  what there is
qwen2audio-train pretrain [key=value ...]         torchrun launch/pretrain.py [key=value ...]
qwen2audio-train --nproc=8 sft [key=value ...]    options before the name are torchrun's
qwen2audio-train --completion                     for bash and zsh: source <(qwen2audio-train --completion)
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen2audio_train.cli.completion import script
from qwen2audio_train.cli.compose import LAUNCH
from qwen2audio_train.cli.door import door
from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.keys import keys_of
from qwen2audio_train.config.schema import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script of launch/, or list them; ends with the exit status of the script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--completion"]:
        print(script(known_keys()))
        return
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), None)
    if place is None:
        print(f"{__doc__}\n{listing()}\n\nqwen2audio-train NAME --help says more about each.")
        sys.exit(0 if {"-h", "--help"} & set(words) or not words else 2)
    options, (name, *rest) = words[:place], words[place:]
    with door():
        if name not in (known := stories()):
            raise ConfigError(f"{name}: no such command; {nearest(name, known)}")
        path = LAUNCH / f"{name}.py"
        if f"torchrun launch/{name}.py" in known[name] and not {"-h", "--help"} & set(rest):
            under_torchrun(path, options, rest)
        else:
            sys.argv = [str(path), *rest]
            runpy.run_path(str(path), run_name="__main__")


def under_torchrun(script: Path, options: Sequence[str], arguments: Sequence[str]) -> None:
    """`torchrun`, one rank where the options say nothing; where a rank fails, its exit status and no traceback."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = [option.replace("--nproc=", "--nproc-per-node=") for option in options] or ["--standalone"]
    if not any("nnodes" in option or "rdzv" in option for option in options):
        options = ["--standalone", *(option for option in options if option != "--standalone")]
    try:
        run.main([*options, str(script), *arguments])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


def stories() -> dict[str, str]:
    """Name -> docstring of every script of launch/, read without importing them."""
    scripts = sorted(path for path in LAUNCH.glob("*.py") if path.stem != "__init__")
    return {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in scripts}


def known_keys() -> dict[str, list[str]]:
    """Name -> keys of every script of launch/; of one with several commands, those of all of them."""
    found: dict[str, list[str]] = {name: [] for name in stories()}
    for names, schema in runpy.run_path(str(LAUNCH / "keys.py"))["SCHEMAS"].items():
        for name in names.split(", "):
            found[name.split()[0]] += [key.name for key in keys_of(schema)]
    return found


def listing() -> str:
    """One line for every script."""
    return "\n".join(f"  {name:10} {text.split(chr(10))[0].split(':  ')[0]}" for name, text in stories().items())
