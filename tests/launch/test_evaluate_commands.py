"""compare and judge of launch/evaluate.py, and launch/report.py, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.cli.commands import run_command
from tests.evaluation.judge_server import Judge, misbehaving_judge
from tests.evaluation.reporting.test_results import evaluation
from tests.launch.scripts import script


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    lost = tmp_path / "lost.wav"
    return [evaluation(tmp_path / "a", lost, {"t0": "a dog"}), evaluation(tmp_path / "b", lost, {})]


def call(*arguments: str) -> int:
    return run_command(script("evaluate").COMMANDS, "", arguments)


def test_two_evaluations_are_compared(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = folders[0] / "comparison.json"
    assert call("compare", f"first={folders[0]}", f"second={folders[1]}", f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "librispeech_test_clean  en    WER" in printed
    assert "-12.5" in printed
    found = {one["source"]: one for one in json.loads(output.read_text())["comparisons"]}
    assert found["librispeech_test_clean"]["difference"]["value"] == -3 / 24
    assert found["sounds"]["difference"]["value"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compare", "first=/nowhere"), "second: no value was given"),
        (("compare", "first=/nowhere", "second=/nowhere"), "/nowhere: no texts.jsonl here"),
        (("compare", "frist=/nowhere"), "frist: unknown key; did you mean first?"),
        (("judge",), "evaluation: no value was given"),
        (("judge", "evaluation=/nowhere", "judge.base_url=http://127.0.0.1:1"), "judge.model: no value was given"),
        (("judge", "evaluation=/nowhere", "judge.modle=x"), "judge.modle: unknown key; did you mean judge.model?"),
    ],
)
def test_what_is_wrong_is_named(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(*arguments)
    assert says in capsys.readouterr().err


def test_an_evaluation_is_judged_by_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest: dict[str, Any] = {
        "question": "What?",
        "reference": "a dog",
        "text": "a cat",
        "task": "chat",
        "language": None,
    }
    records = [
        {"id": f"{source}{number}", "source": source, "meta": {"description": "barking"}, **rest}
        for source in ("airbench_chat_sound", "other")
        for number in range(3)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with misbehaving_judge(Judge(misdeeds=[(500, {})])) as judge:
        endpoint = ("judge.model=m", f"judge.base_url={judge.url}", "judge.max_wait_s=0.01")
        assert call("judge", f"evaluation={tmp_path}", *endpoint, "workers=1") == 0
    printed = capsys.readouterr().out
    assert "scored 3" in printed
    assert "converted 6.83" in printed
    judged = json.loads((tmp_path / "judged.json").read_text())
    assert judged["sources"]["other"]["answer"]["value"] == 7.0
    assert judged["judge"]["model"] == "m"


def test_a_report_is_written_by_its_name(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [f"results.{folder.name}={folder}" for folder in folders]
    for name, holds in (("r.html", "<table>"), ("r.md", "| source |"), ("r.tex", "\\toprule")):
        assert script("report").main([*results, f"output={tmp_path / name}"]) == 0
        assert holds in (tmp_path / name).read_text()
    for wrong, says in ((["output=r.doc"], "expected a name that ends with"), ([], "results: empty")):
        with pytest.raises(SystemExit):
            script("report").main([*(results if wrong else []), *(wrong or ["output=r.md"])])
        assert says in capsys.readouterr().err
