"""What is known of a single key of a schema, such as `data.sources.librispeech.path`."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

from qwen2audio_train.config.bounds import inner_type


def type_at(schema: Any, key: str) -> Any:
    """Type of a dotted key (`X` of `X | None`), or None where the schema has no such key or leaves it open."""
    found = inner_type(schema)
    for name in key.split("."):
        if dataclasses.is_dataclass(found):
            found = inner_type(get_type_hints(found).get(name))
        elif get_origin(found) is dict:
            found = inner_type(get_args(found)[1])
        else:
            return None
    return found
