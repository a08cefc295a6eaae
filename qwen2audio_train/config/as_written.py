"""YAML in which text stays as it is written.

YAML makes truth values of no, on and off, and numbers of 007 and 1e3. Where the schema says text or a choice, the
scalar is kept: `language: no` is Norwegian. Anything else is read as YAML reads it.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf._utils import get_yaml_loader

from qwen2audio_train.config.bounds import inner_type

TEXT = "tag:yaml.org,2002:str"
REINTERPRETED = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
NULLS = ("null", "Null", "NULL")


def load_yaml(text: str, schema: object) -> Any:
    """The plain containers of a YAML document, its scalars as `schema` (a type) wants them. Raises yaml.YAMLError."""
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, schema)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _below(schema: object, key: str) -> Any:
    """The type of what a container of a type holds under a key; None where the schema does not say."""
    schema = inner_type(schema)
    if dataclasses.is_dataclass(schema):
        return get_type_hints(schema).get(key)
    return get_args(schema)[-1] if get_origin(schema) in (dict, list) else None


def _is_text(schema: object) -> bool:
    """Whether a type is text, or a choice among words."""
    schema = inner_type(schema)
    return isinstance(schema, type) and issubclass(schema, str | Enum)


def _is_optional(schema: object) -> bool:
    return type(None) in get_args(schema)


def _keep_text(node: yaml.Node, schema: object) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag in REINTERPRETED or key.value in NULLS:
                key.tag = TEXT
            _keep_text(value, _below(schema, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_text(item, _below(schema, "0"))
    elif _is_text(schema):
        is_null_word = node.value in NULLS and not _is_optional(schema)
        if node.tag in REINTERPRETED or is_null_word:
            node.tag = TEXT
