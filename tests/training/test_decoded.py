"""Held-out examples that a stage decodes while it trains: figures, files, budget, the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.training.stages import decoded
from qwen2audio_train.training.stages.arguments import training_arguments
from tests.runs import pairs_recipe, recipe, train

WER = "eval_decoded/wer/speech"


def decoding(noise: Path, run_dir: Path, *others: str, make: Any = recipe) -> Any:
    own = [f"decoded.manifests.dev={noise}/speech.jsonl", "decoded.max_examples=5", "decoded.max_new_tokens=4"]
    return make(noise, run_dir, *own, "trainer.eval_strategy=steps", "trainer.eval_steps=1", *others)


def test_every_evaluation_decodes_and_scores(noise: Path, tmp_path: Path) -> None:
    adapter = ["adapter.kind=lora", "adapter.r=2"]
    best = ["trainer.save_strategy=best", f"trainer.metric_for_best_model={WER}", "trainer.greater_is_better=false"]
    trainer = train(decoding(noise, tmp_path, "trainer.max_steps=2", *adapter, *best))
    logged = [line for line in map(json.loads, (tmp_path / "log.jsonl").open()) if WER in line]
    assert [line["step"] for line in logged] == [1, 2]
    for line in logged:
        assert line["eval_decoded/examples"] == 5
        found = read_result("dev", tmp_path / "decoded" / f"step-{line['step']}")
        (row,) = [row for row in found.rows if row.score.metric == "wer"]
        assert (row.score.value, row.score.n) == (line[WER], 5)
    assert trainer.state.best_metric == min(line[WER] for line in logged)


def test_examples_that_fit_into_the_budget(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))  # 10 s for the examples that are measured
    monkeypatch.setattr(decoded.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(decoded, "MEASURED", 2)
    monkeypatch.setattr(decoded.HeldOutDecoding, "_evaluated", lambda self, model, count: None)
    chosen = decoded.held_out_decoding(decoding(noise, tmp_path, "decoded.budget_s=20"), None)  # type: ignore[arg-type]
    assert chosen is not None
    assert chosen._measured(None) == 4
    tight = decoded.held_out_decoding(decoding(noise, tmp_path, "decoded.budget_s=1"), None)  # type: ignore[arg-type]
    assert tight is not None
    assert tight._measured(None) == 2, "what was measured is taken in any case"


def test_the_first_examples_are_of_all_sources() -> None:
    from qwen2audio_train.data.examples import Clip, TaskExample

    clip = Clip("a.wav", 1.0)
    examples = [TaskExample(f"{s}{i}", clip, "asr", "en", "a", s) for s in "ab" for i in range(3)]
    assert [e.id for e in decoded.in_turn(examples)] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [e.id for e in decoded.some_of_each(examples, 2)] == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(
    ("others", "make", "says"),
    [
        (["trainer.eval_strategy=no"], recipe, "decoded.manifests: nothing is evaluated"),
        ([], pairs_recipe, "decoded.manifests and stage=dpo: only pretrain and sft"),
    ],
)
def test_what_would_never_be_decoded_is_refused(
    others: list[str], make: Any, says: str, noise: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        decoding(noise, tmp_path, *others, make=make)


def test_a_manifest_that_is_not_there_is_named(noise: Path, tmp_path: Path) -> None:
    config = decoding(noise, tmp_path, "decoded.manifests.dev=/nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"decoded\.manifests\.dev=/nowhere\.jsonl: no such file"):
        decoded.held_out_decoding(config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("figure", [WER, "decoded/cer/x", "eval_loss/speech"])
def test_the_lower_the_better_has_to_be_said(figure: str, noise: Path, tmp_path: Path) -> None:
    best = ["trainer.save_strategy=best", f"trainer.metric_for_best_model={figure}"]
    with pytest.raises(ConfigError, match=r"set trainer\.greater_is_better=false"):
        training_arguments(decoding(noise, tmp_path, *best))
