"""From a command line to a checked config: Hydra composes the recipe, the schema lets it in or refuses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from qwen2audio_train.config.schema import ConfigError, RecipeConfig, Schema, StageConfig, load_config, nearest
from qwen2audio_train.data.audio.decode import AudioError
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.order.state import DataStateError
from qwen2audio_train.data.prompts.render import ExampleError
from qwen2audio_train.data.quarantine import TooManyBadExamples
from qwen2audio_train.data.storage.blobs import BlobError
from qwen2audio_train.training.chain import StageFailed
from qwen2audio_train.training.checkpoints.folder import CheckpointError
from qwen2audio_train.training.reference.cache import ReferenceCacheError
from qwen2audio_train.training.trainers.packed import Diverged

USER_ERRORS = (
    AudioError,
    BlobError,
    CheckpointError,
    ConfigError,
    DataStateError,
    Diverged,
    ExampleError,
    ManifestError,
    OSError,
    ReferenceCacheError,
    StageFailed,
    TooManyBadExamples,
)
"""What a user can mend: printed without a traceback."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

STAGE_KEYS = {field.name for field in fields(StageConfig)} - {field.name for field in fields(RecipeConfig)}

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def launch(main: Callable[[Schema], None], root: str, schema: type[Schema]) -> None:
    """Compose `recipes/<root>.yaml` with the command line's overrides, check it against `schema` and call `main`.

    One of `USER_ERRORS` is printed without a traceback.
    """
    try:
        sys.argv[1:] = [as_argument(argument, before, schema) for before, argument in pairwise(sys.argv)]
    except ConfigError as error:
        fail(error)

    @hydra.main(version_base=None, config_path=str(RECIPES), config_name=root)
    def composed(raw: DictConfig) -> None:
        try:
            config = load_config(raw, schema)
            if isinstance(config, StageConfig) and config.stage != root:
                raise ConfigError(f"stage={config.stage}: this script runs {root}; start launch/{config.stage}.py")
            main(config)
        except USER_ERRORS as error:
            fail(error)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    composed()


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


def fail(error: Exception) -> NoReturn:
    """End with the message alone; exit status 2 tells a launcher that trying again is no use."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
