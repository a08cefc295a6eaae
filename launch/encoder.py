"""Stage zero, for a tower of random numbers, which has no Whisper to start from:  torchrun launch/encoder.py [...]"""

from __future__ import annotations

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages.encoder import build_listener, encoder_tokenizer, encoder_trainer
from qwen2audio_train.training.stages.train import train


def main(config: StageConfig) -> None:
    if config.dry_run:
        print_plan(config)
    else:
        train(config, encoder_trainer, make_tokenizer=encoder_tokenizer, make_model=build_listener)


if __name__ == "__main__":
    launch(main, "encoder", StageConfig)
