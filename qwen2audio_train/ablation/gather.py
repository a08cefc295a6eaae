"""The figures of an ablation's runs: scores of every seed, paired changes against the baseline, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2audio_train.ablation.order import changed_keys, check_order
from qwen2audio_train.ablation.study import BASELINE, Run
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.evaluation.reporting.compare import compare, compare_all
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.evaluation.reporting.stage_record import read_stage
from qwen2audio_train.evaluation.scoring.bootstrap import Difference
from qwen2audio_train.training.chain import LEDGER, Ledger

Key = tuple[str, str, str | None, str]
"""Source, task, language and metric of a score."""

LOSS: Key = ("all held-out sources", "", None, "loss")


@dataclass(frozen=True)
class Change:
    """One score of an overlay beside the baseline's.

    Attributes:
        baseline, values: of every seed.
        difference: overlay minus baseline over the utterances, counts summed over the seeds; None for scores that have
            no counts per utterance (BLEU, loss).
        by_seed: overlay minus baseline of every seed.
    """

    key: Key
    n: int
    baseline: tuple[float, ...]
    values: tuple[float, ...]
    difference: Difference | None
    by_seed: tuple[float, ...]

    @property
    def agrees(self) -> bool:
        """Whether the change has one sign under all seeds."""
        return all(value > 0 for value in self.by_seed) or all(value < 0 for value in self.by_seed)

    @property
    def is_clear(self) -> bool:
        """Whether it is beyond chance: the interval leaves zero out, and all seeds agree."""
        return self.agrees and self.difference is not None and not self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class Cost:
    """What the runs of an arm took, each on average: wall seconds of training and scoring, tokens, hours of audio."""

    train_s: float
    evaluate_s: float
    tokens: float
    audio_hours: float


@dataclass(frozen=True)
class Arm:
    """An overlay, or the baseline, over its seeds.

    Attributes:
        changed: the keys that it changes, of the stage that is scored or an earlier one.
        order: how its order of examples compares with the baseline's, in words.
        losses: (step, loss) of every seed's training.
    """

    name: str
    cost: Cost
    losses: tuple[tuple[tuple[int, float], ...], ...]
    changed: tuple[str, ...] = ()
    order: str = ""
    changes: tuple[Change, ...] = ()


def gather(runs: Sequence[Run], metrics: Sequence[str], bootstrap_samples: int) -> list[Arm]:
    """The arms whose runs are done under every seed that the baseline has done; the baseline first, without changes.

    Args:
        metrics: those to keep; empty keeps all.
    """
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_done():
            arms.setdefault(run.overlay, []).append(run)
    if BASELINE not in arms:
        return []
    baseline = {run.seed: run for run in arms.pop(BASELINE)}
    found = [Arm(BASELINE, cost_of(list(baseline.values())), tuple(map(losses_of, baseline.values())))]
    for name, own in arms.items():
        pairs = [(baseline[run.seed], run) for run in own if run.seed in baseline]
        if not pairs:
            continue
        orders = {check_order(first.folder, second.folder) for first, second in pairs}
        found.append(
            Arm(
                name,
                cost_of(own),
                tuple(map(losses_of, own)),
                tuple(overlaid_keys(*pairs[0])),
                "; ".join(sorted(orders)),
                tuple(changes_of(pairs, metrics, bootstrap_samples)),
            )
        )
    return found


def overlaid_keys(baseline: Run, overlay: Run) -> list[str]:
    """Keys that differ in any of the overlay's stages; those of an earlier stage name it."""
    return [
        key if stage == overlay.stage else f"{stage}: {key}"
        for stage in overlay.recipe.stages
        for key in changed_keys(Path(baseline.recipe.run_dir) / stage, Path(overlay.recipe.run_dir) / stage)
    ]


def changes_of(pairs: Sequence[tuple[Run, Run]], metrics: Sequence[str], bootstrap_samples: int) -> list[Change]:
    """Every score that both sides have, the held-out loss first."""
    folders = [(first.folder / "evaluation", second.folder / "evaluation") for first, second in pairs]
    scores = [tuple(map(scores_of, both)) for both in folders]
    tested = {
        (c.source, c.task, c.language, c.metric): c.difference
        for c in compare_all(folders, bootstrap_samples=bootstrap_samples).comparisons
    }
    by_seed = [
        {
            (c.source, c.task, c.language, c.metric): c.difference.value
            for c in compare(*both, bootstrap_samples=1).comparisons
        }
        for both in folders
    ]
    found = []
    for key in scores[0][1]:
        if (metrics and key[3] not in metrics) or not all(key in side for both in scores for side in both):
            continue
        first, second = ([both[place][key] for both in scores] for place in (0, 1))
        before, after = (tuple(value for value, _ in side) for side in (first, second))
        moved = (
            [seed[key] for seed in by_seed] if key in tested else [b - a for a, b in zip(before, after, strict=True)]
        )
        found.append(Change(key, second[0][1], before, after, tested.get(key), tuple(moved)))
    return found


def scores_of(folder: Path) -> dict[Key, tuple[float, int]]:
    """Value and n of every score of an evaluation, and the mean loss per label over all its sources."""
    record, _ = read_stage(folder, "", 0.0, 0)
    labels = sum(source["labels"] for source in record.loss.values())
    found = {}
    if labels:
        total = sum(source["loss"] * source["labels"] for source in record.loss.values())
        found[LOSS] = (total / labels, int(labels))
    for row in read_result(folder.parent.name, folder).rows:
        if not row.kind:
            found[row.source, row.task, row.language, row.score.metric] = (row.score.value, row.score.n)
    return found


def losses_of(run: Run) -> tuple[tuple[int, float], ...]:
    return tuple((line["step"], line["loss"]) for line in log_of(run.folder) if "loss" in line)


def cost_of(runs: Sequence[Run]) -> Cost:
    """Means over the seeds, of the stages that the runs did themselves."""
    wall = [Ledger(Path(run.recipe.run_dir) / LEDGER).entries for run in runs]
    logs = [log_of(Path(run.recipe.run_dir) / stage) for run in runs for stage in run.recipe.stages]
    lines = [line for log in logs for line in log if "loss" in line]
    last = [[line for line in log if "loss" in line][-1] for log in logs]
    hours = sum(
        value for line in last for key, value in line.items() if key.startswith("data/") and key.endswith("/hours")
    )
    seconds = [
        sum(entry.wall_s.get(what, 0.0) for entries in wall for entry in entries.values())
        for what in ("train", "evaluate")
    ]
    count = len(runs)
    return Cost(
        seconds[0] / count, seconds[1] / count, sum(line.get("tokens", 0) for line in lines) / count, hours / count
    )


def log_of(folder: Path) -> list[Mapping[str, Any]]:
    return list(json_lines(folder / "log.jsonl"))
