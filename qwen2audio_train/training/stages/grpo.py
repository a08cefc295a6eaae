"""The trainer of reinforcement from checkable rewards, from a recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from qwen2audio_train.config.reinforcement import GrpoConfig
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.pairs.questions import questions_of
from qwen2audio_train.pairs.score import scorer
from qwen2audio_train.training.stages.batches import held_out
from qwen2audio_train.training.stages.probes import HeldOutGuard
from qwen2audio_train.training.stages.run import run_files, settings
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.grpo import AudioGRPOTrainer, Reward
from qwen2audio_train.training.trainers.speed import device_peak


def grpo_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batches: BatchLoader[Any],
) -> AudioGRPOTrainer:
    """The trainer of group-relative policy optimisation.

    Raises:
        ConfigError: a reward that there is not, no reward at all, or `num_iterations` above one.
    """
    grpo = config.grpo
    check_grpo(grpo)
    frozen = None
    if grpo.beta and not is_peft_model(model):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return AudioGRPOTrainer(
        model=model,
        args=arguments,
        loader=batches,
        eval_batches=held_out(config, tokenizer),
        files=run_files(config, tokenizer),
        rates=config.optimizer,
        peak_flops=device_peak(config),
        grpo=grpo,
        rewards={name: reward(name) for name in grpo.rewards},
        processing_class=tokenizer,
        num_mel_bins=config.model.num_mel_bins,
        reference=frozen,
        seed=config.seed,
        callbacks=[*callbacks(config, settings(config)), *_guards(grpo)],
    )


def check_grpo(grpo: GrpoConfig) -> None:
    """Raises ConfigError for what cannot be trained with, before anything is loaded."""
    if not grpo.rewards:
        raise ConfigError("grpo.rewards: empty; name at least one, such as grpo.rewards.error_rate=1.0")
    if grpo.num_iterations > 1:
        raise ConfigError(
            "grpo.num_iterations: only 1 is supported, every step learns from completions of the policy as it is; "
            "raise data.packs_per_step for larger steps"
        )
    for name in grpo.rewards:
        reward(name)


def reward(name: str) -> Reward:
    """The reward of that name: a scorer of preference pairs (`pairs.score`), on examples instead of questions.

    Raises:
        ScoreError: there is none.
    """
    score = scorer(name, f"grpo.rewards.{name}")

    def rewards(examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        found = score(list(zip(questions_of(examples), texts, strict=True)))
        return [[float("nan") if value is None else value for value in row] for row in found]

    return rewards


def _guards(grpo: GrpoConfig) -> list[TrainerCallback]:
    return [HeldOutGuard("eval_reward", grpo.patience)] if grpo.patience else []
