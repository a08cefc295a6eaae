"""Every task: what its prompts, its tags and its answers look like, and that the model is trained on all of them.

`rendered_tasks.txt` is that, for a reader; after a wanted change: python -m tests.data.prompts.test_tasks
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import PromptStyle, Timestamps
from qwen2audio_train.data.examples import Span, TaskExample, clips_of
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_record, read_manifest
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.prompts import pools
from qwen2audio_train.data.prompts.render import render, rendered_text
from qwen2audio_train.data.prompts.timestamps import as_text, decode, spans_in, timestamp_tokens, written
from qwen2audio_train.data.prompts.tokenize import tokenize
from qwen2audio_train.data.prompts.tokenizer import of_family, train_tokenizer
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.scoring.items import OPEN_TASKS, TASK_METRICS
from tests.runs import logged, recipe, train

SAMPLES = Path(__file__).parents[3] / "data_manifests" / "samples" / "task.jsonl"
SNAPSHOT = Path(__file__).parent / "rendered_tasks.txt"


def samples() -> dict[str, TaskExample]:
    """The first line of every task in the sample manifest."""
    found: dict[str, TaskExample] = {}
    for example in read_manifest(SAMPLES):
        assert isinstance(example, TaskExample)
        found.setdefault(example.task, example)
    return found


def shown(example: TaskExample, **options: Any) -> str:
    text = rendered_text(render(example, **options))
    return text.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "[clip]").replace("<|endoftext|>", "[end]")


def snapshot() -> Iterator[str]:
    """All prompts of all tasks as training has them, the prompt of evaluation, the tags, and times as tokens."""
    for task, example in samples().items():
        yield f"{task} - {pools.describe_tasks()[task]} - {pools.metric_names()[task]}\n"
        texts = {shown(example, seed=seed) for seed in range(64)}
        yield from (f"  {text}\n" for text in sorted(texts))
        yield f"  asked: {shown(example, for_generation=True)}\n"
        yield f"  tags:  {shown(example, prompt_style=PromptStyle.hierarchical_tags)}\n"
        if example.spans:
            yield f"  times: {shown(example, timestamps=Timestamps.tokens)}\n"


def test_every_task_looks_as_it_was_reviewed() -> None:
    assert set(samples()) == set(pools.task_names())
    assert len(samples()) == 35
    assert "".join(snapshot()) == SNAPSHOT.read_text(encoding="utf-8")


def test_every_prompt_of_a_pool_is_in_the_snapshot() -> None:
    text = SNAPSHOT.read_text(encoding="utf-8")
    for example in samples().values():
        fields = pools.prompt_fields(example)
        for template in pools._pools()[example.task].prompts:
            if template.fields <= fields.keys():
                assert template.prompt.format(**fields) in text


def test_the_pools_name_the_metrics_that_evaluation_has() -> None:
    for task, metric in pools.metric_names().items():
        if task in OPEN_TASKS:
            assert metric not in ("accuracy", "error_rate", "bleu"), task
        else:
            assert metric == TASK_METRICS.get(task, "accuracy"), task


def test_a_line_of_every_task_survives_being_written(tmp_path: Path) -> None:
    for example in samples().values():
        line = to_record(example, SAMPLES.parent)
        assert parse_record(line, str(SAMPLES), 1) == example


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spans": [[0.5, 0.4, "a"]]}, r'"spans\[0\]": expected \[start_s, end_s, text\]'),
        ({"spans": [[0.5, 0.7, "a<b"]]}, "a text without < and >"),
        ({"spans": [[0.5, 0.7, "a"], [0.1, 0.2, "b"]]}, r"in the order of their starts, found 0.1 s after 0.5 s"),
        ({"spans": [[0.5, 1.7, "a"]]}, "within the clip's 1 s, found 1.7 s"),
        ({"spans": [[True, 0.7, "a"]]}, "start_s"),
        ({"spans": [[0.1, 0.7, "a"]], "target": "a"}, '"target": expected no such key beside spans'),
        ({"target": "a"}, '"spans": expected a value, which every prompt of the task "srwt" needs'),
        ({"task": "sv", "target": "yes"}, "a list of 2 recordings"),
        ({"task": "asr", "target": "a", "audio": ["a.wav", "b.wav"]}, "a path, or an object with path"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], complaint: str) -> None:
    line = {"id": "a", "audio": "a.wav", "duration_s": 1.0, "task": "srwt", **change}
    with pytest.raises(ManifestError, match=complaint):
        parse_record(line, "m.jsonl", 1)


def test_times_are_written_and_read_again_in_both_forms() -> None:
    spans = (Span(0.0, 0.604, "good"), Span(0.61, 12.3, "New York"))
    assert written(spans) == "<0.00>good<0.60> <0.61>New York<12.30>"
    assert spans_in(written(spans)) == [Span(0.0, 0.6, "good"), Span(0.61, 12.3, "New York")]
    tokens = "<|0.00|>good<|0.60|><|0.61|>New York<|12.30|>"
    assert as_text(tokens) == written(spans)
    assert spans_in(tokens) == spans_in(written(spans))
    assert (len(timestamp_tokens()), timestamp_tokens()[-1]) == (3001, "<|30.00|>")


@pytest.fixture(scope="module")
def timed() -> PreTrainedTokenizerFast:
    return train_tokenizer(["good morning"], 3600, times=timestamp_tokens())


def test_a_time_is_one_token_and_decoding_keeps_it(timed: PreTrainedTokenizerFast) -> None:
    example = samples()["srwt"]
    tokens = tokenize(render(example, timestamps=Timestamps.tokens), timed, [24_000])
    answer = tokens.input_ids[tokens.label_mask].tolist()
    assert sum(timed.convert_tokens_to_ids(t) in answer for t in ("<|0.32|>", "<|0.61|>", "<|1.10|>")) == 3
    assert decode(timed, [answer]) == [example.target] == ["<0.32>good<0.61> <0.61>morning<1.10>"]
    special = of_family(train_tokenizer(["good morning"], 600), tags=timestamp_tokens())  # as in released ones
    answer = special("<|0.32|>good<|0.61|><|endoftext|>")["input_ids"]
    assert special.batch_decode([answer], skip_special_tokens=True) == ["good"]
    assert decode(special, [answer]) == ["<0.32>good<0.61>"]


def test_a_time_beyond_the_last_token_costs_its_example() -> None:
    line = {"id": "a", "audio": "a.wav", "duration_s": 40.0, "task": "srwt", "spans": [[31.0, 31.5, "late"]]}
    example = parse_record(line, "m.jsonl", 1)
    assert "<31.00>late<31.50>" in rendered_text(render(example))
    with pytest.raises(ExampleError, match=r"a span ends at 31\.5 s, and there are tokens for times up to 30 s"):
        render(example, timestamps=Timestamps.tokens)


@pytest.mark.parametrize("style", ["natural", "hierarchical_tags"])
def test_a_run_over_all_tasks(style: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number, example in enumerate(samples().values()):
        line = to_record(example, SAMPLES.parent)
        names = [f"{number}-{i}.wav" for i in range(len(clips_of(example)))]
        for name in names:  # clips of one length, so that their times fit and the run is short
            soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(8_000), 16_000)
        line["audio"] = names if len(names) > 1 else names[0]
        line.pop("duration_s", None)
        if "spans" in line:
            line["spans"] = [[start / 100, end / 100, text] for start, end, text in line["spans"]]
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "tasks.jsonl").write_text("".join(lines), encoding="utf-8")
    config = recipe(
        tmp_path, tmp_path / "run", f"data.prompt_style={style}", "model.vocab_size=3800", "data.timestamps=tokens",
        "data.tokens_per_pack=400", "data.max_bad_examples=0", "trainer.max_steps=3", sources=["tasks"],
    )  # fmt: skip
    assert train(config).state.global_step == 3
    losses = logged(config, "loss")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    SNAPSHOT.write_text("".join(snapshot()), encoding="utf-8")
