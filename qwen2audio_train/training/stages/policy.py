"""The model of a stage: built or loaded, frozen in part, with its adapter; and a checkpoint's model for inference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import (
    AdapterKind,
    ConfigError,
    Dtype,
    ModelConfig,
    ModelKind,
    StageConfig,
)
from qwen2audio_train.data.samples.recipe import FILE, overridden, plain, saved_recipe
from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter, check_same_adapter, load_adapter, merge_adapter
from qwen2audio_train.model.build import MODELS, build_model
from qwen2audio_train.model.encoder_cache import encoder_cache_of
from qwen2audio_train.model.freeze import set_trainable
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints.bases import base_of, check_weights, start_of
from qwen2audio_train.training.checkpoints.restore import kept_whole
from qwen2audio_train.training.stages.process import process, warnings_only


def build_policy(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of a stage with its frozen parts, adapter and activation checkpointing: build -> freeze -> adapter.

    Weights that lie in an adapter are merged into their base, unless this stage trains an adapter too and goes on
    with that one.
    """
    start = start_of(config)
    base = base_of(start, check=process().is_main_process) if start else None
    random_weights = base is None and config.model.kind is not ModelKind.released
    with kept_whole() if random_weights else nullcontext():
        quantize = config.adapter.kind is AdapterKind.qlora
        model = build_model(_resolved(config.model), base, tokenizer=tokenizer, quantize=quantize)
    set_trainable(model, config.model.freeze)
    adapted: Any
    if start is not None and base != start:
        trains_adapter = config.adapter.kind is not AdapterKind.none
        if trains_adapter:
            check_same_adapter(config.adapter, start, model.family)
        adapted = load_adapter(model, start, trainable=trains_adapter, dropout=config.adapter.dropout)
        if not trains_adapter:
            adapted = merge_adapter(adapted)
            set_trainable(adapted, config.model.freeze)
    else:
        adapted = apply_adapter(model, config.adapter, autocast_adapter_dtype=config.deepspeed.stage != 3)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigError("model.freeze: every part is frozen and there is no adapter, so there is nothing to train")
    set_activation_checkpointing(
        adapted, config.model.activation_checkpointing, config.model.activation_checkpointing_policy
    )
    inner = unwrap(adapted).model
    inner.encoder_cache = encoder_cache_of(config, inner.audio_tower, inner.family, process().num_processes)
    if config.model.compile:
        compile_blocks(adapted)
    return adapted


class Loaded(NamedTuple):
    """A checkpoint for inference, on this rank's device.

    Attributes:
        samples: how examples become the model's samples.
        caveats: where these may not be made as in its training.
        base: what an unmerged adapter lies on.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    samples: SampleRecipe
    caveats: tuple[str, ...] = ()
    base: str | None = None


def load_for_inference(
    checkpoint: str,
    *,
    samples: Mapping[str, Any] | None = None,
    num_threads: int = 0,
    dtype: Dtype | None = None,
    merge: bool = True,
) -> Loaded:
    """Model and tokenizer of a checkpoint, with the recipe of the samples that it was trained on.

    Args:
        samples: fields of that recipe to replace.
        dtype: of the weights; None leaves them as they were saved.

    Raises:
        ConfigError: the checkpoint is not there, or `samples` names what no recipe has.
    """
    warnings_only()
    if num_threads:
        torch.set_num_threads(num_threads)
    folder = folders.weights_folder(checkpoint)
    if process().is_main_process:
        check_weights(folder)
    base = base_of(folder, check=process().is_main_process)
    saved = saved_recipe(folder)
    recipe = overridden(saved or SampleRecipe(), samples or {})
    family = family_of(AutoConfig.from_pretrained(base).model_type)
    loaded: Any = MODELS[family.name]
    model: Any = loaded.from_pretrained(base, dtype=dtype.value if dtype else "auto")
    if base != folder:
        model = load_adapter(model, folder, trainable=False)
        if merge:
            model = merge_adapter(model)
    unmerged = base if base != folder and not merge else None
    audio_config: Any = unwrap(model).config.audio_config
    recipe = replace(recipe, num_mel_bins=audio_config.num_mel_bins, family=family.name)
    caveats = differences(folder, saved, recipe, samples or {})
    return Loaded(model.to(process().device).eval(), AutoTokenizer.from_pretrained(folder), recipe, caveats, unmerged)


def differences(
    folder: str, saved: SampleRecipe | None, recipe: SampleRecipe, given: Mapping[str, Any]
) -> tuple[str, ...]:
    """Where samples may not be made as they were in training, in words."""
    used = plain(recipe)
    if saved is None:
        listed = ", ".join(f"{key}={value}" for key, value in used.items())
        return (f"{folder} has no {FILE}, so samples are made with {listed}",)
    trained = plain(saved)
    return tuple(
        f"sample.{key}={used[key]}, where the checkpoint was trained with {trained[key]}"
        for key in given
        if used[key] != trained[key]
    )


def _resolved(model: ModelConfig) -> ModelConfig:
    """The same config with every run folder replaced by the weights of its newest complete checkpoint."""
    keys = ("path",) if model.kind is ModelKind.released else ("audio_encoder", "language_model")
    found: dict[str, Any] = {key: folders.weights_folder(path) for key in keys if (path := getattr(model, key))}
    return replace(model, **found)


def compile_blocks(model: Any) -> None:
    """Compile every encoder and decoder layer in place; equal layers share their code."""
    blocks = unwrap(model).family.blocks
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=True)
