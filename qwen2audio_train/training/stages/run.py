"""What every stage does around its trainer: the run folder, what its checkpoints say, start and resume."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback

from qwen2audio_train import __version__
from qwen2audio_train.config.data import DataConfig, SampleRecipe
from qwen2audio_train.config.parts import PARTS
from qwen2audio_train.config.schema import AdapterKind, Stage, StageConfig
from qwen2audio_train.data.samples.recipe import recipe_of, save_inputs
from qwen2audio_train.export import generation_config
from qwen2audio_train.families.known import family_of
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints.bases import (
    base_of,
    content_of,
    lineage_of,
    mark_used,
    parts_of,
    start_of,
    write_base,
)
from qwen2audio_train.training.checkpoints.writing import disk_failures_in_words
from qwen2audio_train.training.stages.ends import check_watched, end_of, say_how_it_ended, warn_of_early_end
from qwen2audio_train.training.stages.process import process, warnings_only
from qwen2audio_train.training.stages.resume import check_resume, plain, told_by_rank_0
from qwen2audio_train.training.trainers.packed import PackedTrainer, RunFiles
from qwen2audio_train.training.trainers.stop import STOPPED

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate")


def open_run(config: StageConfig) -> None:
    """Seed everything, make the run folder this process's own (rank 0), and see whether it can be gone on from.

    Raises:
        ConfigError: the folder cannot be written to, or another process is training in it.
        CheckpointError: what is to be resumed is damaged, or another recipe's.
    """
    warnings_only()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if process().is_main_process:
        folders.hold(Path(config.run_dir))
    for note in told_by_rank_0(partial(_resume_notes, config, process().num_processes)):
        if process().is_main_process:
            print(f"resume: {note}")


def _resume_notes(config: StageConfig, world_size: int) -> list[str]:
    point, passed_over = folders.resume_point(config.resume, Path(config.run_dir))
    return passed_over + ([] if point is None else check_resume(config, point, world_size))


def as_yaml(config: Any) -> str:
    """A checked config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def make_selfmade(data: DataConfig) -> None:
    """Synthesise the self-made corpus, if the recipe wants it: once, on rank 0, while the other ranks wait."""
    if not data.selfmade.variant:
        return
    from qwen2audio_train.selfmade import build

    chosen = data.selfmade
    with process().main_process_first(), tqdm(desc=f"making {chosen.folder}", unit=" clips", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        build(Path(chosen.folder), variant=chosen.variant, seed=chosen.seed, progress=show)


def run_files(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> RunFiles:
    """What every checkpoint says about where it comes from."""
    text = as_yaml(config)
    before = lineage_of(folders.newest(config.resume, Path(config.run_dir)))
    start = start_of(config)
    main = process().is_main_process
    lineage = {
        "stage": config.stage.value,
        "backend": "none" if config.deepspeed.stage is None else "deepspeed",
        "zero_stage": config.deepspeed.stage,
        "world_size": process().num_processes,
        "dtype": config.model.dtype.value,
        "bf16": bool(config.trainer.get("bf16", False)),
        "trained": [part for part in PARTS if not getattr(config.model.freeze, part)],
        "adapter": None if config.adapter.kind is AdapterKind.none else plain(config.adapter),
        "init_from": config.init_from,
        "start": start,
        "base": before.get("base") if before else (content_of(config) if main else None),
        "command": command_of(config.stage),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {name: version(name) for name in PACKAGES} | {"qwen2audio-train": __version__},
        "commit": source_commit() if main else None,
    }
    needed = base_of(start or parts_of(config).get("model.path", ""), check=False)
    if main and needed and (config.adapter.kind is not AdapterKind.none or config.stage is Stage.dpo):
        for weights in {needed, start or needed}:
            mark_used(weights, config.run_dir)
    samples = recipe_of(config.data, config.model.num_mel_bins, config.model.family)
    return RunFiles(text, lineage, partial(save_companions, tokenizer, samples, needed))


def command_of(stage: Stage) -> list[str] | None:
    """The words that started this stage's script; None where something else did."""
    script = f"{stage.value}.py"
    return [f"launch/{script}", *sys.argv[1:]] if Path(sys.argv[0]).name == script else None


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, with a `+` where files have changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        words = [*git, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
        return subprocess.run(words, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save_companions(tokenizer: PreTrainedTokenizerBase, samples: SampleRecipe, base: str, folder: Path) -> None:
    """Write what weights need beside them: the processor, where decoding ends, and of an adapter what it lies on."""
    save_inputs(tokenizer, samples, folder)
    if not (folder / "adapter_config.json").is_file():
        generation_config(tokenizer, family_of(samples.family)).save_pretrained(folder)
    elif base:
        write_base(folder, base)


def fit(trainer: PackedTrainer, config: StageConfig) -> None:
    """Train from the newest complete checkpoint, or from the start, and write a checkpoint of the last step.

    Raises:
        CheckpointError: the disk is full or read-only, or the run folder was deleted.
        SystemExit: with the status `stop.STOPPED`, after a signal has ended the run before its last step.
    """
    trainer.remove_callback(PrinterCallback)
    check_watched(trainer)
    point = folders.newest(config.resume, Path(config.run_dir))  # verified in `open_run`
    over = None if point is None else end_of(trainer, point)
    if trainer.args.should_save and point is not None:
        print(f"{point} {over}: nothing to do" if over else f"resuming from {point}")
    if over:
        return
    warn_of_early_end(trainer)
    trainer.keep_every_steps = config.keep_every_steps
    writes = disk_failures_in_words(Path(config.run_dir))
    with trainer.stop.heeded(), trainer.watchdog.watching(config.watchdog_s), writes:
        trainer.train(resume_from_checkpoint=str(point) if point else None)
        trainer.save_final_checkpoint()
    say_how_it_ended(trainer)
    if trainer.stopped and trainer.state.global_step < trainer.args.max_steps:
        sys.exit(STOPPED)


def settings(config: StageConfig) -> dict[str, Any]:
    """The config as plain values, for the tracker."""
    return json.loads(json.dumps(asdict(config), default=lambda value: value.value))
