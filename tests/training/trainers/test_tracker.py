"""Weights & Biases, offline: the environment's mode, one run over a resume, stages in one group."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from transformers import TrainerControl, TrainerState

from qwen2audio_train.config.tracker import TrackerConfig, WandbMode
from qwen2audio_train.errors import UserError
from qwen2audio_train.training.trainers.tracker import Wandb, wandb_mode
from tests.runs import logged, recipe, train


@pytest.mark.parametrize(
    ("chosen", "environment", "expected"),
    [
        ("auto", {}, "off"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
        ("off", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, "off"),
    ],
)
def test_the_environment_decides_what_the_recipe_leaves_open(
    chosen: str, environment: dict[str, str], expected: str
) -> None:
    assert wandb_mode(TrackerConfig(wandb=WandbMode(chosen)), environment).value == expected


def written(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes of its own, a log as LevelDB's, in blocks of 32 KiB."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no room for a head: zeros up to the next block
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def records(file: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What an offline run has written: its description, and its lines."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, lines = None, []
    for data in written(file):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = record.history.item
            lines.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return run, lines


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    run_dir = tmp_path / "run"
    chosen = ["trainer.save_strategy=steps", "trainer.save_steps=2", "tracker.wandb=auto", "tracker.group=demo"]
    config = recipe(noise, run_dir, *chosen)
    train(config)
    wandb.finish()  # as the end of a process does: until then its service has not written all of the file
    shutil.rmtree(run_dir / "checkpoint-4")
    train(config)
    wandb.finish()
    files = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    (first, lines), (second, more) = map(records, sorted(files, key=lambda path: path.stat().st_mtime))
    assert first.run_id == second.run_id
    assert (first.run_group, first.job_type, first.project) == ("demo", "pretrain", "qwen2audio-train")
    losses, again = ([line["loss"] for line in part if "loss" in line] for part in (lines, more))
    assert len(losses) == 4
    assert again == losses[2:]
    assert losses == [loss for (loss,) in logged(config, "loss")]


def test_a_tracker_that_cannot_be_reached_says_what_to_do(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"tracker\.wandb=online: .*no route to host.*WANDB_MODE=offline"):
        train(recipe(noise, tmp_path, "tracker.wandb=online"))


def test_a_start_from_the_beginning_is_another_run(tmp_path: Path) -> None:
    tracker = Wandb(recipe(tmp_path, tmp_path), {}, WandbMode.offline)
    first = tracker._run_id(goes_on=False)
    assert tracker._run_id(goes_on=True) == first
    assert tracker._run_id(goes_on=False) != first


def test_decoded_answers_are_shown_with_their_audio(noise: Path, tmp_path: Path) -> None:
    logged_values: list[Any] = []
    tracker = Wandb(recipe(noise, tmp_path, "decoded.shown=2"), {}, WandbMode.offline)
    tracker.run = SimpleNamespace(log=lambda values, step: logged_values.append((values, step)))

    def call() -> None:
        tracker.on_evaluate(None, TrainerState(global_step=3), TrainerControl())  # type: ignore[arg-type]

    call()
    assert logged_values == [], "nothing was decoded at this step"
    clips = [{"path": str(path), "duration_s": None} for path in sorted(noise.rglob("*.wav"))[:3]]
    lines = [{"source": "dev", "reference": "a", "text": f"b{i}", "clips": [clip]} for i, clip in enumerate(clips)]
    (tmp_path / "decoded" / "step-3").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "decoded" / "step-3" / "texts.jsonl").write_text(text)
    call()
    ((values, step),) = logged_values
    assert step == 3
    rows = values["decoded/answers"].data
    assert [row[:3] for row in rows] == [["dev", "a", "b0"], ["dev", "a", "b1"]]
    assert all(type(row[3]).__name__ == "Audio" for row in rows)
