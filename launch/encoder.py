"""Stage zero, for a tower of random numbers, which has no Whisper to start from:  torchrun launch/encoder.py [...]"""

from __future__ import annotations

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.stages.batches import training_batches
from qwen2audio_train.training.stages.encoder import build_listener, encoder_tokenizer, encoder_trainer
from qwen2audio_train.training.stages.run import fit, make_selfmade, open_run


def main(config: StageConfig) -> None:
    if config.dry_run:
        print_plan(config)
        return
    arguments = training_arguments(config)
    open_run(config)
    make_selfmade(config.data)
    tokenizer = encoder_tokenizer(config)
    model = build_listener(config, tokenizer)
    batches = training_batches(config, tokenizer)
    trainer = encoder_trainer(config, arguments, model, tokenizer, batches)
    fit(trainer, config)


if __name__ == "__main__":
    launch(main, "encoder", StageConfig)
