"""What one evaluation leaves for the summary of a run: `stage.json`, read again when all stages are done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_train.data.examples import ChatExample, Clip, TaskExample, clips_of
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.evaluation.reporting.summary import (
    MetricRecord,
    RunSummary,
    Showcase,
    StageRecord,
    metric_records,
    pair_records,
)
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, plain
from qwen2audio_train.evaluation.scoring.likelihood import PairScores
from qwen2audio_train.evaluation.scoring.table import NAMES, aligned, interval_text, value_text

FILE = "stage.json"


def save_stage(result: Evaluation, pairs: Mapping[str, PairScores], folder: str | Path) -> None:
    """Write the scores of an evaluation, of held-out pairs too, beside its texts."""
    heard = {"own": ""}
    records = list(metric_records(result))
    for audio, scores in pairs.items():
        records += pair_records(scores, "pairs", heard.get(audio, audio))
    saved = {
        "metrics": [dataclasses.asdict(record) for record in records],
        "loss": result.loss,
        "caveats": result.caveats,
        "evaluate_s": result.wall_s,
    }
    Path(folder, FILE).write_text(json.dumps(plain(saved), indent=1, ensure_ascii=False) + "\n")


def read_stage(folder: str | Path, name: str, wall_s: float, steps: int) -> tuple[StageRecord, list[str]]:
    """The record of a stage from its evaluation's folder, and the caveats of its figures."""
    saved: dict[str, Any] = json.loads(Path(folder, FILE).read_text())
    metrics = tuple(MetricRecord(**record) for record in saved["metrics"])
    record = StageRecord(name, wall_s, steps, metrics, evaluate_s=saved["evaluate_s"], loss=saved["loss"])
    return record, saved["caveats"]


def choose_showcase(
    folders: Mapping[str, str | Path], manifests: Sequence[str | Path], most: int = 12
) -> tuple[Showcase, ...]:
    """A few held-out recordings with what every stage decoded: the first of a source whose audio is one clip, and of
    every task one before any has two.

    Args:
        folders: evaluation folder per stage.
        manifests: held-out manifests of task and chat form.
    """
    texts = {stage: _texts(Path(folder, "texts.jsonl")) for stage, folder in folders.items()}
    first: dict[str, tuple[str, Showcase]] = {}
    for example in (example for manifest in manifests for example in read_manifest(manifest)):
        records = {stage: found[example.id] for stage, found in texts.items() if example.id in found}
        if len(clips_of(example)) == 1 and records and example.source not in first:
            record = next(iter(records.values()))
            decoded = {stage: found["text"] for stage, found in records.items()}
            shown = _showcase(example, clips_of(example)[0], str(record["reference"]), decoded)
            first[example.source] = record["task"], shown
    tasks = [task for task, _ in first.values()]
    turn = [tasks[:place].count(task) for place, task in enumerate(tasks)]
    chosen = sorted(sorted(range(len(turn)), key=turn.__getitem__)[:most])
    return tuple([showcase for _, showcase in first.values()][place] for place in chosen)


def stage_table(summary: RunSummary) -> str:
    """Every held-out score after each stage, as aligned columns."""
    rows: dict[tuple[str, str, str, str, str, str], list[str]] = {}
    for place, stage in enumerate(summary.stages):
        for record in stage.metrics:
            key = (record.source, record.language or "", record.kind, record.metric, record.scoring, record.prompt)
            cells = rows.setdefault(key, ["–"] * len(summary.stages))
            interval = interval_text(record.metric, record.low, record.high)
            cells[place] = f"{value_text(record.metric, record.value)} {interval}".strip()
    header = ["source", "lang", "part", "metric", *(f"after {stage.name}" for stage in summary.stages)]
    body = [
        [source, lang, kind, NAMES.get(metric, metric), *cells, *stamps]
        for (source, lang, kind, metric, *stamps), cells in rows.items()
    ]
    return aligned([*header, "scored by", "asked by"], body)


def _showcase(example: Any, clip: Clip, reference: str, decoded: dict[str, str]) -> Showcase:
    question = example.question if isinstance(example, TaskExample) else None
    if isinstance(example, ChatExample):
        written = [part for message in example.messages[:1] for part in message.content if isinstance(part, str)]
        question = " ".join(written) or None
    place = (clip.path, reference, decoded, question, clip.start_s, clip.end_s)
    return Showcase(example.id, example.source, *place)


def _texts(path: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in json_lines(path)}
