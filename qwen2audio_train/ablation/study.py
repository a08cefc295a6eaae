"""The runs of an ablation: which there are, what each changes, and doing those that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen2audio_train.ablation.order import check_order
from qwen2audio_train.config.ablation import AblationConfig
from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.chain import LEDGER, Compose, Ledger, run_stages, stage_configs

BASELINE = "baseline"

RunStages = Callable[[RecipeConfig, Compose, Path], Any]


@dataclass(frozen=True)
class Run:
    """One arm of the ablation under one seed.

    Attributes:
        overlay: its name, or `baseline`.
        recipe: the stages that this run does itself, with its overlay's keys.
        stage: the last of them, whose scores count.
    """

    overlay: str
    seed: int
    recipe: RecipeConfig
    stage: str

    @property
    def folder(self) -> Path:
        """Of its last stage."""
        return Path(self.recipe.run_dir) / self.stage

    @property
    def name(self) -> str:
        return f"{self.overlay}, seed {self.seed}"

    def is_done(self) -> bool:
        """Whether its last stage is trained and scored."""
        entry = Ledger(Path(self.recipe.run_dir) / LEDGER).entries.get(self.stage)
        return entry is not None and entry.trained and bool(entry.evaluated)


def runs_of(config: AblationConfig, baseline: RecipeConfig) -> list[Run]:
    """All runs, the baseline's first: their numbers are those of `only`.

    Raises:
        ConfigError: no such stage, no overlay, no seed, or a last stage that nothing scores.
    """
    unknown = next((name for name in config.stages if name not in baseline.stages), None)
    if unknown:
        raise ConfigError(f"stages: {unknown} is no stage of {config.recipe}; {nearest(unknown, baseline.stages)}")
    stages = {name: call for name, call in baseline.stages.items() if name in config.stages or not config.stages}
    if not config.overlays or not config.seeds or not stages:
        raise ConfigError("overlays, seeds and the recipe's stages: expected one or more of each")
    if BASELINE in config.overlays:
        raise ConfigError(f"overlays.{BASELINE}: is the name of what the overlays are compared with; choose another")
    last = list(stages)[-1]
    if not stages[last].decodes:
        raise ConfigError(f"stages: the last one, {last}, is not scored, so there is nothing to compare")
    arms: dict[str, Mapping[str, Sequence[str]]] = {BASELINE: {}, **config.overlays}
    recipes = [
        (name, seed, recipe_of(config, replace(baseline, stages=stages), name, changed, seed))
        for name, changed in arms.items()
        for seed in config.seeds
    ]
    return [Run(name, seed, recipe, last) for name, seed, recipe in recipes]


def recipe_of(
    config: AblationConfig, baseline: RecipeConfig, overlay: str, changed: Mapping[str, Sequence[str]], seed: int
) -> RecipeConfig:
    """The baseline's stages from the first that an overlay changes, started from the baseline's one before it.

    Raises:
        ConfigError: the overlay names a stage that is not run, or changes nothing.
    """
    names = list(baseline.stages)
    if stray := next((name for name in changed if name not in names), None):
        raise ConfigError(f"overlays.{overlay}.{stray}: this stage is not run; {nearest(stray, names)}")
    if overlay != BASELINE and not any(changed.values()):
        raise ConfigError(f"overlays.{overlay}: changes nothing; expected a stage and its keys")
    first = 0 if overlay == BASELINE else min(map(names.index, changed))
    before = names[first - 1] if first else None
    stages = {
        name: replace(call, overrides=[*call.overrides, *changed.get(name, ())])
        for name, call in list(baseline.stages.items())[first:]
    }
    if before is not None:
        call = stages[names[first]]
        if call.pairs:
            raise ConfigError(
                f"overlays.{overlay}: {names[first]} starts with answers of the stage before it, which this overlay "
                f"does not run; change a key of {before} too"
            )
        start = f"{baseline.stages[before].hands_on}={run_dir(config, BASELINE, seed)}/{before}"
        stages[names[first]] = replace(call, overrides=[start, *call.overrides])
    return replace(baseline, run_dir=run_dir(config, overlay, seed), seed=seed, stages=stages)


def overrides_of(keys: Mapping[str, object], path: str = "") -> list[str]:
    """Nested keys as overrides of a command line: {a: {b: [1]}} is ["a.b=[1]"]."""
    return [
        override
        for name, value in keys.items()
        for override in (
            overrides_of(value, f"{path}{name}.")
            if isinstance(value, Mapping)
            else [f"{path}{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"]
        )
    ]


def run_dir(config: AblationConfig, overlay: str, seed: int) -> str:
    return f"{config.run_dir}/{overlay}/seed{seed}"


def do_missing(
    runs: Sequence[Run], only: Sequence[int], compose: Compose, launch_folder: Path, run: RunStages = run_stages
) -> None:
    """Train and score what is not done, one run after the other; a run that was broken off goes on.

    Every config is checked before the first starts, and after each overlay that it met the baseline's examples.

    Raises:
        ConfigError: a config is refused, a run has begun with another one, or there is no run of that number.
        OtherOrder: an overlay that does not touch the data met other examples than the baseline.
        StageFailed: a stage ended with an error.
    """
    if stray := [number for number in only if number >= len(runs)]:
        raise ConfigError(f"only={stray}: there are {len(runs)} runs, counted from 0")
    for one in runs:
        stage_configs(one.recipe, compose)
    baselines = {one.seed: one for one in runs if one.overlay == BASELINE}
    for number, one in enumerate(runs):
        if only and number not in only:
            continue
        if not one.is_done():
            print(f"run {number} of {len(runs)}: {one.name}", flush=True)
            run(one.recipe, compose, launch_folder)
        if one.overlay != BASELINE and baselines[one.seed].is_done():
            check_order(baselines[one.seed].folder, one.folder)


def missing_table(runs: Sequence[Run]) -> str:
    """Every run with its number, and whether it is done."""
    return "\n".join(
        f"{number:3d}  {'done   ' if one.is_done() else 'missing'}  {one.name}: {', '.join(one.recipe.stages)}"
        for number, one in enumerate(runs)
    )


SCRIPT = """#!/bin/bash
# {name}: {count} runs, one a task. An overlay that starts from a stage of the baseline needs it done:
#   job=$(sbatch --parsable --array=0-{last_baseline} {path})
#   sbatch --dependency=afterok:$job --array={first_overlay}-{last} {path}
#   python launch/ablate.py {keys} mode=run          # afterwards: nothing is missing, so it gathers
# Submit from the repository's folder, which all machines must see, with the options that your cluster wants.
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={run_dir}/%x-%A_%a.out
set -euo pipefail
exec "${{PYTHON:-.venv/bin/python}}" launch/ablate.py {keys} mode=run "only=[$SLURM_ARRAY_TASK_ID]"
"""


def write_array(config: AblationConfig, baseline: RecipeConfig, runs: Sequence[Run], keys: str) -> Path:
    """A Slurm array script, a task for each run; `keys` is the command line that describes the ablation."""
    path = Path(config.run_dir) / "array.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        SCRIPT.format(
            name=config.name,
            count=len(runs),
            last_baseline=len(config.seeds) - 1,
            first_overlay=len(config.seeds),
            last=len(runs) - 1,
            path=path,
            keys=keys,
            gpus=baseline.nproc_per_node,
            run_dir=config.run_dir,
        ),
        encoding="utf-8",
    )
    return path
