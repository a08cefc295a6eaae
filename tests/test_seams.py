"""Where this project leans on what other libraries do not promise: each such name still exists, with its parameters.

A new release that renames one of them would often go on without an error: a resume from fresh weights, a loss divided
twice. Here it fails by name. What an override does is tested where it is defined.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

import deepspeed
import pytest
import torch
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration, Qwen2AudioModel, Trainer
from transformers import TrainerCallback as Callback
from trl import DPOTrainer, KTOTrainer

import qwen2audio_train
from qwen2audio_train.model.activation_checkpointing import ATTENTION, PRODUCTS
from qwen2audio_train.training.trainers.preference import PreferenceTrainer

OVERRIDDEN: dict[type, dict[str, str]] = {
    Trainer: {
        "create_optimizer": "model",
        "create_scheduler": "num_training_steps optimizer",
        "get_train_dataloader": "",
        "_prepare_input": "data",
        "get_batch_samples": "epoch_iterator num_batches device",
        "floating_point_ops": "inputs",
        "log": "logs start_time",
        "compute_loss": "model inputs return_outputs num_items_in_batch",
        "evaluate": "eval_dataset ignore_keys metric_key_prefix",
        "training_step": "model inputs num_items_in_batch",
        "_prepare_inputs": "inputs",
        "_get_grad_norm": "model grad_norm",
        "_save_checkpoint": "model trial",
        "_maybe_log_save_evaluate": "",
        "_load_from_checkpoint": "resume_from_checkpoint model",
        "_load_rng_state": "checkpoint",
        "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    },
    DPOTrainer: {
        "compute_loss": "model inputs return_outputs num_items_in_batch",
        "log": "logs start_time",
        "evaluate": "eval_dataset ignore_keys metric_key_prefix",
        "_prepare_dataset": "dataset processing_class args dataset_name",
        "_precompute_ref_logps": "dataset name batch_size",
        "_send_telemetry": "",
    },
    KTOTrainer: {
        "compute_loss": "model inputs return_outputs num_items_in_batch",
        "log": "logs start_time",
        "evaluate": "eval_dataset ignore_keys metric_key_prefix",
        "_prepare_dataset": "dataset processing_class args dataset_name",
        "_precompute_ref_logps": "dataset name batch_size",
        "_send_telemetry": "",
        "_compute_kl_logps": "model batch",
    },
    PreTrainedModel: {
        "_set_gradient_checkpointing": "enable gradient_checkpointing_func every_n_layers",
        "save_pretrained": "save_directory is_main_process state_dict",
    },
    Qwen2AudioModel: {"forward": "input_ids input_features attention_mask"},
    Qwen2AudioForConditionalGeneration: {"forward": "input_ids input_features attention_mask"},
    Callback: {
        "on_train_begin": "args state control",
        "on_step_end": "args state control",
        "on_log": "args state control",
        "on_evaluate": "args state control",
        "on_train_end": "args state control",
    },
    FileConfigSource: {"load_config": "config_path"},
}
"""Upstream class -> method that a class of ours overrides -> its first parameters, in their order."""

CALLED = {
    "transformers.Trainer._save_rng_state": "self output_dir",
    "transformers.Trainer._load_callback_state": "self",
    "transformers.Trainer.compute_loss_context_manager": "self",
    "transformers.TrainerState.compute_steps": "self args max_steps",
    "transformers.TrainerState.init_training_references": "self trainer max_steps num_train_epochs trial",
    "transformers.PreTrainedModel._from_config": "config",
    "transformers.ProcessorMixin.check_argument_for_proper_class": "self argument_name argument",
    "transformers.ProcessorMixin.get_processor_dict": "pretrained_model_name_or_path",
    "transformers.DynamicCache.batch_repeat_interleave": "self repeats",
    "transformers.DynamicCache.batch_select_indices": "self indices",
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": (
        "model_type_or_class_name mapping overwrite"
    ),
    "transformers.core_model_loading.WeightRenaming": "source_patterns target_patterns",
    "transformers.integrations.deepspeed.unset_hf_deepspeed_config": "",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "module query key value attention_mask",
    "trl.DPOTrainer.compute_ref_log_probs": "self model inputs",
    "trl.models.prepare_deepspeed": "model accelerator",
    "accelerate.Accelerator.gather": "self tensor",
    "accelerate.Accelerator.gather_for_metrics": "self input_data",
    "peft.get_peft_model_state_dict": "model state_dict",
    "peft.PeftModel.delete_adapter": "self adapter_name",
    "sacrebleu.metrics.CHRF._extract_corpus_statistics": "self hypotheses references",
    "sacrebleu.metrics.CHRF._compute_score_from_stats": "self stats",
    "deepspeed.zero.GatheredParameters": "params modifier_rank",
}
"""Functions that are called and are nobody's documented interface, or have changed before -> their first parameters."""

