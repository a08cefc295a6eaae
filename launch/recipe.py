"""The whole recipe, stage after stage:  python launch/recipe.py [key=value ...]

Started again, it goes on at the stage that is not done.
"""

from __future__ import annotations

from qwen2audio_train.cli.compose import LAUNCH, compose, launch
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig
from qwen2audio_train.evaluation.reporting.report import write_report
from qwen2audio_train.evaluation.reporting.stage_record import stage_table
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.chain import held_out_manifests, run_stages, stage_configs, summarise


def main(recipe: RecipeConfig) -> None:
    if recipe.dry_run:
        for config in stage_configs(recipe, config_of).values():
            print_plan(config)
        return
    entries = run_stages(recipe, config_of, LAUNCH)
    summary = summarise(recipe, entries, held_out_manifests(recipe))
    page = write_report(recipe.run_dir)
    print(stage_table(summary))
    print(f"report: {page.resolve()}")


def config_of(root: str, overrides: list[str]) -> StageConfig | EvaluateConfig:
    """The checked config of a stage or of an evaluation, as its own launch script would see it."""
    return compose(root, overrides, EvaluateConfig) if root == "evaluate" else compose(root, overrides, StageConfig)


if __name__ == "__main__":
    launch(main, "recipe", RecipeConfig)
