"""Score a checkpoint on held-out manifests, compare two evaluations, have one judged, or score what others answer.

    torchrun launch/evaluate.py checkpoint=runs/mine manifests.dev=dev.jsonl
    python   launch/evaluate.py compare first=runs/base/evaluation second=runs/mine/evaluation
    python   launch/evaluate.py judge evaluation=runs/mine/evaluation judge.base_url=https://... judge.model=...
    python   launch/evaluate.py api manifests.dev=dev.jsonl output_dir=scores api.base_url=https://... api.model=...
    python   launch/evaluate.py vllm checkpoint=exported manifests.dev=dev.jsonl output_dir=scores
    torchrun launch/evaluate.py transformers model=openai/whisper-base manifests.dev=dev.jsonl output_dir=scores

Without a command the keys are those of recipes/evaluate.yaml; those of the commands are the fields of CompareOptions,
JudgeOptions, ApiOptions, VllmOptions and TransformersOptions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen2audio_train.cli.commands import Commands, run_command
from qwen2audio_train.cli.compose import launch
from qwen2audio_train.cli.door import check_file
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.config.tools import EvaluateConfig
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.backends.api import ApiOptions, evaluate_api
from qwen2audio_train.evaluation.backends.transformers import TransformersOptions, evaluate_transformers
from qwen2audio_train.evaluation.backends.vllm import VllmOptions, evaluate_vllm
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.judging.judge import JudgeOptions, judge_evaluation, judgement_table
from qwen2audio_train.evaluation.reporting.compare import CompareOptions, compare, comparison_table
from qwen2audio_train.evaluation.reporting.stage_record import save_stage
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, evaluate, save, table
from qwen2audio_train.evaluation.scoring.likelihood import PairScores, score_pairs
from qwen2audio_train.training.stages.decoded import some_of_each
from qwen2audio_train.training.stages.policy import load_for_inference
from qwen2audio_train.training.stages.process import process


def main(config: EvaluateConfig) -> None:
    check_files(config)
    loaded = load_for_inference(
        config.checkpoint, samples=config.sample, num_threads=config.num_threads, dtype=config.dtype
    )
    model, tokenizer, samples = loaded.model, loaded.tokenizer, loaded.samples
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens,
        tokens_per_batch=config.tokens_per_batch,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    drawn: dict[str, Any] = {"seed": config.seed, "bootstrap_samples": config.bootstrap_samples}
    seen = [example for path in config.train_manifests for example in read_manifest(path)]
    found = [example for path in config.manifests.values() for example in read_manifest(path)]
    examples = some_of_each(found, config.max_examples)
    asked: dict[str, Any] = {"decoding": decoding, "label_likelihood": config.label_likelihood, **drawn}
    asked["keep_in"] = config.output_dir
    result = evaluate(model, tokenizer, examples, samples, train_examples=seen, **asked)
    rows = list(result.rows)
    for heard in ("silence", "swapped") if config.listening else ():
        deaf = evaluate(model, tokenizer, examples, samples, **{**asked, "audio": heard, "label_likelihood": False})
        rows += [replace(row, kind=heard, published={}) for row in deaf.rows if not row.kind]
    sources = list(dict.fromkeys(row.source for row in rows))
    rows.sort(key=lambda row: sources.index(row.source))
    result = replace(result, rows=tuple(rows), caveats=(*loaded.caveats, *result.caveats))
    pairs: dict[str, PairScores] = {}
    if config.pairs:
        preferences: Any = some_of_each(read_manifest(config.pairs), config.max_examples)
        for audio in ("own", "swapped", "silence"):
            pairs[audio] = score_pairs(model, tokenizer, preferences, samples, audio=audio, **drawn)
    if process().is_main_process:
        save(result, config.output_dir)
        save_stage(result, pairs, config.output_dir)
        print("\n".join([table(result.rows), *(f"note: {caveat}" for caveat in result.caveats)]))
        for audio, pair in pairs.items():
            print(f"pair accuracy with {audio} audio: {pair.accuracy.value:.1%} of {pair.accuracy.n}")


def check_files(config: EvaluateConfig) -> None:
    """Raises ConfigError when there is nothing to score, or one of the manifests is not there."""
    if not config.manifests and config.pairs is None:
        raise ConfigError("manifests: empty; name what to score: manifests.NAME=FILE, or pairs=FILE")
    for name, path in config.manifests.items():
        check_file(f"manifests.{name}", path)
    for path in config.train_manifests:
        check_file("train_manifests", path)
    if config.pairs is not None:
        check_file("pairs", config.pairs)


def run_compare(options: CompareOptions) -> int:
    for key in ("first", "second"):
        if not getattr(options, key):
            raise ConfigError(f"{key}: no value was given; set {key}=... to the output_dir of an evaluation")
    found = compare(options.first, options.second, bootstrap_samples=options.bootstrap_samples, seed=options.seed)
    print(comparison_table(found))
    if options.output is not None:
        Path(options.output).write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")
    return 0


def run_judge(options: JudgeOptions) -> int:
    print(judgement_table(judge_evaluation(options)))
    return 0


def run_api(options: ApiOptions) -> int:
    return shown(evaluate_api(options))


def run_vllm(options: VllmOptions) -> int:
    return shown(evaluate_vllm(options))


def run_transformers(options: TransformersOptions) -> int:
    main_rank = process().is_main_process
    found = evaluate_transformers(options)
    return shown(found) if main_rank else 0


def shown(found: Evaluation) -> int:
    """Print a backend's scores; the exit status is 1 where examples have no answer."""
    print("\n".join([table(found.rows), *(f"note: {caveat}" for caveat in found.caveats)]))
    for name, reason in found.failed.items():
        print(f"left out: {name}: {reason}")
    return int(bool(found.failed))


COMMANDS: Commands = {
    "compare": (CompareOptions, run_compare),
    "judge": (JudgeOptions, run_judge),
    "api": (ApiOptions, run_api),
    "vllm": (VllmOptions, run_vllm),
    "transformers": (TransformersOptions, run_transformers),
}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(run_command(COMMANDS, __doc__, sys.argv[1:]))
    launch(main, "evaluate", EvaluateConfig)
