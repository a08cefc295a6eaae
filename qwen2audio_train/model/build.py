"""From a recipe's `model` part to a model: released weights, assembled from two parts, or tiny and random."""

from __future__ import annotations

import copy
import dataclasses
from importlib.util import find_spec
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.parts import PARTS
from qwen2audio_train.config.schema import ConfigError, ModelConfig, ModelKind
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.model.assemble import assemble
from qwen2audio_train.model.freeze import part_of
from qwen2audio_train.model.packed import PackedAudioLM, unwrap
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.model.qwen3_asr import PackedQwen3ASR

MODELS: dict[str, type[PackedAudioLM]] = {model.family.name: model for model in (PackedQwen2Audio, PackedQwen3ASR)}
"""The classes of the families."""


def build_model(
    cfg: ModelConfig,
    init_from: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: bool = False,
) -> PackedAudioLM:
    """Build the model on the CPU, all of it trainable except for the encoder's positions.

    Random weights (tiny models, the projector of an assembled one) come from torch's global generator: seed it first.

    Args:
        cfg: the recipe's `model`; `cfg.dtype` is the type of the weights.
        init_from: hub id or folder of weights that replace those that `cfg.kind` would start from.
        tokenizer: sizes the vocabulary and names the audio token of a tiny or an assembled model; the audio token of
            loaded weights has to be its.
        quantize: hold the language model's weights in 4 bits (needs bitsandbytes and a GPU), for QLoRA.

    Raises:
        ConfigError: a key that this kind of model needs is missing, weights are missing, or parts do not fit.
    """
    dtype = getattr(torch, cfg.dtype.value)
    if init_from is not None or cfg.kind is ModelKind.released:
        model = _load(_needed(cfg, "path", init_from), cfg.family, dtype, quantize)
    elif quantize:
        raise ConfigError("adapter.kind: qlora quantises saved weights; save the model first and set init_from to it")
    elif cfg.kind is ModelKind.assembled:
        if cfg.family != PackedQwen2Audio.family.name:
            raise ConfigError(f"model.kind=assembled: makes models of {PackedQwen2Audio.family.name}, not {cfg.family}")
        encoder, language_model = _needed(cfg, "audio_encoder"), _needed(cfg, "language_model")
        model = assemble(encoder, language_model, _needed(cfg, "tokenizer", tokenizer), dtype)
    else:
        model = MODELS[cfg.family](architecture_config(cfg, tokenizer)).to(dtype)
        model.set_fixed_weights()
        if cfg.audio_encoder is not None:
            trained = _load(cfg.audio_encoder, cfg.family, dtype, quantize=False).model.audio_tower
            model.model.audio_tower.load_state_dict(trained.state_dict())
    _check(model, tokenizer)
    return model


def _load(path: str, family: str, dtype: torch.dtype, quantize: bool) -> PackedAudioLM:
    """Saved weights, all of them."""
    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type != family:
        raise ConfigError(f"{path} holds a model of type {model_type}, expected {family} (model.family)")
    if quantize and find_spec("bitsandbytes") is None:
        raise ConfigError('adapter.kind=qlora: needs the package bitsandbytes: pip install ".[qlora]"')
    options = {"quantization_config": quantization_config(dtype, family_of(family))} if quantize else {}
    load: Any = MODELS[family].from_pretrained
    model, report = load(path, dtype=dtype, output_loading_info=True, **options)
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        raise ConfigError(f"{path}: {len(lost)} weights are missing or of another shape, the first is {lost[0]}")
    return cast(PackedAudioLM, model)


def quantization_config(dtype: torch.dtype, family: Family) -> BitsAndBytesConfig:
    """Four-bit weights for the language model alone; encoder, projector and head stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[family.parts[part] for part in ("audio_tower", "multi_modal_projector", "lm_head")],
    )


def build_meta_model(cfg: ModelConfig) -> PackedAudioLM:
    """The model that `cfg.architecture` describes without memory behind it: shapes and parameter counts only."""
    with torch.device("meta"):
        return MODELS[cfg.family](architecture_config(cfg, None))


def _needed(cfg: ModelConfig, name: str, given: Any = None) -> Any:
    """`given`, else the field `name` of the recipe's `model`."""
    value = given if given is not None else getattr(cfg, name, None)
    if value is None:
        raise ConfigError(
            f"model.{name}: not given, and a model of kind {cfg.kind.value} needs it; set model.{name}=..."
        )
    return value


