"""A stage from its recipe to its last checkpoint: the way that all of them go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.stages.batches import training_batches
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.run import fit, make_selfmade, open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer
from qwen2audio_train.training.trainers.packed import PackedTrainer

MakeTrainer = Callable[[StageConfig, TrainingArguments, Any, PreTrainedTokenizerBase, BatchLoader[Any]], PackedTrainer]


def train(
    config: StageConfig,
    make_trainer: MakeTrainer,
    *,
    make_tokenizer: Callable[[StageConfig], PreTrainedTokenizerBase] = build_tokenizer,
    make_model: Callable[[StageConfig, PreTrainedTokenizerBase], Any] = build_policy,
) -> PackedTrainer:
    """Train from the newest complete checkpoint, or from the start, to the end."""
    arguments = training_arguments(config)
    open_run(config)
    make_selfmade(config.data)
    tokenizer = make_tokenizer(config)
    model = make_model(config, tokenizer)
    trainer = make_trainer(config, arguments, model, tokenizer, training_batches(config, tokenizer))
    fit(trainer, config)
    return trainer
