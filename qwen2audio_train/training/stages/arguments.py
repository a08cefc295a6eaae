"""From a recipe to `transformers.TrainingArguments` or `trl.DPOConfig`."""

from __future__ import annotations

import dataclasses
import os
import types
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig

from qwen2audio_train.config.bounds import nearest, no_choice, too_small
from qwen2audio_train.config.combinations import ADAMW_BF16
from qwen2audio_train.config.schema import (
    CheckpointingPolicy,
    ConfigError,
    DeepSpeedConfig,
    Objective,
    Stage,
    StageConfig,
)
from qwen2audio_train.model.encoder_cache import check_encoder_cache

OWNED = {
    "output_dir": "run_dir",
    "run_name": "name",
    "project": "tracker.project",
    "report_to": "tracker",
    "seed": "seed",
    "data_seed": "data.seed",
    "deepspeed": "deepspeed",
    "per_device_train_batch_size": "data.packs_per_forward",
    "per_device_eval_batch_size": "data.packs_per_forward",
    "gradient_accumulation_steps": "data.packs_per_step",
    "dataloader_num_workers": "data.num_workers",
    "dataloader_prefetch_factor": "data.prefetch_factor",
    "num_train_epochs": "trainer.max_steps",
    "resume_from_checkpoint": "resume",
    "remove_unused_columns": "nothing: batches are packed",
    "max_length": "data.max_tokens_per_example",
    "precompute_ref_log_probs": "preference.reference=cached",
    "gradient_checkpointing": "model.activation_checkpointing",
    "activation_checkpointing": "model.activation_checkpointing",
    "torch_compile": "model.compile",
}
"""Arguments that follow from another key of the recipe; setting both would give one thing two names."""

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
"""The same for keys of DeepSpeed's own JSON, below `deepspeed.extra`."""

WITHOUT_EFFECT = frozenset(
    """
    accelerator_config activation_checkpointing_kwargs auto_find_batch_size average_tokens_across_devices
    batch_eval_metrics bf16_full_eval dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_persistent_workers dataloader_pin_memory dataset_num_proc ddp_find_unused_parameters disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
    fp16 fp16_full_eval fsdp fsdp_config gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
    label_smoothing_factor length_column_name load_best_model_at_end local_rank model_init_kwargs pad_to_multiple_of
    padding_free parallelism_config precompute_ref_batch_size prediction_loss_only push_to_hub save_on_each_node
    save_only_model torch_compile_backend torch_compile_mode train_sampling_strategy truncation_mode use_cache
    """.split()  # noqa: SIM905 (a name a line would fill the screen)
)
"""Arguments that packed batches, their loader or sealed checkpoints leave nothing to do for."""

LEAST = {
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "max_steps": 1,
    "save_total_limit": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
}


def world_size() -> int:
    """Number of ranks that torchrun started (1 under plain python)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def forwards_per_step(config: StageConfig, ranks: int | None = None) -> int:
    """Forwards of each rank in one optimiser step: ceil(packs_per_step / ranks / packs_per_forward)."""
    per_rank = -(-config.data.packs_per_step // (ranks or world_size()))
    return -(-per_rank // config.data.packs_per_forward)


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
    if config.deepspeed.stage is not None and "RANK" not in os.environ:
        raise ConfigError(f"deepspeed.stage={config.deepspeed.stage}: start it with torchrun, also for a single rank")
    if config.trainer.get("eval_strategy", "no") != "no" and not config.data.eval_sources:
        raise ConfigError(f"trainer.eval_strategy={config.trainer['eval_strategy']}: there are no data.eval_sources")
    check_encoder_cache(config)
    check_deepspeed_precision(config)
    check_compiled_activations(config)
    kind = arguments_class(config)
    check_trainer_keys(config.trainer, kind)
    values: dict[str, Any] = {
        "max_steps": 1000,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 2,
        "lr_scheduler_type": "cosine",
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
    optim = values.get("optim")
    if optim in ADAMW_BF16:  # ours: Trainer's class knows its own names alone
        del values["optim"]
    try:
        arguments = kind(**values)
    except ValueError as error:
        raise ConfigError(f"trainer: {error}") from error
    if optim in ADAMW_BF16:
        arguments.optim = optim
    return arguments


def check_compiled_activations(config: StageConfig) -> None:
    """A compiled block decides itself what it keeps for backward. Raises ConfigError."""
    selective = config.model.activation_checkpointing_policy is CheckpointingPolicy.selective
    if config.model.compile and selective and config.model.activation_checkpointing:
        raise ConfigError(
            "model.activation_checkpointing_policy=selective with model.compile=true: a compiled block decides itself "
            "what it keeps; take one of the two"
        )


def check_deepspeed_precision(config: StageConfig) -> None:
    """DeepSpeed trains bfloat16 weights, and keeps float32 copies of them, only when its own config says so."""
    if config.deepspeed.stage is not None and config.model.dtype.value == "bfloat16" and not config.trainer.get("bf16"):
        raise ConfigError("model.dtype=bfloat16 under DeepSpeed: set trainer.bf16=true")


def check_trainer_keys(given: dict[str, Any], kind: type[TrainingArguments]) -> None:
    """Refuse keys that `kind` does not have, or that have another home or no effect, and wrong values."""
    hints = get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for key, value in given.items():
        if key in OWNED:
            raise ConfigError(f"trainer.{key}: decided elsewhere in the recipe; set {OWNED[key]} instead")
        if key not in known:
            hint = nearest(key, known - set(OWNED) - WITHOUT_EFFECT, "trainer.")
            raise ConfigError(f"trainer.{key}: {kind.__name__} has no such argument; {hint}")
        if key in WITHOUT_EFFECT:
            raise ConfigError(f"trainer.{key}: has no effect on how this project trains; leave it out")
        if key == "optim" and value in ADAMW_BF16:
            continue
        choices = _choices(hints[key])
        if choices and value not in choices:
            raise ConfigError(no_choice(f"trainer.{key}", value, choices))
        if not _matches(value, hints[key]):
            raise ConfigError(f"trainer.{key}: {value!r} is a {type(value).__name__}, expected {_readable(hints[key])}")
        for reason in too_small(f"trainer.{key}", value, LEAST.get(key)):
            raise ConfigError(reason)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits a type hint; hints that YAML cannot express are left to the class itself."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    plain = origin or hint
    if plain is Any or not isinstance(plain, type):
        return True
    if plain is type(None):
        return value is None
    if plain is bool:
        return isinstance(value, bool)
    if plain in (int, float):
        allowed = (int,) if plain is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    if plain in (str, list, dict):
        return isinstance(value, plain)
    return isinstance(value, (str, dict, list, plain))


def _choices(hint: Any) -> list[str]:
    """Values of the enumeration in a hint such as `SchedulerType | str`; none where there is no enumeration."""
    enums = [option for option in (hint, *get_args(hint)) if isinstance(option, type) and issubclass(option, Enum)]
    return [choice.value for enum in enums for choice in enum]


def _readable(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def deepspeed_config(config: StageConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a recipe. Optimizer and schedule stay torch's, so that all ZeRO stages step alike.

    Raises:
        ConfigError: `deepspeed.extra` sets what another key of the recipe decides.
    """
    chosen: DeepSpeedConfig = config.deepspeed
    zero: dict[str, Any] = {"stage": chosen.stage, "overlap_comm": False, "contiguous_gradients": True}
    if chosen.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if chosen.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if chosen.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    mixed = bool(config.trainer.get("bf16", False))
    extra = dict(chosen.extra)
    inner = extra.pop("zero_optimization", {})
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
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | inner,
        **extra,
    }
