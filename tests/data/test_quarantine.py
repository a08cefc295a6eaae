"""Whose fault an error is: the example's costs that example, the program's stops the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.quarantine import BadExample, Quarantine, TooManyBadExamples, costing_one_example
from qwen2audio_train.data.samples import maker
from qwen2audio_train.data.storage.remote import RemoteError
from tests.data.corpora import small_config, two_sources

OF_THE_EXAMPLE = [AudioError("a.wav", "cut off"), ManifestError("m", 1, "id", "x", "y"), RemoteError("404"), OSError(5)]
OF_THE_PROGRAM = [AttributeError("nope"), KeyError("x"), ValueError("x"), RuntimeError("x"), AssertionError()]


@pytest.mark.parametrize("error", OF_THE_EXAMPLE, ids=lambda error: type(error).__name__)
def test_an_error_of_the_example_costs_it_alone(error: Exception) -> None:
    bad: list[BadExample] = []
    with costing_one_example(bad, "a#3", "a", line=4) as suspect:
        suspect.example = "utt-3"
        raise error
    assert bad == [BadExample("utt-3", type(error).__name__, str(error), "a", 4)]


@pytest.mark.parametrize("error", OF_THE_PROGRAM, ids=lambda error: type(error).__name__)
def test_an_error_of_the_program_goes_on_with_the_id(error: Exception) -> None:
    bad: list[BadExample] = []
    with pytest.raises(type(error)) as caught, costing_one_example(bad, "utt-3", "a"):
        raise error
    assert (caught.value, bad) == (error, [])
    assert caught.value.__notes__ == ['raised while example "utt-3" of source "a" was worked on']


@pytest.mark.parametrize("fault", ["measure", "materialise"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_slip_of_the_program_stops_every_loader(
    fault: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(*_: Any, **__: Any) -> Any:
        raise AttributeError("'numpy.ndarray' object has no attribute 'nope'")

    monkeypatch.setattr(maker.Maker if fault == "measure" else maker, fault, slip)
    sources = two_sources(tmp_path, 12, 12)
    if streaming:
        sources = {name: dataclasses.replace(source, streaming=True) for name, source in sources.items()}
    with pytest.raises(AttributeError, match="nope") as caught:
        next(iter(build_batches(small_config(tmp_path, sources, max_bad_share=1.0), tokenizer)))
    assert any('while example "' in note for note in caught.value.__notes__)


def test_the_screen_tells_of_the_first_and_of_each_doubling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quarantine = Quarantine(tmp_path / "bad.jsonl", None, 1.0, shown=True)
    said = []
    for number in range(9):
        kind = "AudioError" if number % 3 else "ManifestError"
        quarantine.add(10, [BadExample(f"u{number}", kind, "cut off")])
        if text := capsys.readouterr().err:
            said.append((number + 1, text))
    assert [number for number, _ in said] == [1, 2, 4, 8]
    assert said[3][1] == (
        "data: 8 of 80 examples could not be used so far, 5 of them for AudioError; the last: u7: cut off; the list is "
        f"{tmp_path}/bad.jsonl\n"
    )
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 9
    Quarantine(None, None, 1.0).add(1, [BadExample("u", "AudioError", "cut off")])
    assert capsys.readouterr().err == ""


def test_the_share_is_judged_from_the_first_hundred_on(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "bad.jsonl", None, 0.01)
    bad = BadExample("u", "AudioError", "cut off")
    quarantine.add(97, [bad] * 5)
    with pytest.raises(TooManyBadExamples, match=r"6 of 100 .*max_bad_share=0\.01 allows; all are .*bad\.jsonl"):
        quarantine.add(3, [bad])
    assert [json.loads(line)["example"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == ["u"] * 6
