from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from qwen2audio_train.evaluation.reporting.charts import (
    Dot,
    DotRow,
    Line,
    dot_chart,
    line_chart,
    smoothed,
    spectrogram_png,
    ticks,
)
from qwen2audio_train.evaluation.reporting.report import read_log, render_report, write_report
from qwen2audio_train.evaluation.reporting.summary import (
    RunSummary,
    Showcase,
    StageRecord,
    SummaryError,
    metric_records,
    pair_records,
    read_summary,
    write_summary,
)
from qwen2audio_train.evaluation.scoring.bootstrap import Score
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation
from qwen2audio_train.evaluation.scoring.likelihood import PairScores
from qwen2audio_train.evaluation.scoring.score import Row

WER = Score("wer", 0.125, 0.1, 0.15, 40, {"empty_hypotheses": 0.0})
RIGHT = Score("accuracy", 0.9, 0.85, 0.95, 60, {"chance": 0.1, "majority": 0.2})
UNKNOWN = Score("wer", float("nan"), float("nan"), float("nan"), 0)
LEADS = PairScores(Score("pair_accuracy", 0.95, 0.9, 1.0, 50, {"chance": 0.5}), Score("margin", 2.5, 2.0, 3.0, 50))


@pytest.fixture
def summary(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000).astype("float32"), 16_000)
    rows = (
        Row("asr_en", "asr", "en", "", WER, {"paper": 0.016}, "reference/2", "asr/1f3a9c"),
        Row("asr_xx", "asr", "xx", "", UNKNOWN),
        Row("voice_chat", "voice_chat", None, "", RIGHT),
    )
    evaluation = Evaluation(rows, {"asr_en": {"loss": 0.5}}, (), {}, (), {}, 3.0)
    records = metric_records(evaluation)
    pairs = pair_records(LEADS, "dpo") + pair_records(replace(LEADS, reward_margin=LEADS.margin), "dpo", "swapped")
    showcase = Showcase(
        "1", "asr_en", str(tmp_path / "a.wav"), "the <cat>", {"pretrain": "the bat", "dpo": "The <cat>!"}
    )
    gone = replace(showcase, id="2", audio=str(tmp_path / "gone.wav"), reference="never shown")
    stages = tuple(
        StageRecord(name, 60.0, 100, records + (pairs if name == "dpo" else ())) for name in ("pretrain", "dpo")
    )
    return RunSummary("demo & more", 3725.0, stages, (showcase, gone), ("a caveat",), {"parameters": "2 M"})


def log_lines(stage, count):
    for step in range(1, count + 1):
        line = {"stage": stage, "step": step, "loss": 1 / step, "audio_s_per_s": 50.0}
        yield line | ({"rewards/margins": step / 10, "rewards/accuracies": 0.5} if stage == "dpo" else {})
    yield {"stage": stage, "step": count, "eval_loss": 0.3}


class Page(HTMLParser):
    """Checks that every tag is closed in its order, and collects what a browser would fetch."""

    void = frozenset({"meta", "br", "img", "path", "circle"})

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_summary_survives_the_disk(summary, tmp_path):
    write_summary(summary, tmp_path)
    assert read_summary(tmp_path) == summary
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    stage = json.loads((tmp_path / "summary.json").read_text())["stages"][0]
    assert stage["metrics"][0] | {"extra": 0, "published": 0} == {
        "source": "asr_en",
        "task": "asr",
        "metric": "wer",
        "value": 0.125,
        "low": 0.1,
        "high": 0.15,
        "n": 40,
        "language": "en",
        "kind": "",
        "extra": 0,
        "published": 0,
        "scoring": "reference/2",
        "prompt": "asr/1f3a9c",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("{}", "expected version 1, found none"),
        ('{"version": 1, "stages": [], "showcase": [], "caveats": [], "nam": "x"}', "nam"),
        ('{"version": 1, "stages": [{"name": "a"}], "showcase": [], "caveats": []}', "metrics"),
    ],
)
def test_a_bad_summary_is_refused_by_name(text, message, tmp_path):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SummaryError, match=rf"summary\.json: .*{message}"):
        read_summary(tmp_path)


def test_the_page_is_one_file_with_everything_in_it(summary, tmp_path):
    write_summary(summary, tmp_path)
    lines = [*log_lines("pretrain", 30), *log_lines("dpo", 12)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert page.fetched, "the spectrogram"
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert not re.search(r"https?://", text)
    assert "prefers-color-scheme: dark" in text
    for expected in (
        "demo & more",
        "62 min",
        "12.5 %",
        "[10.0, 15.0]",
        "paper 1.6 %",
        "the <cat>",
        "a caveat",
        "2 M",
    ):
        assert expected in page.text
    assert "never shown" not in page.text
    for title in ("Loss", "Error rates", "Answers", "Preferences", "Listening", "All numbers"):
        assert f"<h2>{title}</h2>" in text
    assert text.count('class="right"') == 1, "the answer that is the reference but for case and punctuation"


def test_a_run_with_little_to_show_has_a_page_too(summary):
    bare = RunSummary("bare", 1.0, (StageRecord("sft", 1.0, 1, ()),))
    text = render_report(bare, {})
    Page(text)
    assert "<h2>Loss</h2>" not in text
    assert "<h2>All numbers</h2>" in text


def test_logs_of_the_stages_own_folders_are_found(tmp_path):
    for stage in ("pretrain", "sft"):
        (tmp_path / stage).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in log_lines(stage, 2))
        (tmp_path / stage / "log.jsonl").write_text(text)
    assert {stage: len(lines) for stage, lines in read_log(tmp_path).items()} == {"pretrain": 3, "sft": 3}


def test_curves_are_drawn_to_scale():
    svg = line_chart([Line("loss", [0, 10], [0.0, 4.0])], x_label="step", y_range=(0.0, 4.0), size=(462, 246))
    points = re.search(r'class="line c0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert [float(x) for x in points.groups()] == [46, 212, 446, 12]
    assert line_chart([Line("none", [], [])], x_label="step") == ""


def test_dots_beyond_the_axis_stay_inside():
    svg = dot_chart([DotRow("a", [Dot(3.0, 2.0, 4.0)], [("chance", 0.5)])], x_max=1.0)
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert places == [1096.0]


def test_smoothing_keeps_a_straight_line_straight():
    line = list(np.linspace(0, 1, 101))
    assert smoothed(line) == pytest.approx(line)
    noisy = np.random.default_rng(0).normal(size=1000)
    assert np.std(smoothed(noisy)) < 0.25


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1400), (0.03, 0.031), (-2, 7)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low - 1e-9 <= found[0] <= found[-1] <= high + 1e-9


def test_the_picture_is_a_png_of_the_right_size():
    data = base64.b64decode(spectrogram_png(np.random.default_rng(0).normal(size=(128, 77))).split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (77, 128)
    length = struct.unpack(">I", data[33:37])[0]
    assert len(zlib.decompress(data[41 : 41 + length])) == 128 * (1 + 3 * 77)
