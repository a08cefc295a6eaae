"""The trainer of stage zero, from a recipe."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.prompts.pools import tag_tokens
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.recogniser import Recogniser
from qwen2audio_train.training.stages.batches import held_out
from qwen2audio_train.training.stages.run import run_files, settings
from qwen2audio_train.training.stages.tokenizer import languages_of, training_examples
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.encoder import EncoderTrainer


def byte_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """A tokenizer without merges: every byte of a transcript is a token."""
    languages = languages_of(training_examples(config.data))
    return train_tokenizer([], 2**16, tag_tokens(languages, config.data.prompt_style))


def build_recogniser(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Recogniser:
    """The random model of the recipe under a head for `tokenizer`."""
    model = build_model(config.model, tokenizer=tokenizer)
    return Recogniser(model, len(tokenizer), sorted(tokenizer.get_added_vocab().values()))


def encoder_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Recogniser,
    tokenizer: PreTrainedTokenizerBase,
    batches: BatchLoader[Any],
) -> EncoderTrainer:
    """The trainer of stage zero."""
    eval_maker = held_out(config, tokenizer)
    return EncoderTrainer(
        model=model,
        args=arguments,
        loader=batches,
        eval_batches=eval_maker,
        files=run_files(config, tokenizer),
        callbacks=callbacks(config, settings(config)),
    )
