"""One self-contained page from any set of evaluations: tables, intervals, worst examples with their audio."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape

import soundfile

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.reporting.charts import Dot, DotRow, dot_chart
from qwen2audio_train.evaluation.reporting.page import card, cards, html_table, legend, page, section
from qwen2audio_train.evaluation.reporting.results import Result, Utterance, breakdown, confusion, worst
from qwen2audio_train.evaluation.scoring.bootstrap import Score
from qwen2audio_train.evaluation.scoring.score import Row
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, extra_text, score_text, value_text
from qwen2audio_train.layout import SAMPLING_RATE

Key = tuple[str, str, str | None, str, str]

ERRORS = ("wer", "cer")
ACCURACIES = ("accuracy", "label_accuracy")
"""Metrics that are drawn with their intervals; all are in the table."""

AUDIO_S = 15.0
"""So much of a clip is embedded: 15 s of Ogg Vorbis are some 120 kB."""


def render_results(results: Sequence[Result], title: str, num_worst: int = 6) -> str:
    """The page as text.

    Args:
        num_worst: so many of the worst utterances of each source are shown, of the last result.
    """
    sections = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(', '.join(result.name for result in results))}</p>",
        _numbers(results),
        _intervals(results),
        _breakdowns(results[-1]),
        _confusions(results[-1]),
        _worst(results[-1], num_worst),
        _settings(results),
        "<footer>Intervals are 95 % bootstrap intervals over held-out recordings.</footer>",
    ]
    return page(title, [part for part in sections if part])


def joined(results: Sequence[Result]) -> dict[Key, list[Row | None]]:
    """The rows of several evaluations side by side: one for each result, None where it has none."""
    rows: dict[Key, list[Row | None]] = {}
    for place, result in enumerate(results):
        for row in result.rows:
            key = (row.source, row.task, row.language, row.kind, row.score.metric)
            rows.setdefault(key, [None] * len(results))[place] = row
    return rows


def stamps_of(found: Sequence[Row | None]) -> tuple[str, str]:
    """How the values of a line were scored and asked; where the evaluations differ, one stamp each in their order."""
    rows = [row for row in found if row is not None]
    scoring, prompt = ([getattr(row, name) for row in rows] for name in ("scoring", "prompt"))
    one, other = (", ".join(stamps[:1] if len(set(stamps)) == 1 else stamps) for stamps in (scoring, prompt))
    return one, other


def difference_text(row: Row, published: float) -> str:
    """Ours minus theirs, in the unit of the metric: `+0.3`."""
    if not math.isfinite(row.score.value):
        return "–"
    factor = 100 if row.score.metric in PERCENT else 1
    return f"{factor * (row.score.value - published):+.1f}"


def _numbers(results: Sequence[Result]) -> str:
    body = []
    for (source, task, language, kind, metric), found in joined(results).items():
        last = next(row for row in reversed(found) if row is not None)
        values = ["{} <small>{}</small>".format(*score_text(row.score)) if row else "" for row in found]
        published = ", ".join(
            f"{escape(who)} {value_text(metric, theirs)} ({difference_text(last, theirs)})"
            for who, theirs in last.published.items()
        )
        label = f"\u2003{escape(kind)}" if kind else escape(source)
        what = escape(" ".join(filter(None, (task, language))))
        head = [f"{label}<br><small>{what}</small>", escape(NAMES.get(metric, metric))]
        tail = [escape(extra_text(last.score)), published, "<br>".join(map(escape, stamps_of(found)))]
        body.append([*head, *values, str(last.score.n), *map(_wrapped, tail)])
    header = ["source", "metric", *(escape(r.name) for r in results)]
    text = (
        "Values with 95 % intervals; beside them chance, majority and other recipes, and published figures with the "
        "difference of the last column's value from them."
    )
    table = html_table(
        [*header, "n", "beside it", "published", "scored and asked by"], body, range(2, 3 + len(results))
    )
    return section("All numbers", text, table)


def _wrapped(cell: str) -> str:
    return f'<span class="wrap">{cell}</span>'


def _intervals(results: Sequence[Result]) -> str:
    drawn = []
    for is_error, title in ((True, "Error rates"), (False, "Accuracies")):
        rows = []
        for (source, _, language, kind, metric), found in joined(results).items():
            if kind or metric not in (ERRORS if is_error else ACCURACIES):
                continue
            dots = [
                _dot(row.score, place, results[place].name)
                for place, row in enumerate(found)
                if row is not None and math.isfinite(row.score.value)
            ]
            if dots:
                beside = "by likelihood" if metric == "label_accuracy" else None
                rows.append(DotRow(" ".join(filter(None, (source, language, beside))), dots, _marks(found)))
        if rows:
            top = max(dot.high or dot.value for row in rows for dot in row.dots)
            chart = dot_chart(rows, x_max=min(1.2, max(0.1, 1.04 * top)) if is_error else 1.0)
            shown = {dot.colour for row in rows for dot in row.dots}
            names = [result.name if place in shown else "" for place, result in enumerate(results)]
            drawn.append(card(title, legend(names, "chance, majority, published") + chart))
    return section("Intervals", "In percent, with 95 % intervals.", "".join(drawn)) if drawn else ""


def _dot(score: Score, place: int, name: str) -> Dot:
    return Dot(score.value, score.low, score.high, place, f"{name}: {value_text(score.metric, score.value)}")


def _marks(found: Sequence[Row | None]) -> list[tuple[str, float]]:
    last = next(row for row in reversed(found) if row is not None)
    known = [(name, last.score.extra[name]) for name in ("chance", "majority") if name in last.score.extra]
    return [*known, *last.published.items()]


def _breakdowns(result: Result) -> str:
    contents = []
    for (source, _, language), utterances in result.utterances.items():
        for kind, parts in breakdown(utterances).items():
            rows = [[escape(name), f"{100 * rate:.1f}", str(count)] for name, (rate, count) in parts.items()]
            title = " ".join(filter(None, (source, language, "by", kind)))
            contents.append(card(title, html_table([kind, "wrong, %", "n"], rows, (1, 2))))
    text = f"Share of errors of {result.name} by length of the clips, and by speaker where the manifest names one."
    return section("Where the errors are", text, cards(contents)) if contents else ""


def _confusions(result: Result) -> str:
    contents = []
    for (source, _, _), utterances in result.utterances.items():
        found = confusion(utterances)
        if found is None:
            continue
        labels, counts = found
        header = ["", *(escape(label) for label in labels), "other"]
        rows = [
            [escape(label), *(_shaded(count, sum(row), place == index) for index, count in enumerate(row))]
            for place, (label, row) in enumerate(zip(labels, counts, strict=True))
        ]
        contents.append(card(source, html_table(header, rows, range(1, len(header)))))
    text = "Rows are what is right, columns what was answered; `other` is an answer that is no label of the set."
    return section("Confusions", text, "".join(contents)) if contents else ""


def _shaded(count: int, total: int, is_right: bool) -> str:
    if not count:
        return "·"
    colour = f"var({'--c2' if is_right else '--c1'}) {round(100 * count / max(1, total))}%"
    style = f"background: color-mix(in srgb, {colour}, transparent); padding: 2px 6px"
    return f'<span style="{style}">{count}</span>'


def _worst(result: Result, count: int) -> str:
    contents = []
    for (source, _, _), utterances in result.utterances.items():
        contents += [_example(source, utterance) for utterance in worst(utterances, count)]
    text = f"What {result.name} gets most wrong, of each source, with the first {AUDIO_S:g} s of audio."
    return section("Worst examples", text, cards(contents)) if contents else ""


def _example(source: str, utterance: Utterance) -> str:
    item = utterance.item
    facts = [("asked", item.question), ("reference", item.reference), ("answer", utterance.text)]
    lines = "".join(f"<dt>{name}</dt><dd>{escape(text) or '–'}</dd>" for name, text in facts if text is not None)
    heard = "".join(_players(utterance))
    name = item.id if item.id.startswith(source) else f"{source}: {item.id}"
    return card(name, f"{heard}<dl>{lines}</dl>")


def _players(utterance: Utterance) -> Iterator[str]:
    for clip in utterance.clips:
        try:
            waveform = load_clip(clip, SampleRecipe())
        except (UserError, OSError) as error:
            yield f'<div class="note">{escape(str(error))}</div>'
            continue
        if len(waveform) > AUDIO_S * SAMPLING_RATE:
            yield f'<div class="note">the first {AUDIO_S:g} s of {len(waveform) / SAMPLING_RATE:.0f}</div>'
            waveform = waveform[: round(AUDIO_S * SAMPLING_RATE)]
        file = io.BytesIO()
        soundfile.write(file, waveform, SAMPLING_RATE, format="OGG", subtype="VORBIS")
        data = base64.b64encode(file.getvalue()).decode()
        yield f'<audio controls preload="none" style="width: 100%" src="data:audio/ogg;base64,{data}"></audio>'


def _settings(results: Sequence[Result]) -> str:
    rows = [
        [escape(result.name), _wrapped(escape(", ".join(f"{key} {value}" for key, value in result.settings.items())))]
        for result in results
    ]
    caveats = [f"<p>{escape(f'{result.name}: {caveat}')}</p>" for result in results for caveat in result.caveats]
    table = html_table(["evaluation", "settings"], rows)
    return section("How it was made", "", table + f'<div class="below">{"".join(caveats)}</div>')
