"""The same tables as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2audio_train.evaluation.reporting.results import Result
from qwen2audio_train.evaluation.reporting.results_page import joined, stamps_of
from qwen2audio_train.evaluation.scoring.table import NAMES, extra_text, score_text, value_text

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}


def results_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: source, language, metric, one column for each result, n, what stands beside, stamps."""
    body = []
    for (source, _, language, kind, metric), found in joined(results).items():
        last = next(row for row in reversed(found) if row is not None)
        values = [" ".join(score_text(row.score)).strip() if row else "" for row in found]
        published = ", ".join(f"{who} {value_text(metric, theirs)}" for who, theirs in last.published.items())
        name = f"{source}: {kind}" if kind else source
        tail = [str(last.score.n), extra_text(last.score), published, *stamps_of(found)]
        body.append([name, language or "", NAMES.get(metric, metric), *values, *tail])
    tail = ["n", "beside it", "published", "scored by", "asked by"]
    return ["source", "language", "metric", *(result.name for result in results), *tail], body


def as_markdown(results: Sequence[Result], title: str) -> str:
    """A heading, the table, and the caveats."""
    header, body = results_table(results)
    rows = [header, ["---"] * len(header), *body]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    caveats = [f"- {result.name}: {caveat}" for result in results for caveat in result.caveats]
    return "\n".join([f"# {title}", "", *lines, *([""] if caveats else []), *caveats]) + "\n"


def as_latex(results: Sequence[Result], title: str) -> str:
    """A table environment for the package booktabs."""
    header, body = results_table(results)
    columns = "l" * 3 + "r" * (len(results) + 1) + "l" * 4
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in body]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escaped(title)}. 95\,\% intervals in brackets.}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_escaped, header)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text).replace("–", "--")
