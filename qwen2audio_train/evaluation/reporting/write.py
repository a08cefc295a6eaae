"""A report of evaluations as a file: HTML, Markdown or LaTeX by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.results import Result, read_result
from qwen2audio_train.evaluation.reporting.results_page import render_results
from qwen2audio_train.evaluation.reporting.results_text import as_latex, as_markdown
from qwen2audio_train.evaluation.reporting.training_page import render_training


@dataclass
class ReportOptions:
    """The keys of launch/report.py.

    Attributes:
        results: folder of an evaluation by the name that tables give it, in their order.
        runs: run folder by name, for a page of training curves from their logs instead of one of results.
        output: file to write; .html is one page with plots and audio, .md and .tex are tables.
        title: heading.
        worst: so many of the worst utterances of each source, of the last evaluation.
    """

    results: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    output: str = "report.html"
    title: str = "Evaluation"
    worst: int = 6


def write_results(options: ReportOptions) -> Path:
    """Write the report; raises ConfigError for a folder without an evaluation or a file of another kind."""
    path = Path(options.output)
    renderers: dict[str, Callable[[Sequence[Result], str], str]] = {
        ".html": partial(render_results, num_worst=options.worst),
        ".md": as_markdown,
        ".tex": as_latex,
    }
    if path.suffix not in renderers:
        raise ConfigError(f"output={options.output}: expected a name that ends with {', '.join(renderers)}")
    if options.runs:
        if options.results or path.suffix != ".html":
            raise ConfigError("runs: training curves are a page of their own; leave results out, and name an .html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_training(options.runs, options.title), encoding="utf-8")
        return path
    if not options.results:
        raise ConfigError("results: empty; name evaluations, results.NAME=FOLDER: the output_dir of launch/evaluate.py")
    results = [read_result(name, folder) for name, folder in options.results.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(renderers[path.suffix](results, options.title), encoding="utf-8")
    return path
