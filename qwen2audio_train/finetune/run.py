"""The fine-tune itself: score, train, score again, export; each by its own script, and none a second time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.storage.files import write_whole
from qwen2audio_train.evaluation.reporting.write import ReportOptions, write_results
from qwen2audio_train.finetune.corpus import Prepared, prepare
from qwen2audio_train.finetune.outcome import add_to_card, gather, outcome_table
from qwen2audio_train.finetune.plan import Plan, described, make_plan, num_mel_bins
from qwen2audio_train.training.chain import LEDGER, Entry, Ledger, run_script
from qwen2audio_train.training.stages.argument_table import check_trainer_keys
from qwen2audio_train.training.stages.arguments import arguments_class
from qwen2audio_train.training.stages.run import as_yaml

Compose = Callable[[str, list[str]], Any]
"""(`sft`, `evaluate` or `export`, overrides) -> checked config."""


def finetune(config: FinetuneConfig, compose: Compose, launch_folder: Path, command: str) -> str:
    """Run what is not done, and write `summary.json`, `report.html` and the model card of the export.

    Args:
        launch_folder: where `sft.py`, `evaluate.py` and `export.py` are.
        command: the command line, for the card.

    Returns:
        What is to be printed last.

    Raises:
        ConfigError: the corpus, the checkpoint or a key is refused, or what is done was done with others.
        StageFailed: a script ended with an error.
    """
    for key in ("guard", "replay"):
        if (path := getattr(config, key)) and not Path(path).is_file():
            raise ConfigError(f"{key}: no file {path!r} (looked in {Path.cwd()})")
    if config.guard and config.name in {example.source for example in read_manifest(config.guard)}:
        raise ConfigError(f"name={config.name}: the guard has a source of that name too; choose another name=")
    run_dir = Path(config.run_dir)
    start = start_weights(config, compose)  # before a clip is read: what is not there is told at once
    found = prepare(config, run_dir / "data")
    plan = make_plan(config, found, start)
    check(plan, compose)
    data = write_data(found, run_dir / "data", Ledger(run_dir / LEDGER))
    (run_dir / "config.yaml").write_text(as_yaml(config))
    print(described(config, found, plan), flush=True)
    steps = {"before": "evaluate", "training": "sft", "after": "evaluate", "export": "export"}
    arguments = {"before": plan.before, "training": plan.train, "after": plan.after, "export": plan.export}
    ledger = Ledger(run_dir / LEDGER)
    done = [
        run_once(ledger, name, launch_folder / f"{script}.py", arguments[name], data, config.nproc_per_node)
        for name, script in steps.items()
    ]
    summary = gather(config, found, plan, {name: entry.wall_s for name, entry in ledger.entries.items()})
    write_whole(run_dir / "summary.json", [json.dumps(summary, indent=1, ensure_ascii=False) + "\n"])
    results = {name: str(run_dir / name) for name in ("before", "after")}
    options = ReportOptions(results, output=str(run_dir / "report.html"), title=f"Fine-tune: {config.name}")
    page = write_results(options)
    add_to_card(config, summary, plan, command, run_dir / "export")
    nothing = [] if any(done) else [f"nothing to do: {run_dir} is finished"]
    return "\n".join([*nothing, outcome_table(summary), f"model: {run_dir / 'export'}", f"report: {page}"])


def start_weights(config: FinetuneConfig, compose: Compose) -> str:
    """The weights that the training starts from, which are scored before.

    Raises:
        ConfigError: there are none.
    """
    num_mel_bins(config)
    model = compose("sft", [f"model={config.model}", f"adapter={config.adapter}", "model.dtype=float32"]).model
    start = config.init_from or model.path
    if start is None:
        raise ConfigError(f"model={config.model}: names no trained weights; set init_from=... to a checkpoint")
    return str(start)


def check(plan: Plan, compose: Compose) -> None:
    """Raises ConfigError for keys that one of the scripts would refuse."""
    stage = compose("sft", plan.train)
    check_trainer_keys(stage.trainer, arguments_class(stage))
    for root, overrides in (("evaluate", plan.before), ("evaluate", plan.after), ("export", plan.export)):
        compose(root, overrides)


def write_data(found: Prepared, folder: Path, ledger: Ledger) -> str:
    """Write both manifests and the list of what was left out.

    Returns:
        A hash of the manifests.

    Raises:
        ConfigError: the run has begun with other data.
    """
    sides = {"train": found.train, "held_out": found.held_out}
    texts = {name: manifest_text(examples, folder) for name, examples in sides.items()}
    for name, text in texts.items():
        path = folder / f"{name}.jsonl"
        if ledger.entries and path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{path}: the corpus or its split has changed since this run began; choose another run_dir="
            )
    for name, text in texts.items():
        write_whole(folder / f"{name}.jsonl", [text])
    write_whole(folder / "left_out.txt", (f"{reason}\n" for reason in found.left_out))
    return "".join(texts.values())


def manifest_text(examples: Sequence[Example], folder: Path) -> str:
    return "".join(json.dumps(to_record(example, folder), ensure_ascii=False) + "\n" for example in examples)


def run_once(ledger: Ledger, name: str, script: Path, arguments: list[str], data: str, ranks: int) -> bool:
    """Run a script unless the ledger has it done with the same arguments and data; whether it was run.

    Raises:
        ConfigError: the training is finished, with other keys.
    """
    digest = hashlib.sha256("\n".join([*arguments, data]).encode()).hexdigest()
    entry = ledger.entries.get(name)
    if entry is not None and entry.trained and entry.config_sha256 == digest:
        return False
    if entry is not None and entry.trained and name == "training":
        raise ConfigError(
            f"{ledger.path.parent} is finished, and its keys have changed since (compare training/config.yaml there); "
            "put them back, or choose another run_dir="
        )
    if entry is None or entry.config_sha256 != digest:
        ledger.entries[name] = entry = Entry(digest)
    print(f"{name}: {script.name} {' '.join(arguments)}", flush=True)
    with ledger.timed(entry, name):
        run_script(script, arguments, 1 if name == "export" else ranks)
        entry.trained = True
    return True
