"""Low-rank adapters on chosen parts of the model. The only file that knows PEFT."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from qwen2audio_train.config.parts import PARTS
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, ConfigError, InitLora
from qwen2audio_train.families.family import Family
from qwen2audio_train.model.freeze import part_of
from qwen2audio_train.model.packed import PackedAudioLM


def apply_adapter(
    model: PackedAudioLM, cfg: AdapterConfig, *, autocast_adapter_dtype: bool = True
) -> PackedAudioLM | PeftModel:
    """Freeze `model` and put new adapters on the parts in `cfg.modules`; without an adapter, `model` as it is.

    Args:
        autocast_adapter_dtype: keep the adapter's weights in float32 in a bfloat16 model; ZeRO-3 needs False.

    Raises:
        ConfigError: an unknown part.
    """
    if cfg.kind is AdapterKind.none:
        return model
    if cfg.kind is AdapterKind.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if model.device.type == "meta":  # a plan: the shapes are the same, and there are no weights to take apart
        cfg = replace(cfg, init_lora_weights=InitLora.default)
    return get_peft_model(model, lora_config(cfg, model.family), autocast_adapter_dtype=autocast_adapter_dtype)


def lora_config(cfg: AdapterConfig, family: Family) -> LoraConfig:
    """PEFT's config of a recipe's `adapter`.

    The linear layers are named by a pattern that has to match a module's whole name: PEFT's lists of endings such as
    `q_proj` would hit the audio tower and the language model alike.
    """
    targets = family.adapter_targets
    for key, parts, known in (("modules", cfg.modules, targets), ("modules_to_save", cfg.modules_to_save, PARTS)):
        unknown = sorted(set(parts) - set(known))
        if unknown:
            raise ConfigError(f"adapter.{key}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    if not cfg.modules:
        raise ConfigError(f"adapter.modules: empty, expected some of {', '.join(targets)}")
    return LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        init_lora_weights="pissa" if cfg.init_lora_weights is InitLora.pissa else True,
        use_dora=cfg.use_dora,
        use_rslora=cfg.use_rslora,
        target_modules="|".join(targets[part] for part in cfg.modules),
        modules_to_save=list(cfg.modules_to_save) or None,
    )


def check_same_adapter(cfg: AdapterConfig, folder: str, family: Family) -> None:
    """Compare a recipe's `adapter` with the saved one that is to be trained on.

    Raises:
        ConfigError: naming the first key that differs.
    """
    saved: Any = LoraConfig.from_pretrained(folder)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if part_of(name, family)]  # noqa: SIM118
    there = {
        "r": saved.r,
        "alpha": saved.lora_alpha,
        "init_lora_weights": InitLora.pissa if saved.init_lora_weights == "pissa" else InitLora.default,
        "use_dora": saved.use_dora,
        "use_rslora": saved.use_rslora,
        "modules": sorted({part_of(name, family) for name in names if ".lora_" in name}),
        "modules_to_save": sorted({part_of(name, family) for name in names if ".lora_" not in name}),
    }
    for key, found in there.items():
        given = getattr(cfg, key)
        expected = sorted(given) if isinstance(given, list) else given
        if found != expected:
            shown = str(found).replace("'", "").replace(" ", "")
            raise ConfigError(
                f"adapter.{key}={expected}, and the adapter in {folder} has {key}={shown}: set adapter.{key}={shown} "
                "to train it on, or merge it first (launch/export.py) to start a new one"
            )


def load_adapter(model: PackedAudioLM, folder: str, *, trainable: bool, dropout: float | None = None) -> PeftModel:
    """`model` with the adapter that is saved in `folder`, and its dropout unless another is given."""
    config: Any = LoraConfig.from_pretrained(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)


def adapter_names(model: PeftModel) -> dict[str, str]:
    """Name that each tensor of the adapter is saved with -> name of the parameter that holds it.

    PEFT renames what it is given; numbers in place of the tensors come out under the new names.
    """
    names = [name for name, _ in model.named_parameters()]
    numbers = {name: torch.full((1, 1), i) for i, name in enumerate(names)}
    return {saved: names[int(number)] for saved, number in get_peft_model_state_dict(model, numbers).items()}


def merge_adapter(model: PeftModel) -> PackedAudioLM:
    """The model with the adapter's weights added to its own.

    Raises:
        ValueError: the merged weights are not finite.
    """
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PackedAudioLM)
    return merged


def merge_outside_language_model(model: PeftModel) -> bool:
    """Add the adapter's weights on the audio tower and the projector to the base's, and leave the rest an adapter.

    Servers adapt the language model alone (vLLM refuses an adapter on the others). Returns whether there were any.
    """
    inner: Any = model.get_base_model()
    pattern = re.compile(inner.family.adapter_targets["language_model"])
    others = [
        (name, layer)
        for name, layer in inner.named_modules()
        if isinstance(layer, BaseTunerLayer) and not pattern.fullmatch(name)
    ]
    for name, layer in others:
        layer.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(inner.get_submodule(parent), last, layer.get_base_layer())
    config: Any = model.peft_config[model.active_adapter]
    config.target_modules = pattern.pattern
    return bool(others)


def without_adapter(model: PeftModel) -> PackedAudioLM:
    """The base as it is, what was merged into it included; `model` is of no use afterwards."""
    base = model.unload()
    assert isinstance(base, PackedAudioLM)
    return base


def adapter_has_learnt(folder: str | Path) -> bool:
    """Whether any B of the adapter saved in `folder` is not zero: it starts so, and its product with A is added."""
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if "lora_B" in name]  # noqa: SIM118
        return any(bool(file.get_tensor(name).any()) for name in names)
