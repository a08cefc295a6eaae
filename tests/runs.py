"""A tiny recipe over `noise` and ways to run it, for the tests of training, launch scripts and ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen2audio_train.config.schema import StageConfig, load_config
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.stages.batches import training_batches
from qwen2audio_train.training.stages.encoder import build_listener, encoder_tokenizer, encoder_trainer
from qwen2audio_train.training.stages.grpo import grpo_trainer
from qwen2audio_train.training.stages.language_model import language_modelling_trainer
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.preference import preference_trainer
from qwen2audio_train.training.stages.run import fit, open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer
from qwen2audio_train.training.trainers.packed import PackedTrainer
from tests.noise import WORDS
from tests.tiny_parts import write_language_model, write_whisper

ARCHITECTURE = {
    "audio_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "max_source_positions": 1500,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


def recipe(corpus: Path, run_dir: Path, *overrides: str, sources: Iterable[str] = ("speech", "sound")) -> StageConfig:
    """A run of four steps that logs all of them, in float32; `overrides` as on a command line."""
    values: dict[str, Any] = {
        "stage": "pretrain",
        "name": "test",
        "run_dir": str(run_dir),
        "model": {"kind": "tiny", "num_mel_bins": 16, "vocab_size": 300, "architecture": ARCHITECTURE},
        "data": {
            "sources": {name: {"path": [str(corpus / f"{name}.jsonl")]} for name in sources},
            "tokens_per_pack": 100,
            "packs_per_step": 4,
            "window_examples": 16,
            "num_workers": 0,
            "cache_dir": str(corpus / "cache"),
        },
        "trainer": {
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "tracker": {"wandb": "off"},
    }
    return load_config(OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides))), StageConfig)


def pairs_recipe(corpus: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """The same for preference pairs, two in a pack."""
    return recipe(corpus, run_dir, "stage=dpo", "data.samples_per_pack=2", *overrides, sources=["pairs"])


def encoder_recipe(corpus: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """The same for stage zero, on the clips that have a transcript."""
    return recipe(corpus, run_dir, "stage=encoder", *overrides, sources=["speech"])


def warm_up_recipe(corpus: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """The same for a model put together from a tiny Whisper and a tiny Llama, which are made in `corpus`."""
    parts = [f"model.audio_encoder={corpus}/whisper", f"model.language_model={corpus}/llama"]
    if not (corpus / "llama").is_dir():
        write_whisper(corpus / "whisper", bands=16)
        write_language_model(corpus / "llama", "llama", train_tokenizer(WORDS, 300))
    frozen = [f"model.freeze.{part}=true" for part in ("language_model", "embed_tokens", "lm_head")]
    return encoder_recipe(corpus, run_dir, "model.kind=assembled", *parts, *frozen, *overrides)


def grpo_recipe(corpus: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """The same for prompts that are answered: two in a forward, four answers of at most five tokens each."""
    own = ["stage=grpo", "data.samples_per_pack=2", "grpo.num_generations=4", "grpo.max_completion_length=5"]
    rewards = f"grpo.rewards={{'{Path(__file__).parent / 'rewards.py'}:short': 1.0}}"
    return recipe(corpus, run_dir, *own, rewards, *overrides, sources=["speech"])


def build_trainer(config: StageConfig) -> PackedTrainer:
    """The trainer of a recipe, built as the launch scripts build it."""
    arguments = training_arguments(config)
    open_run(config)
    if config.stage == "encoder":
        words = encoder_tokenizer(config)
        listener = build_listener(config, words)
        return encoder_trainer(config, arguments, listener, words, training_batches(config, words))
    tokenizer = build_tokenizer(config)
    model = build_policy(config, tokenizer)
    batches = training_batches(config, tokenizer)
    makers: dict[str, Any] = {"dpo": preference_trainer, "grpo": grpo_trainer}
    make = makers.get(config.stage, language_modelling_trainer)
    return make(config, arguments, model, tokenizer, batches)


def train(config: StageConfig) -> PackedTrainer:
    """Run a recipe to its end, or from its checkpoint to its end."""
    trainer = build_trainer(config)
    fit(trainer, config)
    return trainer


def logged(config: StageConfig, *names: str) -> list[tuple[float, ...]]:
    """Figures of every step that a run has logged."""
    lines = [json.loads(line) for line in (Path(config.run_dir) / "log.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if "loss" in line]
