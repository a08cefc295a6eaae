"""The trainer of pre-training and of supervised fine-tuning, from a recipe."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.training.stages.batches import held_out
from qwen2audio_train.training.stages.ctc_head import attach_auxiliary
from qwen2audio_train.training.stages.decoded import held_out_decoding
from qwen2audio_train.training.stages.run import run_files, settings
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.language_model import AudioTrainer
from qwen2audio_train.training.trainers.speed import device_peak


def language_modelling_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batches: BatchLoader[Any],
) -> AudioTrainer:
    """The trainer of pre-training and of supervised fine-tuning."""
    if config.ctc.weight:
        attach_auxiliary(config, model, tokenizer)
    eval_maker = held_out(config, tokenizer)
    return AudioTrainer(
        model=model,
        args=arguments,
        loader=batches,
        eval_batches=eval_maker,
        decoded=held_out_decoding(config, tokenizer),
        files=run_files(config, tokenizer),
        sources=list(batches.source_names),
        rates=config.optimizer,
        peak_flops=device_peak(config),
        ctc=config.ctc,
        callbacks=callbacks(config, settings(config)),
    )
