"""States that an earlier version saved still resume: the same inputs, and the steps that would have followed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.loading.build import build_batches
from tests.data.corpora import small_config

STATES = Path(__file__).parent / "states"
"""Made with version 0.1.0 after the fifth step over the corpora below, with the digests of the three steps after it."""


@pytest.mark.parametrize("kind", ["indexed", "streaming"])
def test_a_state_of_an_earlier_version_goes_on(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = {}
    for name, number, weight in (("a", 40, 2.0), ("b", 25, 1.0)):
        turns = [
            [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world " * (1 + i % 7)}]
            for i in range(number)
        ]
        lines = [json.dumps({"id": f"{name}{i}", "messages": messages}) for i, messages in enumerate(turns)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        sources[name] = SourceConfig([str(tmp_path / f"{name}.jsonl")], weight=weight, streaming=kind == "streaming")
    saved = json.loads((STATES / f"{kind}.json").read_text())
    loader = build_batches(small_config(tmp_path, sources, tokens_per_pack=200), tokenizer)
    assert loader.inputs == saved["state"]["inputs"]
    loader.load_state_dict(saved["state"])
    assert loader.state_dict() == saved["state"]
    batches = iter(loader)
    steps = [[next(batches)["target"].tolist() for _ in range(loader.batches_per_step)] for _ in range(3)]
    assert [hashlib.sha256(json.dumps(step).encode()).hexdigest() for step in steps] == saved["next_steps"]
