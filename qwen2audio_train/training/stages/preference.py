"""The trainer of stage three from a recipe: policy, reference (live or stored), probes and guard."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from qwen2audio_train.batch import PreferenceBatch
from qwen2audio_train.config.preference import Objective, PreferenceConfig, Reference
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.data.examples import ChatExample, Message, PreferenceExample, UnpairedExample
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.loading.build import eval_batches
from qwen2audio_train.data.manifests.cache import find_manifests, good_examples
from qwen2audio_train.data.samples.collate import LoadedBatch
from qwen2audio_train.data.samples.recipe import recipe_of, remote_of
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.training.reference.cache import ReferenceCache, reference_id
from qwen2audio_train.training.reference.reference import reference_digest
from qwen2audio_train.training.stages.batches import held_out
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.probes import (
    HeldOutGuard,
    decoded_probe,
    drift_probe,
    listening_probe,
    probe_figures,
)
from qwen2audio_train.training.stages.process import process
from qwen2audio_train.training.stages.run import run_files, settings
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.dpo import AudioDPOTrainer
from qwen2audio_train.training.trainers.kto import AudioKTOTrainer
from qwen2audio_train.training.trainers.preference import PreferenceTrainer, Probe
from qwen2audio_train.training.trainers.speed import device_peak

PROBE_NEW_TOKENS = 128
"""Longest answer that a probe decodes."""


def preference_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batches: BatchLoader[Any],
) -> PreferenceTrainer:
    """The trainer of the recipe's objective.

    A frozen reference is a copy of the policy as it starts; a cached one is the policy itself, asked about every pair
    before its first step.

    Raises:
        ConfigError: the recipe wants stored log-probabilities, and audio that changes or KTO, which has none; or KTO
            with one prompt per forward.
    """
    eval_maker = held_out(config, tokenizer)
    reference = _reference(config, model)
    frozen = frozen_copy(config, model, tokenizer) if reference is Reference.frozen else None
    cache = open_cache(config, arguments, model) if reference is Reference.cached else None
    probed = probes(config, tokenizer)
    options: dict[str, Any] = {
        "args": arguments,
        "reference": reference,
        "ref_model": frozen,
        "probes": probed,
        "probe_figures": probe_figures(config.data.eval_sources) if probed else (),
        "processing_class": tokenizer,
        "loader": batches,
        "eval_batches": eval_maker,
        "files": run_files(config, tokenizer),
        "rates": config.optimizer,
        "peak_flops": device_peak(config),
        "callbacks": [*callbacks(config, settings(config)), *guards(config.preference)],
    }
    if config.preference.objective is Objective.kto:
        return AudioKTOTrainer(model, **options)
    trainer = AudioDPOTrainer(model, cache=cache, **options)
    if cache is not None:
        fill_cache(trainer, cache, [every_training_pair(config, tokenizer, model), eval_maker])
    return trainer


def _reference(config: StageConfig, model: Any) -> Reference:
    """The reference that `auto` stands for, or the chosen one. Raises ConfigError where KTO cannot go with a choice."""
    reference = config.preference.reference
    if config.preference.objective is Objective.kto:
        if reference is Reference.cached:
            raise ConfigError(
                "preference.reference=cached and preference.objective=kto: use reference=frozen or adapter"
            )
        if config.data.samples_per_pack == 1:
            raise ConfigError(
                "data.samples_per_pack=1 and preference.objective=kto: its KL term needs 2 prompts or more"
            )
    if reference is Reference.auto:
        return Reference.adapter if is_peft_model(model) else Reference.frozen
    return reference


def frozen_copy(config: StageConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The policy once more; what ZeRO-3 has cut up cannot be copied, and is built again from where it came."""
    cut_up = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    copied = build_policy(config, tokenizer) if cut_up else copy.deepcopy(model)
    return copied.eval().requires_grad_(False)


