"""The launch scripts as modules, and their door without a command line."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen2audio_train.cli.compose import LAUNCH as LAUNCH
from qwen2audio_train.cli.compose import RECIPES as RECIPES
from qwen2audio_train.cli.compose import compose
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig, ExportConfig

ROOT = Path(__file__).parents[2]

SCHEMAS: dict[str, Any] = {
    "encoder": StageConfig,
    "pretrain": StageConfig,
    "sft": StageConfig,
    "dpo": StageConfig,
    "grpo": StageConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "qwen2_audio": RecipeConfig,
    "qwen_audio": RecipeConfig,
    "recipe": RecipeConfig,
    "recipe_recordings": RecipeConfig,
    "recipe_small": RecipeConfig,
}


def script(name: str) -> ModuleType:
    """`launch/<name>.py`."""
    return importlib.import_module(f"launch.{name}")


def composed(root: str, *overrides: str) -> Any:
    """The checked config of a root with overrides as they stand on its command line."""
    return compose(root, overrides, SCHEMAS[root])
