"""Two evaluations of the same held-out examples, utterance by utterance: is the second better, beyond chance?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.results import TEXTS, read_texts
from qwen2audio_train.evaluation.scoring.benchmarks import Metric
from qwen2audio_train.evaluation.scoring.bootstrap import Difference, paired_difference
from qwen2audio_train.evaluation.scoring.items import Item
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER
from qwen2audio_train.evaluation.scoring.score import counts_of, grouped, stamp_of
from qwen2audio_train.evaluation.scoring.spans import COUNTS
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, aligned

Texts = Mapping[tuple[str, str], tuple[Item, str]]
"""Items and decoded texts of an evaluation by source and id."""


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
    return compare_all([(first, second)], bootstrap_samples=bootstrap_samples, seed=seed)


def compare_all(
    pairs: Sequence[tuple[str | Path, str | Path]], *, bootstrap_samples: int = 1000, seed: int = 0
) -> Compared:
    """`compare` of several pairs as one, such as a change under several seeds.

    The counts of an utterance are summed over the pairs before utterances are resampled, so that an utterance is one
    observation however many runs decoded it. The interval is of the held-out set; it says nothing of other seeds.
    """
    sides = [(_texts(Path(first)), _texts(Path(second))) for first, second in pairs]
    before, after = sides[0]
    common = [name for name in after if all(name in side for both in sides for side in both)]
    if not common:
        named = " and ".join(str(folder) for both in pairs for folder in both)
        raise ConfigError(f"{named}: no example in common, so there is nothing to compare")
    for folder, side in (
        (folder, side) for both in zip(pairs, sides, strict=True) for folder, side in zip(*both, strict=True)
    ):
        for name in common:
            if side[name][0].reference != after[name][0].reference:
                texts = f"{side[name][0].reference!r}, {after[name][0].reference!r}"
                raise ConfigError(
                    f"{folder} and {pairs[0][1]}: example {name[1]!r} of {name[0]} has another reference in each "
                    f"({texts}): they are not of the same held-out set"
                )
    found, skipped = [], []
    for (source, task, language, metric), group in grouped([after[name] for name in common]).items():
        items = [item for item, _ in group]
        runs = [summed_counts(metric, items, [both[place] for both in sides]) for place in (0, 1)]
        if runs[0] is None or runs[1] is None:
            skipped.append(f"{source} ({metric})")
            continue
        change = paired_difference(runs[0], runs[1], samples=bootstrap_samples, seed=seed)
        found.append(Comparison(source, task, language, _name(metric, language), len(items), change, stamp_of(metric)))
    return Compared(tuple(found), len(before) - len(common), len(after) - len(common), tuple(skipped))


def summed_counts(metric: Metric, items: Sequence[Item], sides: Sequence[Texts]) -> tuple[list[int], list[int]] | None:
    """Numerators and denominators of every item, summed over what several evaluations decoded; None where the metric
    has none."""
    counts = [counts_of(metric, items, [side[item.source, item.id][1] for item in items]) for side in sides]
    known = [pair for pair in counts if pair is not None]
    if len(known) < len(counts):
        return None
    tops, bottoms = ([sum(values) for values in zip(*column, strict=True)] for column in zip(*known, strict=True))
    return tops, bottoms


def comparison_table(compared: Compared) -> str:
    """The changes as aligned columns, in percentage points, and what was not compared."""
    rows = []
    for c in compared.comparisons:
        unit = 100 if c.metric in PERCENT else 1
        value, low, high = (unit * x for x in (c.difference.value, c.difference.low, c.difference.high))
        cells = [c.source, c.language or "", NAMES.get(c.metric, c.metric), f"{value:+.1f}"]
        rows.append([*cells, f"[{low:+.1f}, {high:+.1f}]", str(c.n), f"{c.difference.p_value:.3f}", c.scoring])
    notes = [f"not compared: {name} has no counts per utterance" for name in compared.without_counts]
    if compared.only_first or compared.only_second:
        notes.append(
            f"left out: {compared.only_first} examples of the first alone, {compared.only_second} of the second"
        )
    header = ["source", "lang", "metric", "change", "95 %", "n", "p", "scored by"]
    table = aligned(header, rows, right=(3, 5, 6))
    return "\n".join([table, *notes])


def _name(metric: str, language: str | None) -> str:
    if metric == "error_rate":
        return "cer" if language in PER_CHARACTER else "wer"
    if metric == "hallucination" or metric in COUNTS:
        return metric
    return "aas_ms" if metric == "timestamps" else "accuracy"


def _texts(folder: Path) -> Texts:
    """Items and texts of an evaluation by source and id."""
    path = folder / TEXTS
    if not path.is_file():
        raise ConfigError(f"{folder}: no {TEXTS} here; name the output_dir of an evaluation (launch/evaluate.py)")
    return {(item.source, item.id): (item, text) for item, text, _ in read_texts(path)}
