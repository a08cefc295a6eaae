"""report.html of a run: one self-contained page from its summary.json and log.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.prompts.pools import describe_tasks
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.evaluation.reporting.charts import (
    HELD_OUT,
    Dot,
    DotRow,
    Line,
    dot_chart,
    line_chart,
    smoothed,
    spectrogram_png,
)
from qwen2audio_train.evaluation.reporting.page import card, cards, html_table, legend, page, section, tile
from qwen2audio_train.evaluation.reporting.summary import MetricRecord, RunSummary, Showcase, StageRecord, read_summary
from qwen2audio_train.evaluation.scoring.normalise import normalise
from qwen2audio_train.evaluation.scoring.table import NAMES, interval_text, value_text
from qwen2audio_train.layout import MAX_SAMPLES, SAMPLING_RATE

STAGE_NAMES = {"pretrain": "pre-training", "sft": "fine-tuning", "dpo": "DPO"}
"""What stages are called where people read it; others keep their names."""

ERROR_RATES = ("wer", "cer")
HEARD = {"": "its own audio", "swapped": "another clip", "silence": "silence"}

Log = Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(folder: str | Path) -> Path:
    """Write report.html beside summary.json and log.jsonl (or the stages' own logs, one folder below).

    Raises:
        SummaryError: no usable summary.json.
    """
    path = Path(folder) / "report.html"
    path.write_text(render_report(read_summary(folder), read_log(folder)), encoding="utf-8")
    return path


def read_log(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Log lines of each stage, in their order."""
    folder = Path(folder)
    own = folder / "log.jsonl"
    stages: dict[str, list[dict[str, Any]]] = {}
    for file in [own] if own.is_file() else sorted(folder.glob("*/log.jsonl")):
        for line in json_lines(file):
            stages.setdefault(line["stage"], []).append(line)
    return stages


def render_report(summary: RunSummary, log: Log) -> str:
    """The page as text."""
    stages = [stage.name for stage in summary.stages]
    sections = [
        _head(summary),
        _curves(log, stages),
        _error_rates(summary.stages),
        _accuracies(summary.stages),
        _preferences(summary, log),
        _listening(summary.showcase, stages),
        _tables(summary),
        f"<footer>{escape(summary.name)}, summary version {summary.version}. Intervals are 95 % bootstrap intervals "
        "over held-out recordings.</footer>",
    ]
    return page(f"{summary.name}: report", [part for part in sections if part])


def _head(summary: RunSummary) -> str:
    stages = summary.stages
    training = _duration(sum(stage.wall_s for stage in stages))
    tiles = [tile(f"{summary.wall_s / 60:.0f} min", "wall time", f"training {training}")]
    for label, metric in _headlines(stages):
        tiles.append(tile(value_text(metric.metric, metric.value), label, _interval(metric)))
    tiles += [tile(str(value), str(name)) for name, value in summary.facts.items()]
    names = ", ".join(STAGE_NAMES.get(stage.name, stage.name) for stage in stages)
    title = f"<h1>{escape(summary.name)}</h1>\n<p>Qwen2-Audio: {escape(names)}</p>"
    return f'{title}\n<div class="tiles">{"".join(tiles)}</div>'


def _headlines(stages: Sequence[StageRecord]) -> list[tuple[str, MetricRecord]]:
    """The latest value of what people look for first."""
    wanted: dict[str, Callable[[MetricRecord], bool]] = {
        "English WER": lambda m: m.task == "asr" and m.language == "en" and m.metric == "wer",
        "voice chat right": lambda m: m.source == "voice_chat" and m.metric == "accuracy",
        "analysis right": lambda m: m.source == "analysis" and m.metric == "accuracy",
        "pairs ranked right": lambda m: m.metric == "pair_accuracy",
    }
    metrics = [m for stage in reversed(stages) for m in stage.metrics if not m.kind]
    found = {label: next((m for m in metrics if rule(m)), None) for label, rule in wanted.items()}
    return [(label, metric) for label, metric in found.items() if metric is not None]


def _curves(log: Log, stages: Sequence[str]) -> str:
    contents = []
    for index, stage in enumerate(stages):
        lines = log.get(stage, ())
        train = [line for line in lines if "loss" in line]
        held_out = [line for line in lines if "eval_loss" in line]
        if not train:
            continue
        steps, losses = [line["step"] for line in train], [float(line["loss"]) for line in train]
        curves = [Line("loss", steps, losses, index, faint=True), Line("loss", steps, smoothed(losses), index)]
        curves.append(Line("held out", [x["step"] for x in held_out], [x["eval_loss"] for x in held_out], HELD_OUT))
        chart = line_chart(curves, x_label="optimiser step")
        speed = [float(line["audio_s_per_s"]) for line in train if "audio_s_per_s" in line]
        note = f"{steps[-1]} steps" + (f", {sum(speed) / len(speed):.0f} audio-seconds/s" if speed else "")
        contents.append(card(STAGE_NAMES.get(stage, stage), f'{chart}<div class="note">{note}</div>'))
    if not contents:
        return ""
    text = "Loss per labelled token (DPO: per pair), each logged step faint and smoothed over it; held-out loss dashed."
    return section("Loss", text, cards(contents))


def _scored_names(stages: Sequence[StageRecord]) -> list[str]:
    """Names for a legend; a stage without scores has its colour, but nothing to explain."""
    return [STAGE_NAMES.get(stage.name, stage.name) if stage.metrics else "" for stage in stages]


def _error_rates(stages: Sequence[StageRecord]) -> str:
    rows = _dot_rows(stages, lambda m: m.metric in (*ERROR_RATES, "unseen_word_error_rate") and not m.kind)
    if not rows:
        return ""
    top = max(dot.high or dot.value for row in rows for dot in row.dots)
    chart = dot_chart(rows, x_max=min(1.2, max(0.1, 1.04 * top)))
    names = _scored_names(stages)
    text = "Held-out recordings after each stage, in percent; lower is better. Lines are 95 % intervals."
    return section("Error rates", text, card("Word and character error rate", legend(names) + chart))


def _accuracies(stages: Sequence[StageRecord]) -> str:
    rows = _dot_rows(stages, lambda m: m.metric == "accuracy" and not m.kind)
    if not rows:
        return ""
    names = _scored_names(stages)
    marks = "guessing: chance, and the most frequent answer"
    text = "Share of held-out questions answered exactly right after each stage, in percent; higher is better."
    chart = legend(names, marks) + dot_chart(rows, x_max=1.0)
    return section("Answers", text, card("Accuracy", chart))


def _dot_rows(stages: Sequence[StageRecord], wanted: Any) -> list[DotRow]:
    """A row per metric that any stage has, a dot per stage that has it."""
    found: dict[str, list[tuple[int, StageRecord, MetricRecord]]] = {}
    for index, stage in enumerate(stages):
        for metric in stage.metrics:
            if wanted(metric) and metric.value is not None:
                found.setdefault(_title(metric), []).append((index, stage, metric))
    rows = []
    for label, entries in found.items():
        dots = [Dot(m.value or 0.0, m.low, m.high, index, _tooltip(stage, m)) for index, stage, m in entries]
        last = entries[-1][2].extra
        marks = [(name, value) for name in ("chance", "majority") if (value := last.get(name)) is not None]
        rows.append(DotRow(label, dots, marks))
    return rows


def _preferences(summary: RunSummary, log: Log) -> str:
    stages = [stage.name for stage in summary.stages]
    lines = [line for line in log.get("dpo", ()) if "rewards/margins" in line]
    curves: list[str] = []
    if lines:
        steps = [line["step"] for line in lines]
        margins = [float(line["rewards/margins"]) for line in lines]
        shares = [float(line["rewards/accuracies"]) for line in lines]
        for name, values, bounds, unit, guide in (
            ("Reward margin", margins, None, 1.0, 0.0),
            ("Share of pairs ranked right, in percent", shares, (0.0, 1.0), 100.0, 0.5),
        ):
            colour = stages.index("dpo") if "dpo" in stages else 0
            drawn = [Line(name, steps, values, colour, faint=True), Line(name, steps, smoothed(values), colour)]
            chart = line_chart(drawn, x_label="optimiser step", y_range=bounds, unit=unit, guide=guide, size=(580, 200))
            curves.append(card(name, chart))
    rows, ranked = [], ""
    for kind, heard in HEARD.items():
        dots = [
            Dot(m.value or 0.0, m.low, m.high, index, _tooltip(stage, m))
            for index, stage in enumerate(summary.stages)
            for m in stage.metrics
            if m.metric == "pair_accuracy" and m.kind == kind
        ]
        if dots:
            rows.append(DotRow(heard, dots, [("chance", 0.5)]))
    if rows:
        chart = legend(_scored_names(summary.stages), "chance") + dot_chart(rows, x_max=1.0)
        ranked = card("Held-out pairs ranked right, by what the model hears, in percent", chart)
    if not curves and not rows:
        return ""
    text = "A model that listens ranks held-out pairs right with their own audio and guesses with another clip's."
    return section("Preferences", text, (cards(curves) if curves else "") + ranked)


def _listening(showcase: Sequence[Showcase], stages: Sequence[str]) -> str:
    contents = []
    for entry in showcase:
        clip = Clip(entry.audio, None, entry.start_s, entry.end_s)
        try:
            waveform = load_clip(clip, SampleRecipe())
            mel, frames = log_mel(waveform[:MAX_SAMPLES])
        except AudioError:
            continue
        image = f'<img class="mel" alt="mel spectrogram" src="{spectrogram_png(mel[:, :frames])}">'
        lines = [_fact("asked", entry.question)] if entry.question else []
        lines.append(_fact("reference", entry.reference))
        for stage in stages:
            if stage in entry.texts:
                right = normalise(entry.texts[stage], None) == normalise(entry.reference, None)
                name = STAGE_NAMES.get(stage, stage)
                lines.append(_fact(name, "the same" if right else entry.texts[stage], right))
        drawn = ", the first 30 s drawn" if len(waveform) > MAX_SAMPLES else ""
        title = f"{entry.source}, {len(waveform) / SAMPLING_RATE:.1f} s{drawn}".replace("_", " ")
        contents.append(card(title, f"{image}<dl>{''.join(lines)}</dl>"))
    if not contents:
        return ""
    text = "Held-out recordings as the encoder sees them (log-mel, low bands at the bottom), and what was decoded."
    return section("Listening", text, cards(contents))


def _fact(name: str, text: str, right: bool = False) -> str:
    style = ' class="right"' if right else ""
    return f"<dt>{escape(name)}</dt><dd{style}>{escape(text) or '–'}</dd>"


def _tables(summary: RunSummary) -> str:
    rows = _score_rows(summary.stages)
    names = [escape(STAGE_NAMES.get(stage.name, stage.name)) for stage in summary.stages]
    header = ["source", "task", "language", "metric", *names, "n", "guessing", "published"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    scores = html_table(header, rows, numbers=range(4, 5 + len(names)))
    caveats = "".join(f"<p>{escape(caveat)}</p>" for caveat in summary.caveats)
    text = "Values with their 95 % intervals; guessing is chance and the most frequent answer of training."
    return section("All numbers", text, scores + f'<div class="below">{caveats}</div>' + _times(summary.stages))


def _score_rows(stages: Sequence[StageRecord]) -> list[list[str]]:
    """A row of cells per score, with its value after every stage that has it."""
    keys: dict[tuple[str, ...], dict[str, MetricRecord]] = {}
    for stage in stages:
        for m in stage.metrics:
            keys.setdefault((m.source, m.task, m.language or "", m.kind, m.metric), {})[stage.name] = m
    rows = []
    for (source, task, language, kind, metric), by_stage in keys.items():
        last = list(by_stage.values())[-1]
        guessing = [last.extra[name] for name in ("chance", "majority") if last.extra.get(name) is not None]
        values = []
        for stage in stages:
            found = by_stage.get(stage.name)
            values.append(f"{value_text(metric, found.value)} <small>{_interval(found)}</small>" if found else "")
        published = ", ".join(f"{escape(who)} {value_text(metric, x)}" for who, x in last.published.items())
        label = f"\u2003{escape(kind)}" if kind else escape(source)
        head = [label, escape(task), escape(language), escape(NAMES.get(metric, metric))]
        guesses = " / ".join(value_text(metric, x) for x in guessing)
        rows.append([*head, *values, str(last.n), guesses, published])
    return rows


def _times(stages: Sequence[StageRecord]) -> str:
    rows = [
        [
            escape(STAGE_NAMES.get(stage.name, stage.name)),
            str(stage.steps),
            _duration(stage.wall_s),
            _duration(stage.evaluate_s),
            escape(", ".join(f"{name} {value}" for name, value in stage.facts.items())),
        ]
        for stage in stages
    ]
    return html_table(["stage", "steps", "training", "evaluation", "facts"], rows, numbers=(1, 2, 3))


def _title(metric: MetricRecord) -> str:
    name = metric.source.replace("_", " ")
    if metric.source == metric.task:
        name = describe_tasks().get(metric.task, name).partition(" (")[0]
    if metric.metric == "unseen_word_error_rate":
        return f"{name}, unseen words"
    return f"{name}, transcribed" if metric.metric in ERROR_RATES and "asr" not in metric.source else name


def _tooltip(stage: StageRecord, metric: MetricRecord) -> str:
    name, value = STAGE_NAMES.get(stage.name, stage.name), value_text(metric.metric, metric.value)
    return f"{_title(metric)} after {name}: {value} {_interval(metric)}, n {metric.n}"


def _interval(metric: MetricRecord) -> str:
    return interval_text(metric.metric, metric.low, metric.high)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
