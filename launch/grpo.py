"""Reinforcement from checkable rewards (GRPO):  torchrun launch/grpo.py [key=value ...]"""

from __future__ import annotations

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.stages.batches import training_batches
from qwen2audio_train.training.stages.grpo import check_grpo, grpo_trainer
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.run import fit, make_selfmade, open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer


def main(config: StageConfig) -> None:
    check_grpo(config.grpo)
    if config.dry_run:
        print_plan(config)
        return
    arguments = training_arguments(config)
    open_run(config)
    make_selfmade(config.data)
    tokenizer = build_tokenizer(config)
    model = build_policy(config, tokenizer)
    batches = training_batches(config, tokenizer)
    trainer = grpo_trainer(config, arguments, model, tokenizer, batches)
    fit(trainer, config)


if __name__ == "__main__":
    launch(main, "grpo", StageConfig)
