"""The model card of an export, its README.md: what it came from, what it heard under which licences, how it scores.

All of it is read from what lies beside the weights: the checkpoint's `config.yaml` and `lineage.json`, those of the
stages before it, the manifests of its sources, and the folder of an evaluation. What is not there is said not to be.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen2audio_train.data.storage.paths import expand_paths
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.reporting.results import METRICS, Result, read_result
from qwen2audio_train.evaluation.scoring.table import NAMES, extra_text, score_text, value_text
from qwen2audio_train.families.family import Family

LICENCES = ("licence", "license")
"""Names in `meta`, of a manifest line or of a source's constants, that say under which licence a recording is."""

UNKNOWN = "not stated"

CARD = """---
library_name: {library}
pipeline_tag: audio-text-to-text
tags: [{family}]
license: other
license_name: see-data-below{base}{index}
---
# {name}

{what} Plain {library} loads this folder.

## Evaluation

{evaluation}
## Data

{data}
The licences of the recordings hold for what was trained on them, and so does that of the weights it started from: look
them up before you pass this folder on.

## Lineage

{lineage}
## Commands

```bash
{commands}
```
{recipe}"""


def write_card(
    folder: str | Path, weights: str, family: Family, command: Sequence[str], *, evaluation: str | None = None
) -> Path:
    """README.md of the export in `folder`.

    Args:
        weights: folder (or hub id) of what was exported.
        command: the words of the export's command line.
        evaluation: folder of `launch/evaluate.py`; unset, the `evaluation` of the checkpoint or of its run, if any.
    """
    stages = list(lineage(weights))
    config = stages[-1]["config"] if stages else {}
    path = evaluation or next(filter(has_evaluation, evaluations_of(weights)), None)
    result = read_result("this", path) if path else None
    name = config.get("name") or Path(folder).absolute().name
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    base = start_of(folder, stages, is_adapter)
    text = CARD.format(
        library="peft" if is_adapter else "transformers",
        family=family.name,
        base=f"\nbase_model: {json.dumps(base)}" if base else "",
        index=model_index(name, result) if result else "",
        name=name,
        what=f"{'An adapter on' if is_adapter else 'Trained from'} `{base}`." if base else "Trained from nothing.",
        evaluation=evaluation_text(result, path),
        data=data_text(stages),
        lineage=lineage_text(stages),
        commands="\n".join([*(stage["command"] for stage in stages if stage["command"]), shlex.join(command)]),
        recipe=f"\n## Recipe\n\n```yaml\n{as_yaml(config)}```\n" if config else "",
    )
    readme = Path(folder, "README.md")
    readme.write_text(text, encoding="utf-8")
    return readme


def lineage(weights: str) -> Iterator[dict[str, Any]]:
    """The stages that led to these weights, the first one first: name, steps, config, command, what it started from."""
    checkpoint = Path(weights).parent
    if not (checkpoint / "lineage.json").is_file():
        return
    said = json.loads((checkpoint / "lineage.json").read_text(encoding="utf-8"))
    if said.get("start"):
        yield from lineage(said["start"])
    state = checkpoint / "trainer_state.json"
    config = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    script = said.get("command")
    yield {
        "stage": said["stage"],
        "step": json.loads(state.read_text())["global_step"] if state.is_file() else None,
        "config": config,
        "command": f"torchrun --nproc_per_node {said['world_size']} {shlex.join(script)}" if script else "",
        **{key: said.get(key) for key in ("start", "base", "config_sha256", "commit", "versions")},
    }


def start_of(folder: str | Path, stages: Sequence[Mapping[str, Any]], is_adapter: bool) -> str | None:
    """Hub id or folder that the weights go back to."""
    if is_adapter:
        named = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
        return str(named)
    if not stages:
        return None
    model, first = stages[0]["config"].get("model", {}), stages[0].get("start")
    return first or model.get("path") or model.get("language_model")


def evaluations_of(weights: str) -> list[str]:
    """Where an evaluation of these weights may be: of themselves, of their checkpoint, of their run."""
    return [str(folder / "evaluation") for folder in (Path(weights), *list(Path(weights).parents)[:2])]


