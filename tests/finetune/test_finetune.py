"""A folder and a table are fine-tuned on in one go; a second run does nothing; useless corpora are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from launch.finetune import main
from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.reporting.compare import Comparison
from qwen2audio_train.evaluation.scoring.bootstrap import Difference
from qwen2audio_train.export import export
from qwen2audio_train.finetune import run
from qwen2audio_train.finetune.corpus import prepare
from qwen2audio_train.finetune.outcome import change_of, warnings
from qwen2audio_train.training.chain import Entry, Ledger
from tests.data.storage.test_blobs import write_tar
from tests.evaluation.tiny import SAMPLES, tiny_model, tiny_tokenizer
from tests.launch.scripts import composed, script


def tone(path: Path, hertz: float, number: int) -> None:
    """0.3 s of a tone, no two the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(4_800) / 16_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (hertz + number) * time), 16_000)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class: 12 low tones, 8 high ones."""
    folder = tmp_path_factory.mktemp("tones")
    for name, hertz, count in (("low_tone", 300, 12), ("high_tone", 3000, 8)):
        for number in range(count):
            tone(folder / name / f"{number}.wav", hertz, number)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 15 clips by three speakers, one row without a transcript and one without a file."""
    folder = tmp_path_factory.mktemp("table")
    with (folder / "corpus.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "sentence", "client_id"])
        for number in range(15):
            tone(folder / f"{number}.wav", 500, number)
            rows.writerow([f"{number}.wav", "" if number == 14 else f"the cat sat {number}", f"s{number % 3}"])
        rows.writerow(["gone.wav", "the mat", "s0"])
    return folder / "corpus.csv"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_model(spread=1.0), tiny_tokenizer(), SAMPLES, tmp_path_factory.mktemp("start"))


def prepared(audio: Path, folder: Path, **keys: Any) -> Any:
    return prepare(FinetuneConfig(audio=str(audio), **keys), folder)


def test_a_folder_per_class_asks_for_its_classes(classes: Path, tmp_path: Path) -> None:
    found = prepared(classes, tmp_path)
    assert found.labels == ["high_tone", "low_tone"]
    assert (len(found.train), len(found.held_out)) == (16, 4)
    assert {e.target for e in found.held_out} == {e.target for e in found.train} == {"low tone", "high tone"}
    assert {e.question for e in found.train} == {"Which of these is heard: high tone, low tone?"}
    assert found.held_out[0].meta["choices"] == ["high tone", "low tone"]


