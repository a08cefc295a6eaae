"""Training curves from logs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.training_page import totals
from qwen2audio_train.evaluation.reporting.write import ReportOptions, write_results


def log(folder: Path, stage: str, losses: list[float]) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = [
        {
            "stage": stage,
            "step": i,
            "seconds": 2.0 * i,
            "loss": x,
            "tokens": 100,
            "data/a/hours": 0.5 * i,
            "tokens_per_s": 9,
        }
        for i, x in enumerate(losses, 1)
    ]
    lines.append({"stage": stage, "step": len(losses), "seconds": 9.0, "eval_loss": 1.25})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_a_page_of_two_runs(tmp_path: Path) -> None:
    lines = log(tmp_path / "a", "sft", [3.0, 2.0, 1.5])
    log(tmp_path / "b" / "pretrain", "pretrain", [4.0, 3.5])
    log(tmp_path / "b" / "sft", "sft", [2.0])
    assert totals("a", lines) == ["a", "3", "9", "1.500", "1.250", "300", "1.50"]
    runs = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    text = write_results(ReportOptions(runs=runs, output=str(tmp_path / "page.html"))).read_text()
    for name in ("a", "b: pretrain", "b: sft"):
        assert f"</i>{name}</span>" in text
    assert text.count("<svg") == 2
    assert "gradient norm" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs\.x=.*no log\.jsonl"):
        write_results(ReportOptions(runs={"x": str(tmp_path)}, output=str(tmp_path / "page.html")))
    with pytest.raises(ConfigError, match=r"page of their own"):
        write_results(ReportOptions(runs={"x": str(tmp_path)}, output=str(tmp_path / "page.md")))