def has_evaluation(folder: str) -> bool:
    return Path(folder, METRICS).is_file()


def evaluation_text(result: Result | None, path: str | None) -> str:
    """The scores as a table with intervals, how each was made, and the notes on them."""
    if result is None:
        return "None was found beside the weights (`launch/evaluate.py checkpoint=...` makes one).\n"
    header = ("set", "metric", "value", "95 %", "n", "beside it", "published", "scored by", "asked by")
    rows = [header, ("---",) * len(header)]
    for row in result.rows:
        published = ", ".join(f"{who} {value_text(row.score.metric, v)}" for who, v in row.published.items())
        where = " ".join(filter(None, (row.source, row.language, row.kind)))
        metric, beside = NAMES.get(row.score.metric, row.score.metric), extra_text(row.score)
        stamps = (row.scoring, row.prompt)
        rows.append((where, metric, *score_text(row.score), str(row.score.n), beside, published, *stamps))
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    notes = [f"- {caveat}" for caveat in result.caveats]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), "Values with 95 % bootstrap intervals.", ""])


def model_index(name: str, result: Result) -> str:
    """The scores as the hub reads them, in the card's metadata."""
    found = [
        {
            "task": {"type": row.task},
            "dataset": {"name": row.source, "type": row.source},
            "metrics": [{"type": row.score.metric, "value": round(row.score.value, 6), "name": row.scoring}],
        }
        for row in result.rows
        if not row.kind and row.score.value == row.score.value
    ]
    index = {"model-index": [{"name": name, "results": found}]}
    return "\n" + as_yaml(index).rstrip() if found else ""


def as_yaml(value: Any) -> str:
    """In the order that it has."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def data_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """Sources by stage, with the licences that their manifests state."""
    rows = [("stage", "source", "weight", "licence"), ("---",) * 4]
    for stage in stages:
        data = stage["config"].get("data", {})
        for name, source in (data.get("sources") or {}).items():
            weight = source.get("weight")
            rows.append((stage["stage"], name, "by size" if weight is None else f"{weight:g}", licences(source)))
        if variant := (data.get("selfmade") or {}).get("variant"):
            rows.append((stage["stage"], f"selfmade ({variant})", "", "synthesised by the project"))
    if len(rows) == 2:
        return "Nothing beside the weights says what they were trained on.\n"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def licences(source: Mapping[str, Any]) -> str:
    """Licences of a source with how many lines state them, from its constants or its manifests."""
    constants = source.get("constants") or {}
    if told := next((constants[f"meta.{key}"] for key in LICENCES if f"meta.{key}" in constants), None):
        return str(told)
    found: Counter[str] = Counter()
    try:
        paths = expand_paths(source.get("path") or (), "path")
    except (OSError, UserError):
        return f"{UNKNOWN} (its manifest is no longer there)"
    for path in map(Path, paths):
        if path.suffix == ".jsonl" and path.is_file():
            with path.open(encoding="utf-8") as lines:
                metas = (json.loads(line).get("meta") or {} for line in lines if line.strip())
                found.update(next((str(meta[key]) for key in LICENCES if meta.get(key)), UNKNOWN) for meta in metas)
    if len(found) < 2:
        return next(iter(found), UNKNOWN)
    return ", ".join(f"{name} ({count})" for name, count in found.most_common())


def lineage_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """One line a stage."""
    if not stages:
        return "Nothing beside the weights says where they come from.\n"
    lines = []
    for stage in stages:
        sums = [f"{name} sha256 {digest[:12]}" for name, digest in (stage["base"] or {}).items()]
        facts = [
            f"{stage['step']} steps" if stage["step"] is not None else "",
            f"from `{stage['start']}`" if stage["start"] else "",
            ", ".join(sums[:2]),
            f"config sha256 {stage['config_sha256'][:12]}",
            f"commit {stage['commit']}" if stage["commit"] else "",
            ", ".join(f"{name} {number}" for name, number in (stage["versions"] or {}).items()),
        ]
        lines.append(f"- **{stage['stage']}**: {'; '.join(filter(None, facts))}")
    return "\n".join(lines) + "\n"
