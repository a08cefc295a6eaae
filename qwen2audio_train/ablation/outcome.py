"""What an ablation leaves behind: its figures as JSON, a table in Markdown, a page with plots, and the plots alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from qwen2audio_train.ablation.gather import Arm, Change
from qwen2audio_train.evaluation.reporting.charts import Dot, DotRow, Line, dot_chart, line_chart, smoothed
from qwen2audio_train.evaluation.reporting.page import card, cards, html_table, legend, page, section, standalone_svg
from qwen2audio_train.evaluation.scoring.evaluate import plain
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, value_text

COLUMNS = ("overlay", "held out", "metric", "n", "baseline", "overlay's", "change", "95 %", "p", "by seed")
NUMBERS = (3, 4, 5, 6, 7, 8, 9)
COST_COLUMNS = ("arm", "runs", "training s", "scoring s", "tokens", "audio h", "changes", "order of examples")
READ = (
    "Values are means over the seeds, with the lowest and the highest. The change is paired over the same utterances, "
    "whose counts are summed over the seeds, with a 95 % bootstrap interval and p-value; a star says that the interval "
    "leaves zero out and that every seed agrees in sign. Loss and BLEU have no counts per utterance, and no test."
)


def write_outcome(name: str, arms: Sequence[Arm], folder: Path) -> Path:
    """Write `ablation.json`, `table.md`, `report.html` and an SVG for every plot into the ablation's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "ablation.json": json.dumps(plain([asdict(arm) for arm in arms]), indent=1, ensure_ascii=False) + "\n",
        "table.md": f"{markdown(COLUMNS, change_rows(arms))}\n\n{markdown(COST_COLUMNS, cost_rows(arms))}\n",
        "report.html": render(name, arms),
    }
    for arm in arms[1:]:
        texts[f"{arm.name}.loss.svg"] = standalone_svg(loss_chart(arms[0], arm), f"training loss: {arm.name}")
        if chart := score_chart(arm):
            texts[f"{arm.name}.scores.svg"] = standalone_svg(chart, f"held-out scores: {arm.name}")
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder / "report.html"


def change_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells under COLUMNS."""
    return [[arm.name, *cells(change)] for arm in arms[1:] for change in arm.changes]


def cells(change: Change) -> list[str]:
    source, _, language, metric = change.key
    unit = 100 if metric in PERCENT else 1
    digits = 1 if metric in PERCENT or metric == "bleu" else 3
    found = change.difference
    moved = sum(change.by_seed) / len(change.by_seed) if found is None else found.value
    return [
        f"{source} ({language})" if language else source,
        NAMES.get(metric, metric),
        str(change.n),
        spread(metric, change.baseline),
        spread(metric, change.values),
        f"{unit * moved:+.{digits}f}{'*' if change.is_clear else ''}",
        f"[{unit * found.low:+.{digits}f}, {unit * found.high:+.{digits}f}]" if found else "",
        f"{found.p_value:.3f}" if found else "",
        ", ".join(f"{unit * value:+.{digits}f}" for value in change.by_seed),
    ]


def spread(metric: str, values: Sequence[float]) -> str:
    """Mean, lowest and highest: `13.1 % (12.8 % to 13.5 %)`."""
    if metric == "loss":
        texts = [f"{value:.3f}" for value in (sum(values) / len(values), min(values), max(values))]
    else:
        texts = [value_text(metric, value) for value in (sum(values) / len(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(values) > 1 else texts[0]


def cost_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells under COST_COLUMNS."""
    return [
        [
            arm.name,
            str(len(arm.losses)),
            f"{arm.cost.train_s:.0f}",
            f"{arm.cost.evaluate_s:.0f}",
            f"{arm.cost.tokens:,.0f}",
            f"{arm.cost.audio_hours:.2f}",
            ", ".join(arm.changed),
            arm.order,
        ]
        for arm in arms
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def render(name: str, arms: Sequence[Arm]) -> str:
    """The page as text."""
    parts = [f"<h1>{escape(name)}</h1>\n<p>An ablation: {escape(', '.join(arm.name for arm in arms[1:]))}</p>"]
    table = html_table(COLUMNS, [list(map(escape, row)) for row in change_rows(arms)], NUMBERS)
    parts.append(section("Changes", READ, table))
    for arm in arms[1:]:
        names = legend([arms[0].name, arm.name])
        chart = score_chart(arm)
        shown = f"{names}{chart}{cards([card('training loss, every seed faint', loss_chart(arms[0], arm))])}"
        parts.append(section(arm.name, f"changes {', '.join(arm.changed)}; {arm.order}", shown))
    costs = html_table(COST_COLUMNS, [list(map(escape, row)) for row in cost_rows(arms)], (1, 2, 3, 4, 5))
    parts.append(section("Cost", "Of one run, on average over the seeds, in wall time.", costs))
    return page(name, parts)


def score_chart(arm: Arm) -> str:
    """Error rates and accuracies of baseline and overlay, with the range over the seeds."""
    rows = []
    for change in arm.changes:
        source, _, language, metric = change.key
        if metric not in PERCENT:
            continue
        label = f"{source}{f' ({language})' if language else ''}, {NAMES.get(metric, metric)}"
        sides = (("baseline", change.baseline), (arm.name, change.values))
        dots = [
            Dot(sum(values) / len(values), min(values), max(values), colour, f"{name}: {spread(metric, values)}")
            for colour, (name, values) in enumerate(sides)
        ]
        rows.append(DotRow(label, dots))
    if not rows:
        return ""
    highest = max(dot.high or 0.0 for row in rows for dot in row.dots)
    return dot_chart(rows, x_max=max(0.1, 1.04 * highest))


def loss_chart(baseline: Arm, arm: Arm) -> str:
    """Training loss of both arms: every seed faint, their mean over it."""
    lines = []
    for colour, one in enumerate((baseline, arm)):
        for curve in one.losses:
            lines.append(Line(one.name, [step for step, _ in curve], [loss for _, loss in curve], colour, faint=True))
        steps = [step for step, _ in one.losses[0]]
        at = [dict(curve) for curve in one.losses]
        shared = [step for step in steps if all(step in curve for curve in at)]
        means = [sum(curve[step] for curve in at) / len(at) for step in shared]
        lines.append(Line(one.name, shared, smoothed(means), colour))
    return line_chart(lines, x_label="optimiser step")
