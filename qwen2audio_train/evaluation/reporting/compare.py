"""Two evaluations of the same held-out examples, utterance by utterance: is the second better, beyond chance?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.results import TEXTS, read_texts
from qwen2audio_train.evaluation.scoring.bootstrap import Difference, paired_difference
from qwen2audio_train.evaluation.scoring.items import Item
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER
from qwen2audio_train.evaluation.scoring.score import STAMPS, counts_of, grouped
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, aligned


@dataclass
class CompareOptions:
    """The keys of `launch/evaluate.py compare`.

    Attributes:
        first, second: folders of two evaluations of the same held-out examples.
        output: JSON file for the comparison.
        bootstrap_samples, seed: of the intervals.
    """

    first: str = ""
    second: str = ""
    output: str | None = None
    bootstrap_samples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """Change of an error rate or an accuracy from the first evaluation to the second, over their n common examples."""

    source: str
    task: str
    language: str | None
    metric: str
    n: int
    difference: Difference
    scoring: str = ""


@dataclass(frozen=True)
class Compared:
    """All comparisons of two evaluations, and what could not be compared.

    Attributes:
        only_first, only_second: examples that the other evaluation does not have.
        without_counts: groups whose metric has no counts per utterance that add up (BLEU).
    """

    comparisons: tuple[Comparison, ...]
    only_first: int
    only_second: int
    without_counts: tuple[str, ...]


def compare(first: str | Path, second: str | Path, *, bootstrap_samples: int = 1000, seed: int = 0) -> Compared:
    """Compare the texts.jsonl of two evaluation folders, per source, task, language and metric.

    Both are scored anew by today's rules from the references of the second, so that the numbers belong together.

    Raises:
        ConfigError: a folder holds no evaluation, the two have no example in common, or an example's reference differs.
    """
    before, after = _texts(Path(first)), _texts(Path(second))
    common = [name for name in after if name in before]
    if not common:
        raise ConfigError(f"{first} and {second}: no example in common, so there is nothing to compare")
    for name in common:
        if before[name][0].reference != after[name][0].reference:
            raise ConfigError(
                f"{first} and {second}: example {name[1]!r} of {name[0]} has another reference in each "
                f"({before[name][0].reference!r}, {after[name][0].reference!r}): they are not of the same held-out set"
            )
    found, skipped = [], []
    for (source, task, language, metric), group in grouped([after[name] for name in common]).items():
        items, texts = [item for item, _ in group], [text for _, text in group]
        earlier = [before[source, item.id][1] for item in items]
        runs = counts_of(metric, items, earlier), counts_of(metric, items, texts)
        if runs[0] is None or runs[1] is None:
            skipped.append(f"{source} ({metric})")
            continue
        change = paired_difference(runs[0], runs[1], samples=bootstrap_samples, seed=seed)
        found.append(Comparison(source, task, language, _name(metric, language), len(items), change, STAMPS[metric]))
    return Compared(tuple(found), len(before) - len(common), len(after) - len(common), tuple(skipped))


def comparison_table(compared: Compared) -> str:
    """The changes as aligned columns, in percentage points, and what was not compared."""
    rows = []
    for c in compared.comparisons:
        unit = 100 if c.metric in PERCENT else 1
        value, low, high = (unit * x for x in (c.difference.value, c.difference.low, c.difference.high))
        cells = [c.source, c.language or "", NAMES.get(c.metric, c.metric), f"{value:+.1f}"]
        rows.append([*cells, f"[{low:+.1f}, {high:+.1f}]", str(c.n), f"{c.difference.p_value:.3f}"])
    notes = [f"not compared: {name} has no counts per utterance" for name in compared.without_counts]
    if compared.only_first or compared.only_second:
        notes.append(
            f"left out: {compared.only_first} examples of the first alone, {compared.only_second} of the second"
        )
    table = aligned(["source", "lang", "metric", "change", "95 %", "n", "p"], rows, right=(3, 5, 6))
    return "\n".join([table, *notes])


def _name(metric: str, language: str | None) -> str:
    if metric == "error_rate":
        return "cer" if language in PER_CHARACTER else "wer"
    return "hallucination" if metric == "hallucination" else "accuracy"


def _texts(folder: Path) -> dict[tuple[str, str], tuple[Item, str]]:
    """Items and texts of an evaluation by source and id."""
    path = folder / TEXTS
    if not path.is_file():
        raise ConfigError(f"{folder}: no {TEXTS} here; name the output_dir of an evaluation (launch/evaluate.py)")
    return {(item.source, item.id): (item, text) for item, text, _ in read_texts(path)}
