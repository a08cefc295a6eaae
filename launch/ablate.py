"""Ablations: a baseline recipe against overlays that change one thing each, over several seeds.

    python launch/ablate.py benchmarks/ablations/pretrain.yaml mode=plan      # the runs, and which are missing
    python launch/ablate.py benchmarks/ablations/pretrain.yaml                # do them, then gather
    python launch/ablate.py benchmarks/ablations/pretrain.yaml mode=slurm     # an array script, a task for each run

The keys are the fields of AblationConfig; a YAML file holds them, and keys on the command line win. Started again, it
does what is missing. run_dir holds table.md, report.html, ablation.json and the plots.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2audio_train.ablation.gather import gather
from qwen2audio_train.ablation.outcome import (
    COLUMNS,
    COST_COLUMNS,
    NUMBERS,
    change_rows,
    cost_rows,
    write_outcome,
)
from qwen2audio_train.ablation.study import do_missing, missing_table, overrides_of, runs_of, write_array
from qwen2audio_train.cli.compose import HELP, LAUNCH, compose, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.config.ablation import AblationConfig, AblationMode
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig
from qwen2audio_train.evaluation.scoring.table import aligned

OPTIONS = AblationConfig


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line or a recipe is wrong, or a stage failed."""
    if not arguments or arguments[0] in HELP:
        print(script_help(__doc__, OPTIONS))
        return 0 if arguments else 2
    with door():
        config = given(arguments, OPTIONS)
        baseline = compose(config.recipe, overrides_of(config.keys), RecipeConfig)
        runs = runs_of(config, baseline)
        if config.mode is AblationMode.slurm:
            keys = shlex.join(word for word in arguments if not word.startswith("mode="))
            print(write_array(config, baseline, runs, keys))
            return 0
        if config.mode is AblationMode.run:
            do_missing(runs, config.only, config_of, LAUNCH)
        print(missing_table(runs))
        if config.only or config.mode is AblationMode.plan:
            return 0
        arms = gather(runs, config.metrics, config.bootstrap_samples)
        page = write_outcome(config.name, arms, Path(config.run_dir))
        print(aligned(COLUMNS, change_rows(arms), right=NUMBERS))
        print(aligned(COST_COLUMNS, cost_rows(arms)))
        print(f"report: {page.resolve()}")
    return 0


def config_of(root: str, overrides: list[str]) -> Any:
    """The checked config of a stage or of an evaluation, as its own launch script would see it."""
    return compose(root, overrides, EvaluateConfig if root == "evaluate" else StageConfig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
