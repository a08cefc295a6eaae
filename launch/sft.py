"""Stage two, supervised fine-tuning on voice chat and audio analysis:  torchrun launch/sft.py [key=value ...]"""

from __future__ import annotations

from compose import launch

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.stages import run as stage
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.trainers.language_model import language_modelling_trainer


def main(config: StageConfig) -> None:
    if config.dry_run:
        print_plan(config)
        return
    arguments = training_arguments(config)
    stage.open_run(config)
    stage.make_selfmade(config.data)
    tokenizer = stage.build_tokenizer(config)
    model = stage.build_policy(config, tokenizer)
    batches = stage.training_batches(config, tokenizer)
    trainer = language_modelling_trainer(config, arguments, model, tokenizer, batches)
    stage.fit(trainer, config)


if __name__ == "__main__":
    launch(main, "sft", StageConfig)
