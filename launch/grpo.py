"""Reinforcement from checkable rewards (GRPO):  torchrun launch/grpo.py [key=value ...]"""

from __future__ import annotations

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages.grpo import check_grpo, grpo_trainer
from qwen2audio_train.training.stages.train import train


def main(config: StageConfig) -> None:
    check_grpo(config.grpo)
    if config.dry_run:
        print_plan(config)
    else:
        train(config, grpo_trainer)


if __name__ == "__main__":
    launch(main, "grpo", StageConfig)
