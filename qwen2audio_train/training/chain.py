"""The stages of a recipe in a row: each in its own torchrun, from the one before, picking up where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.reporting.stage_record import choose_showcase, read_stage
from qwen2audio_train.evaluation.reporting.summary import RunSummary, StageRecord, write_summary
from qwen2audio_train.training.checkpoints.folder import hold
from qwen2audio_train.training.stages.argument_table import check_trainer_keys
from qwen2audio_train.training.stages.arguments import arguments_class
from qwen2audio_train.training.stages.run import as_yaml
from qwen2audio_train.training.trainers.stop import STOPPED

LEDGER = "ledger.json"

SAVING_S = 300
"""What torchrun gives its ranks to finish a step and save it after a signal; its own default is 30 seconds."""
STOPPING_S = SAVING_S + 10.0


Compose = Callable[[str, list[str]], Any]
"""(stage or `evaluate`, overrides) -> checked config, `StageConfig` or `EvaluateConfig`."""


class StageFailed(UserError):
    """A stage, or its evaluation, ended with an error."""


@dataclass
class Entry:
    """What the ledger says of one stage: hashes of the config that it ran with and of the evaluation that is done."""

    config_sha256: str
    trained: bool = False
    evaluated: str = ""
    wall_s: dict[str, float] = field(default_factory=dict)


class Ledger:
    """`ledger.json` of a recipe's run folder, written whole after each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            saved = json.loads(path.read_text()) if path.is_file() else {}
            self.entries = {name: Entry(**entry) for name, entry in saved.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: damaged, it is no ledger of stages ({error}); delete it, or another name="
            ) from error

    @contextmanager
    def timed(self, entry: Entry, what: str) -> Iterator[None]:
        """Add the seconds of some work to an entry, also when it is broken off, and save what was done."""
        started = time.time()
        try:
            yield
        finally:
            entry.wall_s[what] = round(entry.wall_s.get(what, 0.0) + time.time() - started, 1)
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({name: asdict(entry) for name, entry in self.entries.items()}, indent=1))
        partial.rename(self.path)


def stage_overrides(recipe: RecipeConfig, name: str, before: str | None) -> list[str]:
    """Overrides of a stage's own root: its place in the run, the recipe's, then its own."""
    place = [f"name={recipe.name}-{name}", f"run_dir={recipe.run_dir}/{name}", f"seed={recipe.seed}"]
    place.append(f"tracker.group={recipe.name}")
    start = [] if before is None else [f"{recipe.stages[before].hands_on}={recipe.run_dir}/{before}"]
    return [*place, *start, *recipe.overrides, *recipe.stages[name].overrides]


def overrides_of(recipe: RecipeConfig) -> dict[str, list[str]]:
    """Overrides of every stage, which starts from the one before it."""
    names = list(recipe.stages)
    return {name: stage_overrides(recipe, name, before) for before, name in zip([None, *names], names, strict=False)}


def stage_configs(recipe: RecipeConfig, compose: Compose) -> dict[str, StageConfig]:
    """The config of every stage, all of them and their evaluations checked before anything runs.

    Raises:
        ConfigError: one of them is refused.
    """
    configs: dict[str, StageConfig] = {}
    for name, overrides in overrides_of(recipe).items():
        configs[name] = compose(name, overrides)
        check_trainer_keys(configs[name].trainer, arguments_class(configs[name]))
        if recipe.stages[name].decodes:
            compose("evaluate", _evaluation(recipe, name))
    return configs


def run_stages(recipe: RecipeConfig, compose: Compose, launch_folder: Path) -> dict[str, Entry]:
    """Train and evaluate every stage that is not done.

    Args:
        launch_folder: where `pretrain.py`, `sft.py`, `dpo.py` and `evaluate.py` are.

    Raises:
        ConfigError: a config is refused, another recipe runs in the folder, or a stage is finished and its config is no
            longer the one that it was trained with.
        StageFailed: a process ended with an error.
    """
    overrides = overrides_of(recipe)
    digests = {name: _hash(as_yaml(config)) for name, config in stage_configs(recipe, compose).items()}
    hold(Path(recipe.run_dir))  # two recipes in one folder would each write their own ledger over the other's
    ledger = Ledger(Path(recipe.run_dir) / LEDGER)
    for name in digests:
        entry = ledger.entries.setdefault(name, Entry(digests[name]))
        if entry.config_sha256 != digests[name]:
            if entry.trained:
                raise ConfigError(
                    f"stage {name} of {recipe.run_dir} is finished, and its config has changed since (compare "
                    f"{recipe.run_dir}/{name}/config.yaml); put it back, or choose another name="
                )
            ledger.entries[name] = entry = Entry(digests[name])
        if not entry.trained:
            with ledger.timed(entry, "train"):
                if recipe.stages[name].pairs:
                    run_script(launch_folder / "pairs.py", _sampling(recipe, name), recipe.nproc_per_node)
                run_script(launch_folder / f"{name}.py", overrides[name], recipe.nproc_per_node)
                entry.trained = True
        evaluation = _evaluation(recipe, name)
        if recipe.stages[name].decodes and entry.evaluated != _hash(str(evaluation)):
            with ledger.timed(entry, "evaluate"):
                run_script(launch_folder / "evaluate.py", evaluation, recipe.nproc_per_node)
                entry.evaluated = _hash(str(evaluation))
    return ledger.entries


