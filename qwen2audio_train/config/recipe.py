"""The schema of a whole recipe: stages in a row, each with its overrides."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import MAX_SEED
from qwen2audio_train.config.schema import Stage


@dataclass
class StageCall:
    """One stage of a recipe.

    Attributes:
        overrides: keys of the stage's own recipe, as on its command line.
        evaluate: keys of its evaluation.
        decodes: whether there is anything to score after it.
        hands_on: the key by which the next stage starts from it.
        pairs: options of `pairs.py sample`, by which the stage before answers first; into `pairs.jsonl` of the recipe's
            run.
    """

    overrides: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    decodes: bool = True
    hands_on: str = field(default="init_from", metadata={"choices": ("init_from", "model.audio_encoder")})
    pairs: list[str] = field(default_factory=list)


@dataclass
class RecipeConfig:
    """Root of `recipe.yaml`: the stages in a row, each under torchrun, each starting from the one before.

    Attributes:
        name: of the recipe.
        run_dir: folder of all its stages.
        nproc_per_node: ranks of each stage on this machine.
        seed: of every stage.
        dry_run: print what would run, and stop.
        overrides: keys of all stages, as on their command lines.
        evaluate: keys of all evaluations.
        stages: the stages in their order, by their names.
    """

    name: str = MISSING
    run_dir: str = "runs/${name}"
    nproc_per_node: int = at_least(1, 1)
    seed: int = at_least(0, 0, MAX_SEED)
    dry_run: bool = False
    overrides: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    stages: dict[str, StageCall] = field(default_factory=dict, metadata={"choices": tuple(Stage)})