def architecture_config(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """Config from the numbers in `cfg.architecture`; the vocabulary is the tokenizer's, if there is one.

    Raises:
        ConfigError: an unknown key, a number of the wrong type, or widths that the heads do not divide.
    """
    family, numbers = family_of(cfg.family), copy.deepcopy(cfg.architecture)
    known = [*family.sub_configs, family.audio_token_key]
    unknown = set(numbers) - set(known)
    if unknown:
        raise ConfigError(f"model.architecture: unknown {sorted(unknown)}; known are {', '.join(known)}")
    audio, text = numbers.get("audio_config", {}), numbers.get("text_config", {})
    for part, model_type in family.sub_configs.items():
        _check_keys(f"model.architecture.{part}", numbers.get(part, {}), model_type)
    audio.setdefault("num_mel_bins", cfg.num_mel_bins)
    if cfg.kind is ModelKind.tiny:
        text.setdefault("vocab_size", cfg.vocab_size)
    if tokenizer is not None:
        text |= {"vocab_size": len(tokenizer), **special_ids(tokenizer, family)}
        numbers[family.audio_token_key] = tokenizer.convert_tokens_to_ids(family.audio_token)
    try:
        config_class: Any = MODELS[cfg.family].config_class
        config: PreTrainedConfig = config_class(**{**numbers, "audio_config": audio, "text_config": text})
    except StrictDataclassError as error:
        raise ConfigError(f"model.architecture: {str(error).splitlines()[-1].strip()}") from error
    for part, whole, share in (
        ("audio_config", "d_model", "encoder_attention_heads"),
        ("text_config", "num_attention_heads", "num_key_value_heads"),
        *((("text_config", "hidden_size", "num_attention_heads"),) if "head_dim" not in text else ()),
    ):
        size, divisor = getattr(getattr(config, part), whole), getattr(getattr(config, part), share)
        if size % divisor:
            raise ConfigError(f"model.architecture.{part}: {whole} {size} is no multiple of {share} {divisor}")
    return config


def _check_keys(path: str, given: dict[str, Any], model_type: str) -> None:
    """Refuse what transformers would take for an attribute of its own and never look at."""
    model_type = given.get("model_type", model_type)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{path}.model_type: {model_type!r} is unknown to transformers")
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])} | {"model_type", "rope_theta"}
    for key in given.keys() - known:
        raise ConfigError(f"{path}.{key}: unknown key; {nearest(key, known, f'{path}.')}")


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, family: Family = DEFAULT) -> PreTrainedTokenizerBase:
    """`tokenizer` with the family's special tokens that it lacks added after its vocabulary."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special_tokens)})
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase, family: Family) -> dict[str, int]:
    """The ids that a text config names."""
    text_end, turn_end = (cast(int, tokenizer.convert_tokens_to_ids(t)) for t in (family.text_end, family.turn_end))
    return {"pad_token_id": text_end, "bos_token_id": text_end, "eos_token_id": turn_end}


def _check(model: PackedAudioLM, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse what packed attention cannot do, and a tokenizer of another model."""
    family, config = model.family, model.config
    for name in family.sub_configs:
        part = getattr(config, name)
        if part.attention_dropout:
            raise ConfigError(f"{name}.attention_dropout is {part.attention_dropout}, packed attention needs 0")
        if "sliding_attention" in (getattr(part, "layer_types", None) or ()):
            raise ConfigError(f"{name} has sliding-window layers, packed attention needs use_sliding_window: false")
    if tokenizer is None:
        return
    audio_token, expected = tokenizer.convert_tokens_to_ids(family.audio_token), getattr(config, family.audio_token_key)
    if audio_token != expected:
        raise ConfigError(
            f"{family.audio_token} is token {audio_token} of the tokenizer and {expected} of the model; "
            "load both from the same folder"
        )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part."""
    counts, family = dict.fromkeys(PARTS, 0), unwrap(model).family
    for name, parameter in model.named_parameters():
        counts[part_of(name, family)] += parameter.numel()
    return counts