def summarise(recipe: RecipeConfig, entries: Mapping[str, Entry], held_out: Sequence[str]) -> RunSummary:
    """Gather the stages' figures and logs into `summary.json`, `log.jsonl` and `config.yaml` of the run folder.

    Args:
        held_out: manifests that the showcase of the report is taken from.
    """
    run_dir = Path(recipe.run_dir)
    stages, caveats, log = [], [], []
    for name, entry in entries.items():
        lines = (run_dir / name / "log.jsonl").read_text().splitlines(keepends=True)
        steps = max(json.loads(line)["step"] for line in lines)
        log += lines
        if not entry.evaluated:
            stages.append(StageRecord(name, entry.wall_s["train"], steps, metrics=()))
            continue
        stage, notes = read_stage(run_dir / name / "evaluation", name, entry.wall_s["train"], steps)
        stages.append(stage)
        caveats += notes
    folders = {name: run_dir / name / "evaluation" for name, entry in entries.items() if entry.evaluated}
    summary = RunSummary(
        name=recipe.name,
        wall_s=round(sum(sum(entry.wall_s.values()) for entry in entries.values()), 1),
        stages=tuple(stages),
        showcase=choose_showcase(folders, held_out),
        caveats=tuple(dict.fromkeys(caveats)),
    )
    (run_dir / "log.jsonl").write_text("".join(log))
    (run_dir / "config.yaml").write_text(as_yaml(recipe))
    write_summary(summary, run_dir)
    return summary


def held_out_manifests(recipe: RecipeConfig) -> list[str]:
    """Manifests that the recipe evaluates on, from its `evaluate` overrides."""
    overrides = [*recipe.evaluate, *(text for stage in recipe.stages.values() for text in stage.evaluate)]
    return [text.split("=", 1)[1] for text in overrides if text.startswith("manifests.")]


def _evaluation(recipe: RecipeConfig, name: str) -> list[str]:
    folder = f"{recipe.run_dir}/{name}"
    place = [f"checkpoint={folder}", f"output_dir={folder}/evaluation", f"seed={recipe.seed}"]
    return [*place, *recipe.evaluate, *recipe.stages[name].evaluate]


def _sampling(recipe: RecipeConfig, name: str) -> list[str]:
    """Arguments of `pairs.py`: answers of the stage before `name`, paired in the recipe's run folder."""
    names = list(recipe.stages)
    place = [f"checkpoint={recipe.run_dir}/{names[names.index(name) - 1]}", f"output={recipe.run_dir}/pairs.jsonl"]
    return ["sample", *place, f"seed={recipe.seed}", *recipe.stages[name].pairs]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_script(script: Path, overrides: Sequence[str], ranks: int) -> None:
    """Run a launch script under torchrun, its output going where ours goes.

    Raises:
        StageFailed: it ended with an error.
        SystemExit: with the status `stop.STOPPED`, after a signal.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_S), **os.environ}
    with subprocess.Popen([*command, str(script), *overrides], env=environment) as process, passing_on(process) as sent:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # A terminal tells torchrun too, which has its ranks to stop: killing it would leave them running.
            try:
                process.wait(timeout=STOPPING_S)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise
    if status and sent:
        sys.exit(STOPPED)
    if status:
        raise StageFailed(f"{script.name} ended with status {status}; mend it and start the recipe again")


@contextmanager
def passing_on(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGUSR1 on to torchrun as SIGTERM, which it hands to its ranks; yields those that came."""
    sent: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        sent.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
