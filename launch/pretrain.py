"""Stage one, multi-task pre-training:  torchrun launch/pretrain.py [key=value ...]"""

from __future__ import annotations

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages.language_model import language_modelling_trainer
from qwen2audio_train.training.stages.train import train


def main(config: StageConfig) -> None:
    if config.dry_run:
        print_plan(config)
    else:
        train(config, language_modelling_trainer)


if __name__ == "__main__":
    launch(main, "pretrain", StageConfig)
