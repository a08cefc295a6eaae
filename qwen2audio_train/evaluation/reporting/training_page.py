"""One self-contained page of how runs trained, from their `log.jsonl` alone: curves, speed, audio heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.charts import HELD_OUT, Line, line_chart, smoothed
from qwen2audio_train.evaluation.reporting.page import card, cards, html_table, legend, page, section
from qwen2audio_train.evaluation.reporting.report import read_log

CURVES = {
    "loss": "loss, held out dashed",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "token_accuracy": "token accuracy",
    "tokens_per_s": "tokens/s",
    "audio_s_per_s": "audio-seconds/s",
    "data_wait_share": "share of the time waited for data",
}
"""Figures of a log line, and what their charts are called."""

Lines = Sequence[Mapping[str, Any]]


def render_training(runs: Mapping[str, str], title: str) -> str:
    """The page as text.

    Args:
        runs: folder by the name that the page gives it; of a stage, or of a recipe, whose stages are shown each.

    Raises:
        ConfigError: a folder has no log.
    """
    logs: dict[str, Lines] = {}
    for name, folder in runs.items():
        stages = read_log(folder)
        if not stages:
            raise ConfigError(f"runs.{name}={folder}: no log.jsonl here or one folder below; name the run_dir of a run")
        logs |= {name if len(stages) == 1 else f"{name}: {stage}": lines for stage, lines in stages.items()}
    parts = [f"<h1>{escape(title)}</h1>\n<p>{escape(', '.join(f'{n}: {Path(f)}' for n, f in runs.items()))}</p>"]
    charts = [card(label, chart) for figure, label in CURVES.items() if (chart := curves(logs, figure))]
    parts.append(section("Training", "Every logged step faint, smoothed over it.", legend(list(logs)) + cards(charts)))
    header = ("run", "steps", "seconds", "loss", "held out", "tokens", "audio h")
    table = html_table(header, [totals(name, lines) for name, lines in logs.items()], (1, 2, 3, 4, 5, 6))
    parts.append(section("Totals", "The last values, and sums over the log.", table))
    return page(title, parts)


def curves(logs: Mapping[str, Lines], figure: str) -> str:
    """A figure of every run over its steps; empty where none logged it."""
    found = []
    for colour, lines in enumerate(logs.values()):
        points = [(line["step"], float(line[figure])) for line in lines if figure in line]
        steps, values = [x for x, _ in points], [y for _, y in points]
        found += [Line(figure, steps, values, colour % HELD_OUT, faint=True)]
        found += [Line(figure, steps, smoothed(values) if values else [], colour % HELD_OUT)]
        if figure == "loss":
            held_out = [(line["step"], float(line["eval_loss"])) for line in lines if "eval_loss" in line]
            found.append(Line("held out", [x for x, _ in held_out], [y for _, y in held_out], HELD_OUT))
    return line_chart(found, x_label="optimiser step")


def totals(name: str, lines: Lines) -> list[str]:
    """Cells: name, steps, seconds, last loss, last held-out loss, tokens, hours of audio."""
    train = [line for line in lines if "loss" in line]
    last: Mapping[str, Any] = train[-1] if train else {}
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    hours = sum(value for key, value in last.items() if key.startswith("data/") and key.endswith("/hours"))
    return [
        escape(name),
        str(max(line["step"] for line in lines)),
        f"{max(line['seconds'] for line in lines):.0f}",
        f"{last['loss']:.3f}" if last else "",
        f"{held_out[-1]:.3f}" if held_out else "",
        f"{sum(line.get('tokens', 0) for line in train):,.0f}",
        f"{hours:.2f}",
    ]