TOUCHED: dict[Any, tuple[str, ...]] = {
    Trainer: ("model_accepts_loss_kwargs", "_get_num_items_in_batch", "is_deepspeed_enabled", "is_in_train"),
    DPOTrainer: ("_metrics", "_total_train_tokens", "_precompute_engine", "precompute_ref_logps", '"ref"'),
    KTOTrainer: ("_metrics", "_total_train_tokens", "_precompute_engine", "calculate_KL", '"ref"'),
    PreTrainedModel: ("_no_split_modules", "_weight_conversions", "_keys_to_ignore_on_save"),
    deepspeed.runtime.zero.stage3: (
        *("fp32_partitioned_groups_flat", "grad_position", "get_param_id"),
        *("ds_id", "ds_numel", "ds_tensor"),
    ),
    deepspeed.runtime.zero.partition_parameters: ("ds_id", "ds_shape", "ds_numel"),
    deepspeed.runtime.zero.stage_1_and_2: ("single_partition_of_fp32_groups", "bit16_groups"),
    deepspeed.runtime.bf16_optimizer: ("fp32_groups_flat_partition", "bf16_groups"),
    deepspeed.utils.mixed_precision_linkage: ("_hp_mapping",),
    deepspeed.utils.tensor_fragment: ("lp_fragment_address", "hp_fragment_address", "param_group_index"),
}
"""Attributes that are read or set from outside, and made inside their library: the words stand in its source."""


EXTRAS = {"gradio"}
"""What a module imports at its top and only an extra brings; none of its classes is of those in question."""


def classes() -> list[type]:
    """Every class of the package."""
    found: set[type] = set()
    for module in pkgutil.walk_packages(qwen2audio_train.__path__, f"{qwen2audio_train.__name__}."):
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            continue
        found |= {c for c in members if isinstance(c, type) and c.__module__ == module.name}
    return sorted(found, key=lambda c: f"{c.__module__}.{c.__qualname__}")


source = cache(inspect.getsource)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def overrides() -> list[tuple[type, str, type]]:
    """Methods of ours, and the upstream class of `OVERRIDDEN` or of its library that defines them further up."""
    libraries = {base.__module__.split(".")[0] for base in OVERRIDDEN}
    found = []
    for ours in classes():
        above = [base for base in ours.__mro__[1:] if base.__module__.split(".")[0] in libraries]
        for name, member in vars(ours).items():
            upstream = next((base for base in above if name in vars(base)), None)
            if upstream is not None and inspect.isfunction(member) and not name.startswith("__"):
                found.append((ours, name, upstream))
    return found


@pytest.mark.parametrize(("base", "name"), [(b, n) for b, names in OVERRIDDEN.items() for n in names])
def test_an_overridden_method_has_the_parameters_that_ours_takes(base: type, name: str) -> None:
    expected = OVERRIDDEN[base][name].split()
    assert parameters(getattr(base, name))[1 : len(expected) + 1] == expected


def test_every_override_is_marked_and_listed() -> None:
    found = overrides()
    assert {name for ours, name, _ in found if issubclass(ours, Trainer)} >= {"compute_loss", "_save_checkpoint"}
    unmarked = [
        f"{ours.__name__}.{name}" for ours, name, _ in found if not getattr(vars(ours)[name], "__override__", 0)
    ]
    assert unmarked == [], "decorate with typing_extensions.override"
    # By name: Hydra executes the modules of its plugins once more when it looks for them.
    listed = {f"{base.__name__}.{name}" for base, names in OVERRIDDEN.items() for name in names}
    unlisted = [there for _, name, base in found if (there := f"{base.__name__}.{name}") not in listed]
    assert unlisted == [], "add to OVERRIDDEN"


@pytest.mark.parametrize("trl", [DPOTrainer, KTOTrainer])
def test_what_the_mixin_replaces_in_trl_is_listed(trl: type) -> None:
    """Its base is no trainer of TRL, so that `override` cannot be asked for there."""
    replaced = {name for name, member in vars(PreferenceTrainer).items() if inspect.isfunction(member)}
    assert replaced & set(vars(trl)) - {"__init__"} <= set(OVERRIDDEN[trl])


@pytest.mark.parametrize("name", CALLED)
def test_a_called_function_has_the_parameters_that_it_is_given(name: str) -> None:
    expected = CALLED[name].split()
    found = parameters(resolved(name))
    assert [parameter for parameter in found if parameter in expected] == expected


@pytest.mark.parametrize(("where", "word"), [(w, word) for w, words in TOUCHED.items() for word in words])
def test_an_attribute_is_still_made_upstream(where: Any, word: str) -> None:
    parts = where.__mro__[:-1] if isinstance(where, type) else [where]
    assert any(word in source(part) for part in parts)


def test_zero_3_can_be_hidden_from_transformers() -> None:
    assert hasattr(importlib.import_module("transformers.integrations.deepspeed"), "_hf_deepspeed_config_weak_ref")


@pytest.mark.parametrize("name", sorted(PRODUCTS | ATTENTION))
def test_an_operator_kept_by_selective_checkpointing_exists(name: str) -> None:
    importlib.import_module("torch.nn.attention.varlen")
    assert torch._C._jit_get_schemas_for_operator(name)


def resolved(name: str) -> Any:
    """The object of a dotted name, imported as far as its parts are modules."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:place]))
    return found
