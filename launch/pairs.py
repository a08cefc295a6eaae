"""Preference pairs from a checkpoint's own answers, or by rule from right answers; and questions that need ears.

    torchrun launch/pairs.py sample checkpoint=runs/demo/sft manifests=[train.jsonl] output=pairs.jsonl score=auto
    python   launch/pairs.py rules  manifests=[train.jsonl] output=pairs.jsonl rules=[other_clip,segments]
    torchrun launch/pairs.py hearing checkpoint=runs/demo/sft manifests=[train.jsonl] output=heard.jsonl

`hearing` keeps the examples that the checkpoint fails once their clips are silenced.

The keys of a command are the fields of its options (SamplingOptions, RuleOptions, HearingOptions); a YAML file may hold
any of them, and keys on the command line win. `score` is auto, error_rate, bleu, exact, judge (with judge.base_url,
judge.model and the other fields of `Endpoint`), or a function of yours as file.py:function. Sampling goes on where it
was interrupted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from qwen2audio_train.cli.commands import Commands, run_command
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.judging.client import client_of
from qwen2audio_train.pairs.hearing import HearingOptions, answer_deaf, sift, write_sifted
from qwen2audio_train.pairs.make import (
    RuleOptions,
    SamplingOptions,
    answer,
    pairs_by_rule,
    pairs_of_answers,
    read_questions,
)
from qwen2audio_train.pairs.score import judge_provenance, judge_scorer, scorer
from qwen2audio_train.training.stages.policy import load_for_inference
from qwen2audio_train.training.stages.process import process


def run_sample(options: SamplingOptions) -> int:
    for key in ("checkpoint", "manifests", "output"):
        if not getattr(options, key):
            raise ConfigError(f"{key}: no value was given; set {key}=...")
    outcomes: Counter[str] = Counter()
    client = client_of(options.judge, f"{options.output}.judge") if options.score == "judge" else None
    score = judge_scorer(client, outcomes) if client else scorer(options.score)
    questions = read_questions(options.manifests, options.seed)
    loaded = load_for_inference(
        options.checkpoint, samples=options.sample, num_threads=options.num_threads, dtype=options.dtype
    )
    file, failed = answer(loaded.model, loaded.tokenizer, loaded.samples, questions, options)
    if not process().is_main_process:
        return 0
    made = pairs_of_answers(questions, file, failed, score, options, judge_provenance(client) if client else None)
    print("\n".join([f"{options.output}: {made.summary()}", *(f"note: {caveat}" for caveat in loaded.caveats)]))
    if client:
        print(f"judge: {', '.join(f'{name} {count}' for name, count in outcomes.items())}; spent {client.spent:.4f}")
    return 0


def run_rules(options: RuleOptions) -> int:
    for key in ("manifests", "output"):
        if not getattr(options, key):
            raise ConfigError(f"{key}: no value was given; set {key}=...")
    print(f"{options.output}: {pairs_by_rule(options).summary()}")
    return 0


def run_hearing(options: HearingOptions) -> int:
    for key in ("checkpoint", "manifests", "output"):
        if not getattr(options, key):
            raise ConfigError(f"{key}: no value was given; set {key}=...")
    score = scorer(options.score)
    examples = [example for path in options.manifests for example in read_manifest(path)]
    loaded = load_for_inference(
        options.checkpoint, samples=options.sample, num_threads=options.num_threads, dtype=options.dtype
    )
    file = answer_deaf(loaded.model, loaded.tokenizer, loaded.samples, examples, options)
    if process().is_main_process:
        sifted = sift(examples, file, score, options)
        write_sifted(sifted, options.output)
        print(f"{options.output}: {sifted.summary()}")
    return 0


COMMANDS: Commands = {
    "sample": (SamplingOptions, run_sample),
    "rules": (RuleOptions, run_rules),
    "hearing": (HearingOptions, run_hearing),
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line or the data is wrong."""
    return run_command(COMMANDS, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
