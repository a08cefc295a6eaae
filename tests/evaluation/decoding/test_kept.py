"""An evaluation that was broken off goes on after what it had, and ends with the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.evaluation.decoding import generate
from tests.evaluation.decoding.kept_worker import evaluated
from tests.evaluation.tiny import noise, tiny_model

FILES = ("texts.jsonl", "table.txt")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(7):
        soundfile.write(folder / f"{i}.wav", noise(rng, 0.2 + 0.13 * i), 16_000)
    return folder


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    evaluated(clips, folder, 24)
    return folder


def decoded(monkeypatch, break_at=None):
    """How many prompts are decoded from now on; the batch with number `break_at` is not."""
    counts, plain = [], generate._decode_batch

    def counting(model, tokenizer, samples, *rest):
        if len(counts) == break_at:
            raise KeyboardInterrupt
        counts.append(len(samples))
        return plain(model, tokenizer, samples, *rest)

    monkeypatch.setattr(generate, "_decode_batch", counting)
    return counts


def same(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_what_was_answered_is_not_decoded_again(clips, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        decoded(patch, break_at=3)
        with pytest.raises(KeyboardInterrupt):
            evaluated(clips, tmp_path, 24)
    path = tmp_path / "answers.0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # cut off in the middle of a line
    path.rename(tmp_path / "answers.3.jsonl")  # as if by a rank that there is no longer
    counts = decoded(monkeypatch)
    evaluated(clips, tmp_path, 24)
    assert 0 < sum(counts) < 24
    assert same(tmp_path, whole)
    del counts[:]
    evaluated(clips, tmp_path, 24)
    assert counts == []
    assert same(tmp_path, whole)


def test_other_weights_examples_or_recordings_are_decoded(clips, tmp_path, monkeypatch):
    counts = decoded(monkeypatch)

    def new(count=5):
        del counts[:]
        evaluated(clips, tmp_path, count)
        return sum(counts)

    assert (new(), new()) == (5, 0)
    assert new(7) >= 2, "two more examples, and what shares a batch with them"
    os.utime(clips / "0.wav", (1, 1))
    assert (new() > 0, new()) == (True, 0)
    monkeypatch.setattr("tests.evaluation.decoding.kept_worker.ending_model", lambda: tiny_model(seed=1))
    assert (new(), new()) == (5, 0)


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_files(clips, whole, tmp_path):
    command = [sys.executable, "-m", "tests.evaluation.decoding.kept_worker", str(clips), str(tmp_path), "24"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers = tmp_path / "answers.0.jsonl"
    while process.poll() is None and (not answers.is_file() or answers.stat().st_size < 200):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(answers.read_text().splitlines())
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert same(tmp_path, whole)
    keys = [json.loads(line)["key"] for line in answers.read_text().splitlines() if line]
    assert len(set(keys)) == 24
