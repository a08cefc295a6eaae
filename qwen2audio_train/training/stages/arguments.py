"""From a recipe to `transformers.TrainingArguments` or `trl.DPOConfig`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig

from qwen2audio_train.config.combinations import OWN_OPTIMIZERS
from qwen2audio_train.config.preference import Objective, PreferenceConfig
from qwen2audio_train.config.schema import CheckpointingPolicy, ConfigError, DeepSpeedConfig, Stage, StageConfig
from qwen2audio_train.model.encoder_cache import check_encoder_cache
from qwen2audio_train.training.stages.argument_rules import DEFAULT_MAX_STEPS, DEFAULT_SCHEDULE
from qwen2audio_train.training.stages.argument_table import check_trainer_keys

OWNED_DEEPSPEED = {
    "train_batch_size": "data.packs_per_step",
    "train_micro_batch_size_per_gpu": "data.packs_per_forward",
    "gradient_accumulation_steps": "data.packs_per_step",
    "gradient_clipping": "trainer.max_grad_norm",
    "bf16": "trainer.bf16",
    "fp16": "trainer.bf16",
    "optimizer": "trainer.optim",
    "scheduler": "trainer.lr_scheduler_type",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_parameters",
}
"""Keys of DeepSpeed's own JSON, below `deepspeed.extra`, that follow from another key of the recipe."""

FLOAT32_SUM_FORWARDS = 16
"""Forwards of a step from which DeepSpeed sums the gradients of bfloat16 training in float32. Summed in bfloat16 they
are 0.6 % off after 16, and 1.8 % after 256."""


def world_size() -> int:
    """Number of ranks that torchrun started (1 under plain python)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def forwards_per_step(config: StageConfig, ranks: int | None = None) -> int:
    """Forwards of each rank in one optimiser step: ceil(packs_per_step / ranks / packs_per_forward)."""
    per_rank = -(-config.data.packs_per_step // (ranks or world_size()))
    return -(-per_rank // config.data.packs_per_forward)


def sums_in_float32(config: StageConfig, ranks: int | None = None) -> bool:
    """Whether DeepSpeed sums the gradients of a step's forwards in float32, rather than in bfloat16."""
    if not config.trainer.get("bf16", False):
        return True
    given = config.deepspeed.extra.get("data_types", {}).get("grad_accum_dtype")
    return given == "fp32" or (given is None and forwards_per_step(config, ranks) >= FLOAT32_SUM_FORWARDS)


def arguments_class(config: StageConfig) -> type[TrainingArguments]:
    """The class that the keys below `trainer` belong to."""
    if config.stage is not Stage.dpo:
        return TrainingArguments
    return KTOConfig if config.preference.objective is Objective.kto else DPOConfig


def training_arguments(config: StageConfig) -> TrainingArguments:
    """Build the arguments of a stage.

    Raises:
        ConfigError: for a key below `trainer` that the class does not have, that the recipe decides elsewhere, or
            whose value has the wrong type or is out of its bounds.
    """
    kind = arguments_class(config)
    check_arguments(config, kind)
    values = argument_values(config, kind)
    optim = values.get("optim")
    if optim in OWN_OPTIMIZERS:  # Trainer's class knows its own names alone
        del values["optim"]
    try:
        arguments = kind(**values)
    except ValueError as error:
        raise ConfigError(f"trainer: {error}") from error
    if optim in OWN_OPTIMIZERS:
        arguments.optim = optim
    return arguments


def check_arguments(config: StageConfig, kind: type[TrainingArguments]) -> None:
    """Raises ConfigError for what the recipe cannot ask of a trainer."""
    if config.deepspeed.stage is not None and "RANK" not in os.environ:
        raise ConfigError(f"deepspeed.stage={config.deepspeed.stage}: start it with torchrun, also for a single rank")
    check_patience(config)
    check_encoder_cache(config)
    check_compiled_activations(config)
    check_trainer_keys(config.trainer, kind)
    for key in ("eval_strategy", "eval_on_start"):
        if config.trainer.get(key, "no") not in ("no", False) and not (
            config.data.eval_sources or config.decoded.manifests
        ):
            raise ConfigError(
                f"trainer.{key}={config.trainer[key]}: there are no data.eval_sources and no decoded.manifests"
            )


def argument_values(config: StageConfig, kind: type[TrainingArguments]) -> dict[str, Any]:
    """What the class is called with: our defaults, the recipe's keys, and what packed batches leave no choice about."""
    values: dict[str, Any] = {
        "max_steps": DEFAULT_MAX_STEPS,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 2,
        "lr_scheduler_type": DEFAULT_SCHEDULE,
        "bf16": False,  # TRL's own default is true, also where there is no device for it
        **config.trainer,
        "output_dir": config.run_dir,
        "run_name": config.name,
        "seed": config.seed,
        "report_to": [],
        "use_cpu": config.trainer.get("use_cpu", not torch.cuda.is_available()),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": forwards_per_step(config),
        "remove_unused_columns": False,
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
        "deepspeed": deepspeed_config(config) if config.deepspeed.stage is not None else None,
        "activation_checkpointing": False,
    }
    if config.stage is Stage.dpo:
        values |= {"max_length": None, "gradient_checkpointing": False}
    if kind is KTOConfig:  # which checks that TRL's own loader would give it foreign answers
        values |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    names = {field.name for field in dataclasses.fields(kind)}
    if "activation_checkpointing" not in names:
        values["gradient_checkpointing"] = values.pop("activation_checkpointing")
    return values


def check_patience(config: StageConfig) -> None:
    """Patience counts evaluations. Raises ConfigError where there are none, or for a watch without it."""
    chosen, evaluates = config.preference, config.trainer.get("eval_strategy", "no") != "no"
    if chosen.patience and not evaluates:
        raise ConfigError(f"preference.patience={chosen.patience}: counts evaluations; set trainer.eval_strategy=steps")
    if chosen.watch != PreferenceConfig().watch and not chosen.patience:
        raise ConfigError(f"preference.watch={chosen.watch}: does nothing without preference.patience")


def check_compiled_activations(config: StageConfig) -> None:
    """A compiled block decides itself what it keeps for backward. Raises ConfigError."""
    selective = config.model.activation_checkpointing_policy is CheckpointingPolicy.selective
    if config.model.compile and selective and config.model.activation_checkpointing:
        raise ConfigError(
            "model.activation_checkpointing_policy=selective with model.compile=true: a compiled block decides itself "
            "what it keeps; take one of the two"
        )


def deepspeed_config(config: StageConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a recipe. Optimizer and schedule stay torch's, so that all ZeRO stages step alike.

    Raises:
        ConfigError: `deepspeed.extra` sets what another key of the recipe decides.
    """
    chosen: DeepSpeedConfig = config.deepspeed
    zero: dict[str, Any] = {"stage": chosen.stage, "contiguous_gradients": True}
    if chosen.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if chosen.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if chosen.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    mixed = bool(config.trainer.get("bf16", False))
    extra = dict(chosen.extra)
    inner, types = extra.pop("zero_optimization", {}), extra.pop("data_types", {})
    for key in [*extra, *(f"zero_optimization.{name}" for name in inner)]:
        if key in OWNED_DEEPSPEED:
            raise ConfigError(
                f"deepspeed.extra.{key}: decided elsewhere in the recipe; set {OWNED_DEEPSPEED[key]} instead"
            )
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": mixed},
        "data_types": {**({"grad_accum_dtype": "fp32"} if mixed and sums_in_float32(config) else {}), **types},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | inner,
        **extra,
    }
