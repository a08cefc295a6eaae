"""The keys of launch/ablate.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qwen2audio_train.config.bounds import at_least


class AblationMode(StrEnum):
    run = "run"
    plan = "plan"
    slurm = "slurm"


@dataclass
class AblationConfig:
    """A baseline recipe, and overlays that each change one thing of it.

    Attributes:
        name: of the ablation.
        run_dir: folder of its runs, `<overlay>/seed<seed>` each, and of its table and page.
        recipe: root of recipes/ that is the baseline, such as `recipe` or `recipe_small`.
        keys: keys of that recipe that the baseline sets otherwise.
        stages: the stages of the recipe that are run; empty: all of them.
        overlays: per overlay and stage the keys that it changes: {frozen: {pretrain: [ablation=frozen_encoder]}}.
            Stages before the first that it changes are the baseline's own.
        seeds: of weights, order and dropout; every overlay is run with each.
        metrics: scores that the table shows; empty: all.
        mode: `run` does what is missing and gathers; `plan` says what is missing; `slurm` writes an array script.
        only: numbers of the runs to do, as `plan` counts them; empty: all. The tasks of a Slurm array set it.
        bootstrap_samples: resamples behind each interval.
    """

    name: str = "ablation"
    run_dir: str = "runs/ablations/${name}"
    recipe: str = "recipe"
    keys: dict[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    overlays: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"least": 0})
    metrics: list[str] = field(default_factory=list)
    mode: AblationMode = AblationMode.run
    only: list[int] = field(default_factory=list, metadata={"least": 0})
    bootstrap_samples: int = at_least(1, 1000)
