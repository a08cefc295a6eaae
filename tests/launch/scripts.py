"""The launch scripts as modules, and their door without a command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import hydra

from qwen2audio_train.config.schema import EvaluateConfig, ExportConfig, RecipeConfig, StageConfig, load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPES = ROOT / "recipes"

SCHEMAS = {
    "encoder": StageConfig,
    "pretrain": StageConfig,
    "sft": StageConfig,
    "dpo": StageConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "recipe": RecipeConfig,
    "recipe_recordings": RecipeConfig,
}


def script(name: str) -> ModuleType:
    """`launch/<name>.py`, imported as when it is run: with its own folder on the path."""
    if str(LAUNCH) not in sys.path:
        sys.path.append(str(LAUNCH))
    return importlib.import_module(name)


def composed(root: str, *overrides: str) -> StageConfig:
    """The checked config of a root with overrides as they stand on its command line."""
    as_override = script("compose").as_override
    with hydra.initialize_config_dir(str(RECIPES), version_base=None):
        raw = hydra.compose(root, [as_override(override) for override in overrides])
    config: StageConfig = load_config(raw, SCHEMAS[root])
    return config
