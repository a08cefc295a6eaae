"""`launch/evaluate.py judge` as a process, before a server that refuses, babbles and fails, killed and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import LAUNCH
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.evaluation.judging.client import LEDGER
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks
from qwen2audio_train.evaluation.scoring.evaluate import evaluation_of, save
from tests.evaluation.judge_server import Judge, misbehaving_judge

COUNT = 30
EXPECTED = {"scored": 18, "refused": 6, "unparsed": 6}
"""Of every five items one is refused and one is answered without a score; the others are scored."""


def replied(prompt: str) -> str:
    """By the item's number, which its question ends with: a refusal, babble, or the scores of both answers."""
    kind = int(re.search(r"thing (\d+)", prompt)[1]) % 5  # type: ignore[index]
    time.sleep(0.02)
    return {0: "I am sorry, I cannot rate that.", 1: "Both are fine: 8"}.get(kind, "8 6")


@pytest.mark.slow
def test_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    examples, answers = [], []
    for i in range(2 * COUNT):
        source = benchmarks()["airbench_chat_sound" if i < COUNT else "airbench_chat_music"]
        example = source.example(f"e{i}", Clip("a.wav", 1.0), f"a dog {i}", question=f"What is thing {i}?")
        examples.append(example.__class__(**{**vars(example), "meta": {**example.meta, "description": "a dog barks"}}))
        answers.append(f"a cat {i}")
    save(evaluation_of(examples, answers, {}, settings={}), tmp_path)
    with misbehaving_judge(Judge(answer=replied)) as server:
        server.misdeeds += [(500, {}), "drop", "not json", (429, {"Retry-After": "0"}), "truncated", (503, {})] * 2
        command = [sys.executable, str(LAUNCH / "evaluate.py"), "judge", f"evaluation={tmp_path}", "workers=8"]
        command += [f"judge.base_url={server.url}", "judge.model=judge-1", "judge.max_wait_s=0.1", "judge.timeout_s=5"]
        command += ["judge.price_per_million=[10.0,100.0]", "judge.max_cost=100"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
            while len(server.requests) < 60:
                assert first.poll() is None, "not yet done"
                time.sleep(0.005)
            first.send_signal(signal.SIGKILL)
        before = len(server.requests)
        again = subprocess.run(command, check=True, capture_output=True, text=True)
        asked = Counter(request["messages"][0]["content"] for request in server.requests)
        after = len(server.requests)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert len(server.requests) == after, "a third run asks for nothing"
    # Twelve misdeeds are tried again, and so is what was under way when the process was killed: eight workers at most.
    # An item whose first order is refused or unreadable is not asked in the other.
    prompts = 2 * (2 * EXPECTED["scored"] + EXPECTED["refused"] + EXPECTED["unparsed"])
    assert len(asked) == prompts
    assert prompts + 10 <= sum(asked.values()) <= prompts + 12 + 8
    assert before < prompts
    judged = json.loads((tmp_path / "judged.json").read_text())
    for source in ("airbench_chat_sound", "airbench_chat_music"):
        found = judged["sources"][source]
        assert found["outcomes"] == EXPECTED
        assert found["answer"]["n"] == EXPECTED["scored"]
        assert sorted(verdict["id"] for verdict in found["verdicts"]) == sorted(
            example.id for example in examples if example.source == source
        )
        assert (found["answer"]["value"], found["reference"]["value"], found["lead"]) == (7.0, 7.0, 2.0)
    # 100 prompt and 3 completion tokens a reply; one that came in pieces or to nobody is booked at the most it costs.
    ledger = (tmp_path / "judge_cache" / LEDGER).read_text().splitlines()
    spent = sum(json.loads(line)["cost"] for line in ledger)
    price = (10 * 100 + 100 * 3) / 1e6
    assert prompts * price - 1e-9 <= spent <= prompts * price + 20 * 0.02
    assert f"cost so far, in all runs: {spent:.4f}" in again.stdout
    assert done.stdout == again.stdout
    assert re.search(
        r"airbench_chat_sound +7\.00 .* 18 of 30 .* refused 6, scored 18, unparsed 6 +paper 6\.99", again.stdout
    )
