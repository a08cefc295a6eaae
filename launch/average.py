"""The mean of a run's last checkpoints, as a folder of weights:  python launch/average.py run_dir=runs/sft output_dir=.

    python launch/average.py run_dir=runs/pretrain last=5 output_dir=runs/pretrain-mean
    python launch/average.py "checkpoints=[runs/a/checkpoint-100,runs/a/checkpoint-200]" output_dir=runs/a-mean

It goes on as any other: init_from=runs/pretrain-mean, checkpoint=runs/pretrain-mean. `trainer.save_total_limit` has to
keep as many checkpoints as are taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen2audio_train.cli.compose import HELP, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.training.checkpoints.average import AverageOptions, average

OPTIONS = AverageOptions


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where there is no mean to be had."""
    if arguments and arguments[0] in HELP:
        print(script_help(__doc__, AverageOptions))
        return 0
    with door():
        options = given(arguments, AverageOptions)
        chosen = average(options)
        print(f"{options.output_dir}: the mean of {', '.join(map(str, chosen))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
