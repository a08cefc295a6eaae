"""What is trained and at which rate: freezing and parameter groups, by part of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from qwen2audio_train.config.parts import PARTS, FreezeConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.families.family import Family
from qwen2audio_train.model.ctc import HEAD
from qwen2audio_train.model.packed import unwrap


def part_of(name: str, family: Family) -> str:
    """Part (of `config.parts.PARTS`) that the parameter `name` belongs to, bare or inside a PEFT wrapper.

    The parts are disjoint and together hold every parameter; `language_model` leaves its `embed_tokens` out.

    Raises:
        ValueError: the name has no part in it.
    """
    if f".{HEAD}" in f".{name}":  # it reads what the projector writes
        return "multi_modal_projector"
    return family.part_of(name)


def set_trainable(model: nn.Module, freeze: FreezeConfig) -> None:
    """Freeze the parts that `freeze` names and train the others; the encoder's fixed positions stay fixed."""
    family = unwrap(model).family
    for name, parameter in model.named_parameters():
        fixed = name.endswith(family.fixed)
        quantised = not parameter.is_floating_point()
        parameter.requires_grad_(not fixed and not quantised and not getattr(freeze, part_of(name, family)))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    learning_rates: Mapping[str, float],
    *,
    weight_decay: float = 0.0,
    encoder_layer_decay: float = 1.0,
    loraplus_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimiser groups that hold every trainable parameter exactly once.

    Biases and norm weights (fewer than two dimensions) are not decayed. In the encoder the top layer and the norm above
    it have the tower's rate, every layer below `encoder_layer_decay` times that of the one above it, and the
    stem (its convolutions) is one layer below the first.

    Args:
        loraplus_lr_ratio: factor on the rate of the adapters' B matrices.
        learning_rate: rate of parts that `learning_rates` (part to rate) does not name.

    Returns:
        Dicts with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: `learning_rates` names an unknown part, or one without a trainable parameter.
    """
    family = unwrap(model).family
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    idle = set(learning_rates) - {part_of(name, family) for name, _ in trainable}
    if idle:
        raise ConfigError(
            f"optimizer.learning_rates: {', '.join(sorted(idle))} has no trainable parameter; "
            f"known parts are {', '.join(PARTS)}, and a frozen one takes no rate"
        )
    layers = unwrap(model).model.num_encoder_layers
    groups: dict[tuple[str, int, bool, bool], dict[str, Any]] = {}
    for name, parameter in trainable:
        part = part_of(name, family)
        below_top = _layers_below_top(name, layers, family) if part == "audio_tower" else 0
        # ZeRO-3 leaves an empty tensor behind and keeps the true shape beside it.
        decayed = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        faster = loraplus_lr_ratio != 1.0 and ".lora_B." in name
        group = groups.setdefault(
            (part, below_top, decayed, faster),
            {
                "name": f"{part}.{'decay' if decayed else 'no_decay'}.{below_top}{'.lora_B' if faster else ''}",
                "params": [],
                "lr": learning_rates.get(part, learning_rate)
                * encoder_layer_decay**below_top
                * (loraplus_lr_ratio if faster else 1.0),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layers_below_top(name: str, layers: int, family: Family) -> int:
    """How many layers an encoder parameter lies below the top one; `layers` for what lies below the first."""
    if match := re.search(family.encoder_layer, name):
        return layers - 1 - int(match[1])
    return layers if re.search(family.encoder_stem, name) else 0
