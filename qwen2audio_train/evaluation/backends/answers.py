"""What the backends share: the command's keys, and texts from somewhere else as an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, Clip, Example, PreferenceExample, UnpairedExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.prompts.render import Text
from qwen2audio_train.data.samples.recipe import render_as
from qwen2audio_train.evaluation.decoding.ranks import rank_and_world
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, evaluation_of, save
from qwen2audio_train.evaluation.scoring.items import item_of
from qwen2audio_train.evaluation.scoring.normalise import strip_tags
from qwen2audio_train.evaluation.scoring.score import check_libraries

WORDS = "words/1"
"""Stamp of a task that is asked of a model of chats: its clip, then the first prompt of its pool without tags."""


@dataclass
class HeldOutOptions:
    """Keys of every backend.

    Attributes:
        manifests: held-out manifest per name.
        output_dir: where `metrics.json`, `table.txt` and the texts go.
        max_new_tokens: longest answer in tokens.
        bootstrap_samples, seed: of the confidence intervals.
    """

    manifests: dict[str, str] = field(default_factory=dict)
    output_dir: str = ""
    max_new_tokens: int = 256
    bootstrap_samples: int = 1000
    seed: int = 0


def held_out(options: HeldOutOptions) -> list[Example]:
    """The examples of the manifests, all of which can be scored here.

    Raises:
        ConfigError: nothing to score, nowhere to write, a manifest that is not there, or a preference in it.
        MissingLibraryError: a score would need a library that is not installed.
    """
    if not options.manifests:
        raise ConfigError("manifests: empty; name what to score: manifests.NAME=FILE")
    if not options.output_dir:
        raise ConfigError("output_dir: no value was given; set output_dir=... to a folder for the scores")
    examples: list[Example] = []
    for name, path in options.manifests.items():
        if not Path(path).is_file():
            raise ConfigError(f"manifests.{name}={path}: no such file")
        examples += read_manifest(path)
    if pair := next((e for e in examples if isinstance(e, PreferenceExample | UnpairedExample)), None):
        raise ConfigError(f'manifests: example "{pair.id}" is a preference, which has no single right answer')
    check_libraries([item for item in map(item_of, examples) if item is not None])
    return examples


def turns_of(example: Example) -> list[tuple[str, list[str | Clip]]]:
    """Role and content of every turn that a model of chats is asked with: those of a chat but the answer; a task as one
    turn, its first prompt after its clip."""
    if isinstance(example, ChatExample):
        turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
        return [(turn.role, list(turn.content)) for turn in turns]
    rendered = render_as(SampleRecipe(), example, for_generation=True)
    prompt = strip_tags("".join(piece.text for piece in rendered.trunk if isinstance(piece, Text)))
    return [("user", [*rendered.clips, prompt])]


def scored(
    options: HeldOutOptions,
    examples: Sequence[Example],
    texts: Sequence[str | None],
    failed: Mapping[int, str],
    *,
    notes: Sequence[str],
    settings: Mapping[str, Any],
    asked: str = "",
) -> Evaluation:
    """The texts of a backend as an evaluation, which rank 0 writes into `output_dir`.

    Args:
        asked: stamp of how it asks what is in the task form, where that is not the prompt of our own path.
    """
    found = evaluation_of(
        examples,
        texts,
        failed,
        caveats=notes,
        asked=asked,
        settings={**settings, "max_new_tokens": options.max_new_tokens, "seed": options.seed},
        bootstrap_samples=options.bootstrap_samples,
        seed=options.seed,
    )
    if rank_and_world()[0] == 0:
        save(found, options.output_dir)
    return found
