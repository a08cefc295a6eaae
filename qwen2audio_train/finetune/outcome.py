"""What a fine-tune gave: scores before and after with their intervals, as summary, table and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.data.examples import clips_of
from qwen2audio_train.evaluation.reporting.compare import Comparison, compare
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.evaluation.scoring.evaluate import plain
from qwen2audio_train.evaluation.scoring.score import Row
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, aligned, interval_text, value_text
from qwen2audio_train.finetune.corpus import Prepared
from qwen2audio_train.finetune.plan import Plan

HIGHER_IS_BETTER = ("accuracy", "bleu")


def gather(
    config: FinetuneConfig, found: Prepared, plan: Plan, wall_s: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The summary: `before` and `after` hold the held-out scores by metric, `guard` those of the guard set."""
    folders = [Path(config.run_dir, name) for name in ("before", "after")]
    rows = [[row for row in read_result(folder.name, folder).rows if not row.kind] for folder in folders]
    own = [{key: row for key, row in named(side).items() if row.source == config.name} for side in rows]
    guard = [{key: row for key, row in named(side).items() if row.source != config.name} for side in rows]
    changes = {key_of(change): change for change in compare(*folders, seed=config.seed).comparisons}
    names = [short_names(side) for side in own]
    seconds = {name: sum(parts.values()) for name, parts in wall_s.items()}
    return plain(
        {
            "name": config.name,
            **{
                when: {names[i][key]: figures(own[i][key]) for key in own[i]}
                for i, when in enumerate(("before", "after"))
            },
            "change": {names[1][key]: change_of(changes[key]) for key in own[1] if key in changes},
            "guard": {
                " ".join(filter(None, key)): {
                    "before": figures(guard[0][key]),
                    "after": figures(row),
                    "change": change_of(changes[key]) if key in changes else None,
                }
                for key, row in guard[1].items()
                if key in guard[0]
            },
            "labels": found.labels,
            "clips": {"train": len(found.train), "held_out": len(found.held_out), "left_out": len(found.left_out)},
            "hours": {name: hours_of(getattr(found, name)) for name in ("train", "held_out")},
            "split": found.how,
            "steps": plan.steps,
            "wall_s": {**seconds, "all": round(sum(seconds.values()), 1)},
            "caveats": list(read_result("after", folders[1]).caveats),
        }
    )


Key = tuple[str, str, str | None, str]
"""Source, task, language and metric of a score."""


def named(rows: list[Row]) -> dict[Key, Row]:
    return {(row.source, row.task, row.language, row.score.metric): row for row in rows}


def key_of(change: Comparison) -> Key:
    return change.source, change.task, change.language, change.metric


def short_names(rows: Mapping[Key, Row]) -> dict[Key, str]:
    """A name for each score: its metric, with task and language where several share it."""
    metrics = [metric for *_, metric in rows]
    return {
        key: key[3] if metrics.count(key[3]) == 1 else " ".join(filter(None, (key[3], key[1], key[2]))) for key in rows
    }


def figures(row: Row) -> dict[str, Any]:
    score = row.score
    return {"metric": score.metric, "value": score.value, "n": score.n, "interval": [score.low, score.high]} | (
        {"guessing": score.extra["majority"]} if "majority" in score.extra else {}
    )


def change_of(change: Comparison) -> dict[str, Any]:
    """Paired difference, after minus before, and whether its whole interval lies on the bad side."""
    found = change.difference
    is_worse = found.high < 0 if change.metric in HIGHER_IS_BETTER else found.low > 0
    return {**{key: value for key, value in asdict(found).items() if key in ("value", "p_value")}} | {
        "interval": [found.low, found.high],
        "is_worse": is_worse,
    }


def hours_of(examples: Any) -> float:
    return round(sum(clip.duration_s or 0.0 for example in examples for clip in clips_of(example)) / 3600, 4)


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the one table: set, metric, before, after, change, its interval, n."""
    lines = [
        ("held out", name, summary["before"].get(name), after, summary["change"].get(name))
        for name, after in summary["after"].items()
    ]
    lines += [
        (f"guard: {name.rpartition(' ')[0]}", one["after"]["metric"], one["before"], one["after"], one["change"])
        for name, one in summary["guard"].items()
    ]
    rows = []
    for where, name, before, after, change in lines:
        metric = after["metric"]
        values = [
            f"{value_text(metric, one['value'])} {interval_text(metric, *one['interval'])}" if one else "–"
            for one in (before, after)
        ]
        unit = 100 if metric in PERCENT else 1
        moved = (
            [f"{unit * change['value']:+.1f}", "[{:+.1f}, {:+.1f}]".format(*(unit * x for x in change["interval"]))]
            if change and change["value"] is not None
            else ["–", ""]
        )
        rows.append([where, NAMES.get(name, name), *values, *moved, str(after["n"])])
    return rows


HEADER = ("set", "metric", "before", "after", "change", "95 %", "n")


def outcome_table(summary: Mapping[str, Any]) -> str:
    """The one table, warnings where the guard got worse, and the wall time."""
    seconds = summary["wall_s"]
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "all")
    return "\n".join(
        [
            aligned(HEADER, table_rows(summary), right=(4, 6)),
            *warnings(summary),
            *(f"note: {caveat}" for caveat in summary["caveats"]),
            f"wall time: {seconds['all'] / 60:.1f} min ({parts})",
        ]
    )


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """A line for everything that got worse beyond its interval."""
    own = [f"held out, {name}" for name, change in summary["change"].items() if change["is_worse"]]
    guard = [f"guard, {name}" for name, one in summary["guard"].items() if one["change"] and one["change"]["is_worse"]]
    advice = "fewer epochs, or replay=MANIFEST of general data, keep more of what was there"
    return [f"warning: {name} got worse beyond its interval; {advice}" for name in (*own, *guard)]


GAINED = """
## Before and after

{table}

Values with 95 % bootstrap intervals; the change is paired over the same clips.
{warnings}
`{start}` was fine-tuned ({adapter}) on {train} clips ({hours} h) of `{audio}`; {held_out} were held out ({split}),
{left_out} left out as unusable. {answers}
{steps} steps of {packs} packs of up to {tokens} tokens, seed {seed}, {dtype}; training took {train_s:.0f} s. {replay}

```bash
{command}
```
"""


def add_to_card(config: FinetuneConfig, summary: Mapping[str, Any], plan: Plan, command: str, folder: Path) -> None:
    """To the export's README.md: what was gained, and the one command that did it."""
    rows = [HEADER, ["---"] * len(HEADER), *table_rows(summary)]
    text = GAINED.format(
        start=config.init_from or config.model,
        adapter=config.adapter,
        audio=config.audio,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        warnings="".join(f"\n{line}\n" for line in warnings(summary)),
        hours=summary["hours"]["train"],
        split=summary["split"],
        answers=f"Answers: {', '.join(summary['labels'])}." if summary["labels"] else "",
        steps=plan.steps,
        packs=plan.budget.packs_per_step,
        tokens=plan.tokens_per_pack,
        dtype=plan.budget.dtype,
        seed=config.seed,
        train_s=summary["wall_s"]["training"],
        replay=f"`{config.replay}` was mixed in with weight {config.replay_weight:g}." if config.replay else "",
        command=command,
        **summary["clips"],
    )
    card = folder / "README.md"
    written = card.read_text(encoding="utf-8").partition(GAINED.split("{")[0])[0]  # of an export that was not made anew
    card.write_text(written + text, encoding="utf-8")
