"""The batches of a stage on this rank, checked against what the stage learns from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.preference import Objective
from qwen2audio_train.config.schema import (
    ConfigError,
    Stage,
    StageConfig,
)
from qwen2audio_train.data.examples import PREFERENCE_TASKS
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.loading.build import build_batches, eval_batches
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.samples.collate_kto import Answers
from qwen2audio_train.training.stages.process import process

KTO_LOSSES_WITHOUT_KL = ("apo_zero_unpaired",)
"""Values of `trainer.loss_type` under which TRL asks for no answers of other prompts."""


def training_batches(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> BatchLoader[Any]:
    """This rank's training batches.

    Raises:
        ConfigError: the sources hold examples of another stage.
    """
    state = process()
    loader = build_batches(
        config.data,
        tokenizer,
        rank=state.process_index,
        world_size=state.num_processes,
        num_mel_bins=config.model.num_mel_bins,
        family=config.model.family,
        bad_examples_path=Path(config.run_dir) / f"bad_examples.rank{state.process_index}.jsonl",
        for_generation=config.stage is Stage.grpo,
        answers=answers_of(config),
    )
    for name, tasks in loader.tasks.items():
        if tasks and (not PREFERENCE_TASKS.isdisjoint(tasks)) != (config.stage is Stage.dpo):
            found = ", ".join(sorted(tasks))
            expected = "preferences" if config.stage is Stage.dpo else "task or chat examples"
            raise ConfigError(f"data.sources.{name}: holds {found}, the stage {config.stage} learns from {expected}")
    return loader


def answers_of(config: StageConfig) -> Answers:
    """How the objective wants the answers of preference examples laid out."""
    if config.preference.objective is not Objective.kto:
        return Answers.paired
    return Answers.alone if config.trainer.get("loss_type") in KTO_LOSSES_WITHOUT_KL else Answers.with_foreign


def held_out(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[], PackLoader] | None:
    """A maker of this rank's held-out batches, tried once, so that what is wrong with them shows before training."""
    if not config.data.eval_sources:
        return None
    try:
        held_out_batches(config, tokenizer)
    except (FileNotFoundError, ConfigError) as error:
        raise ConfigError(str(error).replace("data.sources", "data.eval_sources")) from error
    return partial(held_out_batches, config, tokenizer)


def held_out_batches(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> PackLoader:
    """This rank's held-out batches, anew at each call, as is the list of those that could not be used."""
    state = process()
    listed = Path(config.run_dir) / f"bad_eval_examples.rank{state.process_index}.jsonl"
    listed.unlink(missing_ok=True)
    return eval_batches(
        config.data,
        tokenizer,
        rank=state.process_index,
        world_size=state.num_processes,
        num_mel_bins=config.model.num_mel_bins,
        family=config.model.family,
        for_generation=config.stage is Stage.grpo,
        bad_examples_path=listed,
        answers=answers_of(config),
    )
