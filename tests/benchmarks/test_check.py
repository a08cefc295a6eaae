"""A ratio that drops beyond the noise is flagged, and nothing else is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import check  # noqa: E402

RUNS = [{"speed: 3s": 4.2, "memory: 3s": 2.6}, {"speed: 3s": 4.0, "memory: 3s": 2.7}]
STEP = {"speedup": {"3s": 4.1, "30s": 1.05}, "memory_ratio": {"3s": 0.4, "30s": 0.8}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"speed: 3s": 4.0, "memory: 3s": 2.6}, set()),
        ({"speed: 3s": 3.7, "memory: 3s": 2.4}, set()),  # within a tenth of the least
        ({"speed: 3s": 3.5, "memory: 3s": 2.6}, {"speed: 3s"}),
        ({"speed: 3s": 9.0, "memory: 3s": 2.2}, {"memory: 3s"}),
        ({"speed: 3s": float("nan"), "memory: 3s": 2.6}, {"speed: 3s"}),
        ({"memory: 3s": 2.6, "speed: 30s": 1.0}, {"speed: 3s"}),  # one is missing, a new one is no drop
    ],
)
def test_what_is_below_the_least_run_by_more_than_the_noise_has_dropped(
    found: dict[str, float], expected: set[str]
) -> None:
    assert set(check.dropped(RUNS, found, noise=0.1)) == expected


def test_nothing_has_dropped_without_a_baseline() -> None:
    assert check.dropped([], {"speed: 3s": 0.1}) == {}


def test_every_ratio_is_better_when_it_is_more_and_none_is_a_time() -> None:
    step = check.RATIOS["train_step"](STEP)
    assert step == pytest.approx({"speed: 3s": 4.1, "speed: 30s": 1.05, "memory: 3s": 2.5, "memory: 30s": 1.25})
    loader = {"audio_s_per_s_per_core": {"ours": 600.0, "stock": 100.0, "lhotse": 400.0}, "resume_s": 0.1}
    assert check.RATIOS["loader"](loader) == {"speed: stock": 6.0, "speed: lhotse": 1.5}
    cases = {"a": {"peak_mib": 200, "forecast_mib": 180, "step_s": 3.0}, "b": {"not measured": "why"}}
    assert check.RATIOS["memory"]({"cases": cases}) == {"forecast: a": 0.9}


def test_a_run_is_recorded_and_then_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "baselines" / "here.json"
    path.parent.mkdir()
    monkeypatch.setattr(check, "HERE", tmp_path)

    def said(line: dict[str, object], *options: str) -> int:
        (tmp_path / "lines").write_text(f"some table\n{json.dumps(line)}\n")
        arguments = ["check.py", "train_step", "--kind", "here", "--lines", str(tmp_path / "lines"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            check.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert said(STEP, "--record") == 0
    assert said(STEP) == 0
    assert said({**STEP, "speedup": {"3s": 2.0, "30s": 1.05}}) == 1
    assert said(STEP, "--record") == 0
    assert len(check.load(path)["runs"]["train_step"]) == 2
    assert "| `train_step` | memory: 3s | 2 | 2.50 | 2.50 | 2.50 |" in check.table(check.load(path))


def test_the_page_shows_the_baseline() -> None:
    page = (BENCHMARKS.parent / "docs" / "costs.md").read_text()
    assert check.table(check.load(BENCHMARKS / "baselines" / "cpu2.json")) in page
