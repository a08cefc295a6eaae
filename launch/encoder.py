"""Stage zero, for a tower of random numbers, which has no Whisper to start from:  torchrun launch/encoder.py [...]"""

from __future__ import annotations

from compose import launch

from qwen2audio_train.config import StageConfig
from qwen2audio_train.training import stage
from qwen2audio_train.training.arguments import training_arguments
from qwen2audio_train.training.encoder_stage import build_recogniser, byte_tokenizer, encoder_trainer
from qwen2audio_train.training.plan import print_plan


def main(config: StageConfig) -> None:
    if config.dry_run:
        print_plan(config)
        return
    arguments = training_arguments(config)
    stage.open_run(config)
    stage.make_selfmade(config.data)
    tokenizer = byte_tokenizer(config)
    model = build_recogniser(config, tokenizer)
    batches = stage.training_batches(config, tokenizer)
    trainer = encoder_trainer(config, arguments, model, tokenizer, batches)
    stage.fit(trainer, config)


if __name__ == "__main__":
    launch(main, "encoder", StageConfig)