def open_cache(config: StageConfig, arguments: Any, model: Any) -> ReferenceCache:
    """The store of this policy's own log-probabilities, in a folder of its own below `preference.cache_dir`."""
    if changing := config.data.augment.changing():
        raise ConfigError(
            f"preference.reference=cached and data.augment.{changing[0]}: stored log-probabilities belong to one "
            "audio; switch the augmentation off, or use preference.reference=frozen or adapter"
        )
    digest = reference_digest(model)
    dtype = torch.bfloat16 if arguments.bf16 else model.dtype
    folder = Path(config.preference.cache_dir) / digest[:16]
    return ReferenceCache(folder, reference_id(digest, dtype, arguments.ld_alpha), process().process_index)


def every_training_pair(
    config: StageConfig, tokenizer: PreTrainedTokenizerBase, model: Any
) -> Callable[[], BatchLoader[Any]] | None:
    """Batches that hold each training pair once, this rank's share; None for streams, stored as they come by.

    Raises:
        ConfigError: streams, and a policy without adapter, whose reference is gone after its first step.
    """
    streaming = [name for name, source in config.data.sources.items() if source.streaming]
    if streaming and not is_peft_model(model):
        raise ConfigError(
            f"preference.reference=cached and data.sources.{streaming[0]}.streaming: a stream cannot be read ahead; "
            "unset it, or use preference.reference=frozen or adapter.kind=lora"
        )
    if streaming:
        return None
    state = process()
    data = dataclasses.replace(config.data, eval_sources=config.data.sources)
    return lambda: eval_batches(
        data,
        tokenizer,
        keep_too_long=False,
        rank=state.process_index,
        world_size=state.num_processes,
        num_mel_bins=config.model.num_mel_bins,
        family=config.model.family,
    )


def fill_cache(
    trainer: AudioDPOTrainer, cache: ReferenceCache, passes: list[Callable[[], Iterable[LoadedBatch]] | None]
) -> None:
    """Store what is missing of every pass over pairs, and read what the other ranks stored."""
    before = len(cache)
    for batches in passes:
        if batches is not None:
            trainer.precompute_reference(cast(Iterable[PreferenceBatch], batches()))
    if dist.is_initialized():
        dist.barrier()
    cache.load()
    if trainer.args.should_save:
        print(f"reference log-probabilities: {before} pairs were stored, now {len(cache)} ({cache.folder})")


def guards(config: PreferenceConfig) -> list[TrainerCallback]:
    """What may stop training before its last step."""
    if not config.patience:
        return []
    return [HeldOutGuard(config.watch, config.patience, greater_is_better=not config.watch_lower)]


def probes(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """What every evaluation measures besides the held-out pairs."""
    examples = list(islice(_held_out_preferences(config), config.preference.probe_examples))
    if not examples:
        return []
    samples = recipe_of(config.data, config.model.num_mel_bins, config.model.family)
    decoding = Decoding(max_new_tokens=PROBE_NEW_TOKENS, seed=config.seed)
    found = [drift_probe(tokenizer, examples, samples, decoding)]
    if pairs := [example for example in examples if isinstance(example, PreferenceExample)]:
        found.append(listening_probe(tokenizer, pairs, samples, seed=config.seed))
    if asked := [_with_answer(pair) for pair in pairs if pair.meta.get("task")]:
        found.append(decoded_probe(tokenizer, asked, samples, decoding))
    return found


def _held_out_preferences(config: StageConfig) -> Iterator[PreferenceExample | UnpairedExample]:
    for name, source in config.data.eval_sources.items():
        found = good_examples(find_manifests(name, source, remote_of(config.data), config.data.num_workers))
        yield from (example for example in found if isinstance(example, PreferenceExample | UnpairedExample))


def _with_answer(pair: PreferenceExample) -> ChatExample:
    """The prompt with the chosen answer as its reference."""
    messages = (*pair.prompt, Message("assistant", (pair.chosen,)))
    return ChatExample(pair.id, messages, pair.source, meta=pair.meta)
