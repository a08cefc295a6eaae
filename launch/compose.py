"""From a command line to a checked config: Hydra composes the recipe, the schema lets it in or refuses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from qwen2audio_train.config import ConfigError, Schema, StageConfig, load_config, nearest
from qwen2audio_train.data.audio import AudioError
from qwen2audio_train.data.blobs import BlobError
from qwen2audio_train.data.quarantine import TooManyBadExamples
from qwen2audio_train.data.record import ManifestError
from qwen2audio_train.data.render import ExampleError
from qwen2audio_train.data.state import DataStateError
from qwen2audio_train.training.chain import StageFailed
from qwen2audio_train.training.checkpoint import CheckpointError
from qwen2audio_train.training.reference_cache import ReferenceCacheError

USER_ERRORS = (
    AudioError,
    BlobError,
    CheckpointError,
    ConfigError,
    DataStateError,
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

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def launch(main: Callable[[Schema], None], root: str, schema: type[Schema]) -> None:
    """Compose `recipes/<root>.yaml` with the command line's overrides, check it against `schema` and call `main`.

    One of `USER_ERRORS` is printed without a traceback.
    """
    try:
        sys.argv[1:] = [as_override(argument) for argument in sys.argv[1:]]
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


def fail(error: Exception) -> NoReturn:
    """End with the message alone; exit status 2 tells a launcher that trying again is no use."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
