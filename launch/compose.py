"""From a command line to a checked config: Hydra composes the recipe, the schema lets it in or refuses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from qwen2audio_train.config.schema import ConfigError, RecipeConfig, Schema, StageConfig, load_config, nearest
from qwen2audio_train.errors import UserError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

STAGE_KEYS = {field.name for field in fields(StageConfig)} - {field.name for field in fields(RecipeConfig)}

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def launch(main: Callable[[Schema], None], root: str, schema: type[Schema]) -> None:
    """Compose `recipes/<root>.yaml` with the command line's overrides, check it against `schema` and call `main`.

    What a user can mend is printed without a traceback; see `door`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra cuts tracebacks short and prints errors in its own way

    @hydra.main(version_base=None, config_path=str(RECIPES), config_name=root)
    def composed(raw: DictConfig) -> None:
        with door():  # Hydra would say of an error that goes through it which overrides it saw
            config = load_config(raw, schema)
            if isinstance(config, StageConfig) and config.stage != root:
                raise ConfigError(f"stage={config.stage}: this script runs {root}; start launch/{config.stage}.py")
            main(config)

    with door():
        sys.argv[1:] = [as_argument(argument, before, schema) for before, argument in pairwise(sys.argv)]
        composed()


@contextmanager
def door() -> Iterator[None]:
    """End the process with a message and no traceback where the user can mend what stopped it.

    The exit status is 2, which tells a launcher that trying again is no use, and 130 after Ctrl-C. Files of keys that
    Hydra, OmegaConf or YAML cannot read are the user's; any other error goes on, with its traceback.
    """
    try:
        yield
    except (UserError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def given(arguments: Sequence[str]) -> Any:
    """YAML files and key=value pairs in one config. Raises ConfigError for anything else."""
    files = [argument for argument in arguments if "=" not in argument]
    for argument in files:
        if not argument.endswith((".yaml", ".yml")):
            raise ConfigError(f"{argument}: expected key=value, or a YAML file that holds keys")
    pairs = OmegaConf.from_dotlist([argument for argument in arguments if "=" in argument])
    return OmegaConf.merge(*[OmegaConf.load(file) for file in files], pairs)


def as_argument(argument: str, before: str, schema: type[Schema]) -> str:
    """An argument of a script's command line; one after an option of Hydra's (`--cfg job`) is that option's value.

    Raises:
        ConfigError: for what is neither an option nor key=value, and for a stage's key where a whole recipe is run.
    """
    if "=" not in argument:
        if before.startswith("-") or argument.startswith(("-", "~")):
            return argument
        raise ConfigError(f"{argument}: expected key=value")
    part = argument.partition("=")[0].split(".")[0].lstrip("+~")
    if schema is RecipeConfig and part in STAGE_KEYS:
        raise ConfigError(
            f"{argument}: {part} is a key of the stages; write \"overrides=['{argument}']\" to set it for all of them, "
            f"\"stages.sft.overrides=['{argument}']\" for one"
        )
    return as_override(argument)


def as_override(argument: str) -> str:
    """Let `key=value` reach the schema, whose refusal names the nearest right key; check the choice of a group here.

    Raises:
        ConfigError: for a group's choice that has no file, and for a value that Hydra's grammar does not read.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith(("-", "+", "~", "hydra")):
        return argument
    if not key:
        raise ConfigError(f"{argument}: expected key=value")
    if (RECIPES / key).is_dir():
        choices = [path.stem for path in (RECIPES / key).glob("*.yaml")]
        if value not in choices:
            raise ConfigError(f"{key}={value}: no such choice; {nearest(value, choices, f'{key}=')}")
        return argument
    try:
        OverridesParser.create().parse_override(f"++{argument}")
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{argument}: expected key=value ({reason}); quote a value: {key}='\"...\"'") from error
    return f"++{argument}"


def check_file(key: str, path: str) -> None:
    """Raises ConfigError when the file that `key` names is not there; better now than after the model is loaded."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no file {path!r} (looked in {Path.cwd()})")
