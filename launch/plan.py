"""What a stage would need and give, before anything is loaded, and the largest pack that fits a device.

    python launch/plan.py sft model=qwen2_audio_7b_instruct adapter=lora trainer=lora_7b gpu=H100 gpu_hour_price=2.5
    python launch/plan.py sft model=qwen2_audio_7b_instruct adapter=lora trainer=lora_7b mode=find_batch

The first word is the stage; the keys are those of its recipe, and those of PlanOptions: gpu, gpus, gpu_hour_price,
utilisation, clip_s, prompt_tokens, label_tokens, mode, limit_gib. `find_batch` takes real steps on random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from qwen2audio_train.cli.compose import HELP, RECIPES, compose, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError, Stage, StageConfig
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.planning.find_batch import print_largest_pack
from qwen2audio_train.planning.forecast import PlanMode, PlanOptions, print_forecast

# What sampling costs is not forecast, so neither is the stage that samples.
STAGES = [stage.value for stage in Stage if stage not in (Stage.encoder, Stage.grpo)]
OWN = {field.name for field in fields(PlanOptions)}
GROUPS = {path.name for path in RECIPES.iterdir() if path.is_dir()}
KNOWN = OWN | GROUPS | {field.name for field in fields(StageConfig)}


def parse(arguments: Sequence[str]) -> tuple[StageConfig, PlanOptions]:
    """The checked config of a stage and the plan's own options.

    Raises:
        ConfigError: no such stage, a key that neither has, or what the schemas refuse.
    """
    stage, *pairs = arguments
    if stage not in STAGES:
        raise ConfigError(f"{stage}: no such stage; {nearest(stage, STAGES)}")
    for pair in pairs:
        key = pair.partition("=")[0].partition(".")[0]
        if key not in KNOWN:
            raise ConfigError(f"{key}: unknown key; {nearest(key, KNOWN)}")
    own = [pair for pair in pairs if pair.partition("=")[0] in OWN]
    config = compose(stage, [pair for pair in pairs if pair not in own], StageConfig)
    return config, given(own, PlanOptions)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line is wrong."""
    if not arguments or arguments[0] in HELP:
        print(script_help(__doc__, PlanOptions))
        return 0 if arguments else 2
    with door():
        config, options = parse(arguments)
        plan = print_plan(config, options.gpus)
        if options.mode is PlanMode.find_batch:
            print_largest_pack(plan, options)
        else:
            print_forecast(plan, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
