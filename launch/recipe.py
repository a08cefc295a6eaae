"""The whole recipe, stage after stage:  python launch/recipe.py [key=value ...]

Started again, it goes on at the stage that is not done.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from compose import as_override, launch

from qwen2audio_train.config import RecipeConfig, StageConfig, load_config
from qwen2audio_train.evaluation.report import write_report
from qwen2audio_train.evaluation.stage_record import stage_table
from qwen2audio_train.training.chain import held_out_manifests, run_stages, stage_overrides, summarise
from qwen2audio_train.training.plan import print_plan


def main(recipe: RecipeConfig) -> None:
    if recipe.dry_run:
        for place, name in enumerate(recipe.stages):
            before = list(recipe.stages)[place - 1] if place else None
            print_plan(compose(name, stage_overrides(recipe, name, before)))
        return
    entries = run_stages(recipe, compose, Path(__file__).resolve().parent)
    summary = summarise(recipe, entries, held_out_manifests(recipe))
    page = write_report(recipe.run_dir)
    print(stage_table(summary))
    print(f"report: {page.resolve()}")


def compose(stage: str, overrides: list[str]) -> StageConfig:
    """The checked config of a stage, as its own launch script would see it."""
    raw = hydra.compose(stage, [as_override(override) for override in overrides])
    return load_config(raw, StageConfig)


if __name__ == "__main__":
    launch(main, "recipe", RecipeConfig)
