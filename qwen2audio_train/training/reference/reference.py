"""Where the reference of preference optimisation comes from, and whether that goes together with the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from qwen2audio_train.config.preference import Reference
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints.restore import whole
from qwen2audio_train.training.reference.cache import ReferenceCache, ReferenceCacheError, weights_digest

POLICY_ADAPTER = "default"
REFERENCE_ADAPTER = "ref"
"""Name that TRL gives to the frozen copy of the policy's adapter."""

CACHE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative difference up to which a stored and a recomputed log-probability count as equal."""


def resolve_reference(
    reference: Reference, model: nn.Module, ref_model: nn.Module | None, cache: ReferenceCache | None
) -> Reference:
    """The reference that is meant, checked against what there is.

    Raises:
        ConfigError: naming what is missing or too much.
    """
    adapted = is_peft_model(model)
    if reference is Reference.auto:
        reference = Reference.adapter if adapted and ref_model is None else Reference.frozen
    if (reference is Reference.frozen) != (ref_model is not None):
        raise ConfigError(
            f"reference={reference.value}, and ref_model is {'missing' if ref_model is None else 'given'}: give a "
            "frozen copy of the policy as ref_model with reference=frozen, and only then"
        )
    if reference is Reference.cached and cache is None:
        raise ConfigError("reference=cached, and no cache is given: give a ReferenceCache")
    if reference is Reference.adapter and not adapted:
        raise ConfigError("reference=adapter, and the policy has no adapter: use adapter.kind=lora or reference=frozen")
    others = trained_outside_adapter(model) if adapted else []
    if reference is Reference.adapter and others:
        raise ConfigError(
            f"reference=adapter, but {len(others)} tensors outside the adapter are trained too ({others[0]}, ...): the "
            "policy without its adapter would drift; use reference=frozen, or freeze them"
        )
    return reference


def trained_outside_adapter(model: nn.Module) -> list[str]:
    """Trainable parameters of a PEFT model that are not its adapter's."""
    named = model.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad and f".{POLICY_ADAPTER}" not in name]


def is_fresh(model: nn.Module) -> bool:
    """Whether the adapter of a PEFT model changes nothing yet: every second factor is zero.

    Under ZeRO-3 every rank has to call this.
    """
    seconds = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    with whole(seconds):
        return bool(seconds) and not any(bool(p.detach().any()) for p in seconds)


@contextmanager
def adapter_left_as_it_is(model: Any) -> Iterator[None]:
    """Undo what TRL's constructor does to a PEFT policy more than we need.

    It copies the adapter; the copy goes if the adapter is fresh, since the policy without it is the same reference.
    Adding a copy also freezes whatever else was trained.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fresh = is_fresh(model)
    yield
    if is_peft_model(model):
        if fresh and REFERENCE_ADAPTER in model.peft_config:
            model.delete_adapter(REFERENCE_ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def check_stored(stored: Tensor, recomputed: Tensor, real: Tensor, dtype: torch.dtype, cache: ReferenceCache) -> None:
    """Compare stored with recomputed log-probabilities (B, 2) of the pairs that are `real` (B,).

    Raises:
        ReferenceCacheError: the store was made from other weights or other audio.
    """
    gaps = ((recomputed - stored).abs() / stored.abs().clamp(min=1.0))[real]
    if len(gaps) and float(gaps.max()) > CACHE_TOLERANCE[dtype]:
        raise ReferenceCacheError(
            f"{cache.folder} holds other log-probabilities than the reference gives now (relative difference "
            f"{float(gaps.max()):.2g}): the audio, its augmentation or the weights changed; use another folder"
        )


def reference_digest(model: nn.Module) -> str:
    """SHA-256 of the weights of a reference: a policy before its first step.

    Names are those of the bare model, so that it does not matter whether a fresh adapter, which changes nothing, was
    put around it; an adapter that is trained on counts. Under ZeRO-3 every rank has to call this.
    """
    return weights_digest(_parameters(model, without_adapter=is_fresh(model)), lambda parameter: whole([parameter]))


def _parameters(model: nn.Module, *, without_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not (without_adapter and f".{POLICY_ADAPTER}" in name) and f".{REFERENCE_ADAPTER}." not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), parameter
