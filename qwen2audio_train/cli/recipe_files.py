"""The files under recipes/ as Hydra reads them: text stays as it is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from typing_extensions import override

from qwen2audio_train.config.as_written import load_yaml
from qwen2audio_train.config.keys import type_at
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig, ExportConfig


class RecipeFiles(FileConfigSource):
    """Hydra's source of YAML files, with every file read against the part of the schema that it fills."""

    @override
    def load_config(self, config_path: str) -> ConfigResult:
        """The file of `config_path`, such as `data/selfmade`."""
        result = super().load_config(config_path)
        file = Path(self.path) / self._normalize_file_name(config_path)
        schema = _schema_of(config_path, result.header["package"])
        read = load_yaml(file.read_text(encoding="utf-8"), schema)
        return dataclasses.replace(result, config=OmegaConf.create(read or {}))


def keep_text_in_recipes() -> None:
    """Let Hydra read its files through `RecipeFiles`."""
    Plugins.instance()  # has Hydra's own sources registered, of which one is replaced
    SourcesRegistry.instance().types["file"] = RecipeFiles


def _schema_of(config_path: str, package: str | None) -> Any:
    """The type of what a file holds: of its group's part, or of the root that it is or says it goes into."""
    *groups, name = config_path.removesuffix(".yaml").strip("/").split("/")
    roots = {"evaluate": EvaluateConfig, "export": ExportConfig, "recipe": RecipeConfig}
    root = StageConfig if groups else roots.get(name.split("_")[0], StageConfig)
    keys = groups if package in (None, "_group_") else [] if package == "_global_" else package.split(".")
    return type_at(root, ".".join(keys)) if keys else root
