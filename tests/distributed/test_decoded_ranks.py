"""Held-out examples decoded while two ranks train under ZeRO-3: every answer once, and that of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.reporting.results import TEXTS
from qwen2audio_train.training.stages.policy import load_for_inference
from tests.distributed.ranks import run_ranks
from tests.distributed.train_worker import Job, as_json


@pytest.mark.slow
def test_the_answers_under_zero_3_are_those_of_the_checkpoint_on_one_rank(noise: Path, tmp_path: Path) -> None:
    overrides = (
        *("deepspeed.stage=3", "deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0"),
        *(f"decoded.manifests.dev={noise}/speech.jsonl", "decoded.max_examples=5", "decoded.max_new_tokens=4"),
        *("decoded.budget_s=60", "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.max_steps=2"),
    )
    job = Job("run", overrides, ("speech",))
    run_ranks("tests.distributed.train_worker", noise, tmp_path, as_json([job]))
    run = tmp_path / "run"
    written = [json.loads(line) for line in (run / "decoded" / "step-2" / TEXTS).read_text().splitlines()]
    assert len({record["id"] for record in written}) == len(written) == 5
    logged = [line for line in map(json.loads, (run / "log.jsonl").open()) if "eval_decoded/examples" in line]
    assert [(line["step"], line["eval_decoded/examples"]) for line in logged] == [(2, 5)]

    loaded = load_for_inference(str(run / "checkpoint-2"))
    known = {example.id: example for example in read_manifest(noise / "speech.jsonl")}
    prompts = LazySamples(
        [known[record["id"]] for record in written], loaded.tokenizer, loaded.samples, for_generation=True
    )
    alone = generate_texts(loaded.model, loaded.tokenizer, prompts, Decoding(max_new_tokens=4), prompts.lengths)
    assert [record["text"] for record in written] == alone
