"""The commands of launch/data.py, through its own door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from tests.launch.scripts import script


@pytest.fixture
def run() -> Callable[..., int]:
    """run("check", "manifests=[a.jsonl]") -> exit status."""

    def call(*arguments: str) -> int:
        try:
            status: int = script("data").main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0)
        return status

    return call


def test_from_a_table_to_a_look_at_an_example(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).normal(size=16_000), 16_000)
    table, mapping, manifest = tmp_path / "t.csv", tmp_path / "map.yaml", tmp_path / "m.jsonl"
    table.write_text("id,path,text,broken\nu1,a.wav,hello,\n")
    mapping.write_text("columns: {id: id, audio: path, target: text}\nconstants: {task: asr, language: de}\n")
    paths = (f"input={table}", f"output={manifest}")
    assert run("convert", str(mapping), *paths, "constants.language=en") == 0
    assert "1 examples, 0 rows left out" in capsys.readouterr().out
    assert json.loads(manifest.read_text()) == {
        "id": "u1",
        "source": "m",
        "audio": "a.wav",
        "duration_s": 1.0,
        "task": "asr",
        "language": "en",
        "target": "hello",
    }
    report = tmp_path / "report.json"
    assert run("check", f"manifests=[{manifest}]", f"against=[{manifest}]", f"report={report}") == 1
    assert "contamination" in capsys.readouterr().out
    assert [item["kind"] for item in json.loads(report.read_text())] == ["contamination"]
    assert run("check", f"manifests=[{manifest}]") == 0
    assert run("chat", f"manifests=[{manifest}]", f"output={tmp_path / 'chat.jsonl'}") == 0
    assert "chat.jsonl: 1 conversations" in capsys.readouterr().out
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"][1]["content"][0]["text"] == "hello"
    assert run("show", f"manifest={manifest}") == 0
    assert "[[hello<|endoftext|>]]" in capsys.readouterr().out.replace("[[<|en|>", "[[")
    assert run("convert", str(mapping), *paths, "columns.target=broken") == 1
    assert "nothing was written: 1 bad rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chek"], "chek: no such command; did you mean check?"),
        (["check"], "manifests: no value was given"),
        (["convert", "nowhere.yaml"], "nowhere.yaml: no such file (looked in /"),
        (["chat", "output=o.jsonl"], "manifests: no value was given"),
        (["check", "manifest=[a]"], "manifest: unknown key; did you mean manifests?"),
        (["show"], "manifest: no value was given"),
        (["show", "manifest=/none/m.jsonl"], "manifest: no file"),
        (["show", "manifest=m", "prompt_style=tags"], "prompt_style"),
        (["convert", "nonsense"], "nonsense: expected key=value, or a YAML file"),
        (["convert", "broken.yaml"], "error: while parsing a flow node"),
        (["convert", "HERE.yaml"], "error: [Errno 21] Is a directory: "),
        (
            ["chat", "manifests=[HERE.yaml]", "output=o.jsonl"],
            "manifests: HERE.yaml is of no form that can be told by its looks",
        ),
    ],
)
def test_what_cannot_be_run(
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE.yaml").mkdir()
    (tmp_path / "broken.yaml").write_text("a: [1,")
    assert run(*arguments) == 2
    assert says in capsys.readouterr().err


def test_help(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "launch/data.py convert" in capsys.readouterr().out
    assert run() == 2


def test_index_stats_and_shards(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = 0.1 * np.random.default_rng(0).normal(size=(6, 16_000))
    lines = []
    for i, samples in enumerate(noise):
        soundfile.write(tmp_path / f"{i}.wav", samples, 16_000)
        lines.append({"id": f"u{i}", "audio": f"{i}.wav", "task": "asr", "language": "en", "target": "hello"})
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (f"manifests=[{manifest}]", f"cache_dir={tmp_path / 'cache'}", "num_workers=1")
    assert run("stats", *common, f"image={tmp_path / 'h.png'}") == 0
    assert "asr 6" in capsys.readouterr().out
    assert (tmp_path / "h.png").exists()
    train_tokenizer(["hello"], 300).save_pretrained(tmp_path / "tokenizer")
    assert run("index", *common, f"tokenizer={tmp_path / 'tokenizer'}") == 0
    assert "m: 6 examples, 0 bad lines" in capsys.readouterr().out
    assert run("index", *common) == 2
    assert "tokenizer: no value was given" in capsys.readouterr().err
    assert run("shard", *common, f"output={tmp_path / 'shards'}", "shard_mib=0.1") == 0
    assert "2 shards, 6 examples" in capsys.readouterr().out
