"""Saved tensors back into a model, none missing and none of another shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qwen2audio_train.training.checkpoints.folder import CheckpointError


def load_saved_state(model: Any, state: dict[str, Tensor]) -> None:
    """Load tensors saved under the published names into a model whose modules are named as transformers 5 does.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    own = model.state_dict()
    renamed = {published_to_module(name, own): tensor for name, tensor in state.items()}
    check_fit(renamed, own)
    model.load_state_dict(renamed)


def check_fit(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Compare names and shapes of saved tensors with those of the model.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    lost, more = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if lost or more:
        raise CheckpointError(f"saved weights do not fit the model: missing {lost[:3]}, left over {more[:3]}")
    for name, tensor in own.items():
        found, expected = tuple(saved[name].shape), tuple(tensor.shape)
        if found != expected:
            raise CheckpointError(f"saved weights do not fit the model: {name} is {found}, expected {expected}")


def published_to_module(name: str, own: dict[str, Tensor]) -> str:
    """Module name of a published one (`language_model.model.x` -> `model.language_model.x`)."""
    if name in own:
        return name
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name
