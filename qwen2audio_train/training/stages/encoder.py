"""The trainer of stage zero, from a recipe: a random tower learns bytes, real parts the language model's tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from qwen2audio_train.config.schema import AdapterKind, ConfigError, ModelKind, StageConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.prompts.pools import tag_tokens
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.packed import PackedAudioLM
from qwen2audio_train.model.recogniser import Recogniser
from qwen2audio_train.training.checkpoints.restore import kept_whole
from qwen2audio_train.training.stages.batches import held_out
from qwen2audio_train.training.stages.ctc_head import attach_ctc_head
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.run import run_files, settings
from qwen2audio_train.training.stages.tokenizer import build_tokenizer, languages_of, training_examples
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.encoder import EncoderTrainer
from qwen2audio_train.training.trainers.warm_up import WarmUpTrainer

UNUSED_PARTS = ("language_model", "embed_tokens", "lm_head")
"""What the stage never trains: it runs none of it, and reads the table of embeddings."""


def reads_bytes(config: StageConfig) -> bool:
    """Whether the tower learns under a new head over bytes: embeddings of random numbers are no goal."""
    return config.model.kind is ModelKind.tiny and config.init_from is None


def encoder_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a random tower one without merges: every byte of a transcript is a token."""
    if not reads_bytes(config):
        return build_tokenizer(config)
    languages = languages_of(training_examples(config.data))
    return train_tokenizer(
        [], 2**16, tag_tokens(languages, config.data.prompt_style), family=family_of(config.model.family)
    )


def build_listener(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Recogniser | PackedAudioLM:
    """The model of the recipe with a head that reads what the tower, or the projector, gives.

    Raises:
        ConfigError: a part that the stage does not train is not frozen, or an adapter is asked for.
    """
    if reads_bytes(config):
        model = build_model(config.model, tokenizer=tokenizer)
        return Recogniser(model, len(tokenizer), sorted(tokenizer.get_added_vocab().values()))
    if config.adapter.kind is not AdapterKind.none:
        raise ConfigError(f"adapter.kind={config.adapter.kind}: the stage encoder trains whole parts; set adapter=none")
    for part in UNUSED_PARTS:
        if not getattr(config.model.freeze, part):
            raise ConfigError(
                f"model.freeze.{part}: the stage encoder does not run the language model; set model.freeze.{part}=true"
            )
    with kept_whole():
        model = build_policy(config, tokenizer)
    attach_ctc_head(model, tokenizer)
    model.runs_language_model = False
    return model


def encoder_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batches: BatchLoader[Any],
) -> EncoderTrainer | WarmUpTrainer:
    """The trainer of stage zero."""
    common: dict[str, Any] = {
        "args": arguments,
        "loader": batches,
        "eval_batches": held_out(config, tokenizer),
        "files": run_files(config, tokenizer),
        "callbacks": callbacks(config, settings(config)),
    }
    if isinstance(model, Recogniser):
        return EncoderTrainer(model=model, **common)
    spoken = model.get_input_embeddings()(model.ctc_head.vocabulary)
    return WarmUpTrainer(
        model=model,
        **common,
        rates=config.optimizer,
        tokenizer=tokenizer,
        sampled_tokens=config.ctc.sampled_tokens,
        embedding_norm=float(spoken.float().norm(dim=1).mean()),
    )
