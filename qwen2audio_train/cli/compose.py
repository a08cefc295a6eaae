"""From a command line to a checked config: Hydra composes the recipe, the schema lets it in or refuses it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_origin

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import qwen2audio_train
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import recipe_help
from qwen2audio_train.cli.recipe_files import keep_text_in_recipes
from qwen2audio_train.config.as_written import load_yaml
from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.keys import type_at
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError, Schema, StageConfig, load_config

HELP = {"-h", "--help"}
SWEEP = {"-m", "--multirun"}
"""Options of Hydra's with which a comma in a value separates runs."""

LONGEST_NAME = 120
"""Characters of a job's overrides in the name of a folder; file systems allow 255 bytes in all."""

STAGE_KEYS = {field.name for field in fields(StageConfig)} - {field.name for field in fields(RecipeConfig)}


def shipped(folder: str) -> Path:
    """`launch` or `recipes`: inside the package where it is installed, beside it in a checkout."""
    package = Path(qwen2audio_train.__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


keep_text_in_recipes()

RECIPES = shipped("recipes")
LAUNCH = shipped("launch")


def launch(main: Callable[[Schema], None], root: str, schema: type[Schema]) -> None:
    """Compose `recipes/<root>.yaml` with the command line's overrides, check it against `schema` and call `main`.

    What a user can mend is printed without a traceback; see `door`.
    """
    if HELP & set(sys.argv[1:]):
        print(recipe_help(main.__globals__["__doc__"], schema, RECIPES, root))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra cuts tracebacks short and prints errors in its own way

    @hydra.main(version_base=None, config_path=str(RECIPES), config_name=root)
    def composed(raw: DictConfig) -> None:
        with door():  # Hydra would say of an error that goes through it which overrides it saw
            if schema is StageConfig and "run_dir" in raw:
                raw.run_dir = own_folder(raw.run_dir, HydraConfig.get())
            config = load_config(raw, schema)
            if isinstance(config, StageConfig) and config.stage != root:
                raise ConfigError(f"stage={config.stage}: this script runs {root}; start launch/{config.stage}.py")
            main(config)

    with door():
        sys.argv[1:] = [as_argument(argument, before, schema) for before, argument in pairwise(sys.argv)]
        composed()


def own_folder(run_dir: str, hydra_config: Any) -> str:
    """The run folder, another one for an ablation and for every job of a sweep (`-m`), unless the command names one."""
    overrides = [override.lstrip("+") for override in hydra_config.overrides.task]
    if any(override.startswith("run_dir=") for override in overrides):
        return run_dir
    ablation = hydra_config.runtime.choices.get("ablation")
    names = [ablation] if ablation else []
    if hydra_config.mode is RunMode.MULTIRUN:
        job = ",".join(re.sub(r"[^\w.=-]", "_", text) for text in overrides if not text.startswith("ablation="))
        names += [job if len(job) < LONGEST_NAME else f"job{hydra_config.job.num}"] if job else []
    return "-".join([run_dir, *names])


def compose(root: str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """The checked config of a root of recipes/ with overrides as they stand on its command line.

    Inside of `launch` the folders are searched that it was given (`--config-dir`).

    Raises:
        ConfigError: what the schema refuses.
    """
    is_running = GlobalHydra.instance().is_initialized()
    with nullcontext() if is_running else hydra.initialize_config_dir(str(RECIPES), version_base=None):
        raw = hydra.compose(root, [as_override(override, schema) for override in overrides])
    return load_config(raw, schema)


def given(arguments: Sequence[str], schema: type[Schema]) -> Schema:
    """The checked config of a command that has no recipe: YAML files that hold keys, and key=value pairs, which win.

    Raises:
        ConfigError: for any other word, and what the schema refuses.
    """
    files = [argument for argument in arguments if "=" not in argument]
    for argument in files:
        if not argument.endswith((".yaml", ".yml")):
            raise ConfigError(f"{argument}: expected key=value, or a YAML file that holds keys")
        if not Path(argument).exists():
            raise ConfigError(f"{argument}: no such file (looked in {Path.cwd()}); expected a YAML file of keys")
    raw = OmegaConf.merge({}, *[load_yaml(Path(file).read_text(encoding="utf-8"), schema) or {} for file in files])
    for argument in arguments:
        if "=" in argument:
            override = OverridesParser.create().parse_override(readable(argument, schema))
            OmegaConf.update(raw, override.key_or_group, override.value(), force_add=True)
    assert isinstance(raw, DictConfig)
    return load_config(raw, schema)


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
    return as_override(argument, None if SWEEP & set(sys.argv) else schema)


def as_override(argument: str, schema: object) -> str:
    """Let `key=value` reach the schema, whose refusal names the nearest right key; check the choice of a group here.

    Without a schema commas separate the values of several runs, and no value is quoted.

    Raises:
        ConfigError: for a group's choice that has no file, and for a value that Hydra's grammar does not read.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith(("-", "+", "~", "hydra")):
        return argument
    if key and (RECIPES / key).is_dir():
        choices = [path.stem for path in (RECIPES / key).glob("*.yaml")]
        for choice in [value] if schema else value.split(","):
            if choice not in choices:
                raise ConfigError(f"{key}={choice}: no such choice; {nearest(choice, choices, f'{key}=')}")
        return argument
    return f"++{readable(argument, schema)}"


def readable(argument: str, schema: object) -> str:
    """`key=value` as Hydra's grammar reads it: the value of a key that holds text is quoted, and so stays as it is.

    Raises:
        ConfigError: for a value that the grammar does not read.
    """
    key, _, value = argument.partition("=")
    if not key:
        raise ConfigError(f"{argument}: expected key=value")
    kind = type_at(schema, key)
    is_entry = get_origin(type_at(schema, key.rpartition(".")[0])) is dict  # of a mapping, where null is a word as well
    if kind is str and (is_entry or value != "null") and value[:1] not in ("'", '"'):
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        quoted = '["..."]' if get_origin(kind) is list else '"..."'
        raise ConfigError(f"{argument}: expected key=value ({reason}); quote the value: {key}='{quoted}'") from error
    return argument