def test_a_table_is_read_by_the_usual_names_of_its_columns(table: Path, tmp_path: Path) -> None:
    found = prepared(table, tmp_path, language="en")
    assert (len(found.train) + len(found.held_out), len(found.left_out)) == (14, 2)
    assert {(e.task, e.language) for e in found.train} == {("asr", "en")}
    sides = [{e.meta["speaker"] for e in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {"s0", "s1", "s2"}


def test_a_tar_is_read_by_the_usual_endings_of_its_members(table: Path, tmp_path: Path) -> None:
    clips = {str(number): table.with_name(f"{number}.wav").read_bytes() for number in range(14)}
    for name, told in {"txt": b"the cat", "json": b'{"text": "the cat"}', "cls": b"3"}.items():
        members = {f"{key}.{kind}": data for key, clip in clips.items() for kind, data in (("wav", clip), (name, told))}
        members |= {f"0.{name}": told.replace(b"cat", b"mat").replace(b"3", b"4")}
        found = prepared(write_tar(tmp_path / f"{name}.tar", members), tmp_path / name)
        assert len(found.train) + len(found.held_out) == 14
        assert {example.task for example in found.train} == {"aqa" if name == "cls" else "asr"}


def test_a_corpus_of_which_no_row_is_read_says_why(tmp_path: Path) -> None:
    corpora = {
        b"path,sentence\n1.wav,It\x92s\n": r"no row is read: .*t\.csv:2: expected UTF-8 text",
        b"path,sentence,sentence\n1.wav,a,b\n": 'no row is read: .*"sentence": expected column names of their own',
        b"path,sentence\n": "it holds no rows",
    }
    for content, says in corpora.items():
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            prepared(tmp_path / "t.csv", tmp_path / "data")


def test_a_table_of_both_is_told_which(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    both = table.with_name("both.csv")
    both.write_text("\n".join([f"{lines[0]},label", *(f"{line},{'ab'[i % 2]}" for i, line in enumerate(lines[1:]))]))
    with pytest.raises(ConfigError, match=r"transcripts \(sentence\) and labels \(label\)"):
        prepared(both, tmp_path)
    assert prepared(both, tmp_path, task="ser").labels == ["a", "b"]
    assert prepared(both, tmp_path, columns={"target": "label"}).labels == ["a", "b"]
    assert prepared(both, tmp_path, task="asr").labels == []


def test_what_is_held_out_by_name_is_not_trained_on(classes: Path, tmp_path: Path) -> None:
    """Two of the clips under other names are held out: their copies leave training."""
    for label in ("low_tone", "high_tone"):
        (tmp_path / "test" / label).mkdir(parents=True)
        (tmp_path / "test" / label / "x.wav").write_bytes((classes / label / "3.wav").read_bytes())
    found = prepared(classes, tmp_path / "data", held_out=str(tmp_path / "test"))
    assert (len(found.train), len(found.held_out)) == (18, 2)
    assert not {e.id for e in found.train} & {"low_tone/3.wav", "high_tone/3.wav"}


@pytest.mark.slow
def test_one_command_trains_scores_and_exports(
    classes: Path,
    start: Path,
    noise: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scripts run in this process: starting four of them would take a minute."""

    def here(path: Path, arguments: list[str], ranks: int) -> None:
        assert ranks == 1
        script(path.stem).main(composed(path.stem, *arguments))

    monkeypatch.setattr(run, "run_script", here)
    run_dir = tmp_path / "run"
    keys = [f"audio={classes}", f"run_dir={run_dir}", f"init_from={start}", "max_steps=3", "max_new_tokens=6"]
    keys += [f"guard={noise / 'sound.jsonl'}", f"replay={noise / 'speech.jsonl'}", "num_threads=1"]
    keys += ['overrides=["trainer.use_cpu=true","tracker=off"]']
    assert main(keys) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    for when in ("before", "after"):
        score = summary[when]["accuracy"]
        assert score["n"] == 4
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
    texts = [json.loads(line) for line in (run_dir / "after" / "texts.jsonl").read_text().splitlines()]
    own = [one for one in texts if one["source"] == "finetune"]
    assert summary["after"]["accuracy"]["value"] == sum(one["text"] == one["reference"] for one in own) / 4
    assert {len(texts) - len(own)} == {one["after"]["n"] for one in summary["guard"].values()} == {12}
    assert (summary["steps"], summary["clips"]["train"]) == (3, 16)
    card = (run_dir / "export" / "README.md").read_text()
    assert f"audio={classes}" in card
    assert "accuracy" in card
    assert card.count("## Before and after") == 1
    assert "- **sft**: 3 steps; from `" in card
    assert (run_dir / "report.html").is_file()
    Qwen2AudioForConditionalGeneration.from_pretrained(run_dir / "export")
    AutoProcessor.from_pretrained(run_dir / "export")
    assert "nothing to do" not in capfd.readouterr().out
    log = (run_dir / "training" / "log.jsonl").read_text()
    assert main(keys) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert (run_dir / "training" / "log.jsonl").read_text() == log
    with pytest.raises(SystemExit):
        main([*keys, "max_steps=4"])
    assert "keys have changed" in capfd.readouterr().err


def test_it_goes_on_at_the_step_that_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def broken_off(script: Path, arguments: list[str], ranks: int) -> None:
        called.append(script.stem)
        if called == ["evaluate", "sft"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_script", broken_off)

    def go(*keys: str) -> list[bool]:
        ledger = Ledger(tmp_path / "ledger.json")
        steps = (("before", "evaluate"), ("training", "sft"))
        return [run.run_once(ledger, name, Path(f"{script}.py"), [*keys], "data", 1) for name, script in steps]

    with pytest.raises(KeyboardInterrupt):
        go("a=1")
    assert go("a=1") == [False, True]
    assert go("a=1") == [False, False]
    assert called == ["evaluate", "sft", "sft"]
    with pytest.raises(ConfigError, match="keys have changed"):
        go("a=2")


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", -1), ("wer", 1)])
def test_a_guard_that_drops_beyond_its_interval_is_told(metric: str, sign: int) -> None:
    def told(low: float, high: float) -> bool:
        low, high = sorted((sign * low, sign * high))
        change = Comparison("g", "sec", None, metric, 9, Difference((low + high) / 2, low, high, 0.5))
        found = change_of(change)
        assert found["interval"] == [low, high]
        return bool(warnings({"change": {}, "guard": {"g": {"change": found}}}))

    assert told(0.1, 0.3)
    assert not told(-0.1, 0.3)
    assert not told(-0.3, -0.1)


def refusal(capsys: pytest.CaptureFixture[str], *keys: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(keys)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_refusals(classes: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"run_dir={tmp_path / 'run'}", f"init_from={start}"]
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(capsys, f"audio={tmp_path / 'empty'}", *place)
    assert "one class only (low_tone)" in refusal(capsys, f"audio={classes / 'low_tone'}", *place)
    assert "no checkpoint to start from" in refusal(
        capsys, f"audio={classes}", f"run_dir={tmp_path}", f"init_from={tmp_path}/no"
    )
    for name, count in (("few", 3), ("broken", 12)):
        for label in ("a", "b"):
            for number in range(count):
                clip = tmp_path / name / label / f"{number}.wav"
                tone(clip, 300 if label == "a" else 600, number)
                if name == "broken":
                    clip.write_bytes(b"no audio")
    assert "6 usable clips, expected 10 or more" in refusal(capsys, f"audio={tmp_path / 'few'}", *place)
    assert "24 bad rows" in refusal(capsys, f"audio={tmp_path / 'broken'}", *place)
    (tmp_path / "silent.csv").write_text("audio,note\na.wav,x\n")
    assert "columns.target" in refusal(capsys, f"audio={tmp_path / 'silent.csv'}", *place)


def test_changed_audio_is_not_mixed_with_a_run_that_has_begun(classes: Path, tmp_path: Path) -> None:
    found = prepared(classes, tmp_path)
    ledger = Ledger(tmp_path / "ledger.json")
    run.write_data(found, tmp_path, ledger)
    assert len(read_manifest(tmp_path / "train.jsonl")) == 16
    ledger.entries["before"] = Entry("digest")
    with pytest.raises(ConfigError, match="changed since"):
        run.write_data(prepared(classes, tmp_path, seed=1), tmp_path, ledger)
