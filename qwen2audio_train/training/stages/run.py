"""What every stage does around its trainer: the run folder, what its checkpoints say, start and resume."""

from __future__ import annotations

import hashlib
import json
import random
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

from qwen2audio_train.config.data import DataConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.samples.recipe import recipe_of, save_inputs
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.stages.process import process, warnings_only
from qwen2audio_train.training.trainers.packed import PackedTrainer, RunFiles

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate")


def open_run(config: StageConfig) -> None:
    """Seed everything, and make the run folder this process's own (rank 0).

    Raises:
        ConfigError: the folder cannot be written to, or another process is training in it.
    """
    warnings_only()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if process().is_main_process:
        folders.hold(Path(config.run_dir))


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
    lineage = {
        "stage": config.stage.value,
        "init_from": config.init_from,
        "base": base_hash(config),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    samples = recipe_of(config.data, config.model.num_mel_bins)
    return RunFiles(text, lineage, partial(save_inputs, tokenizer, samples))


def base_hash(config: StageConfig) -> dict[str, str] | None:
    """Checksums of the local weights that a stage starts from, on rank 0; None for a hub id or random weights."""
    if config.init_from is None or not process().is_main_process:
        return None
    folder = Path(folders.weights_folder(config.init_from))
    return {file.name: folders.checksum(file) for file in sorted(folder.glob("*.safetensors"))} or None


def fit(trainer: PackedTrainer, config: StageConfig) -> None:
    """Train from the newest complete checkpoint, or from the start, and leave a checkpoint of the last step behind."""
    trainer.remove_callback(PrinterCallback)
    point = folders.resume_point(config.resume, Path(config.run_dir))
    if point is not None:
        done = folders.step_of(point) >= trainer.args.max_steps
        if trainer.args.should_save:
            print(f"{point} is of the last step: nothing to do" if done else f"resuming from {point}")
        if done:
            return
    trainer.train(resume_from_checkpoint=str(point) if point else None)
    trainer.save_final_checkpoint()


def settings(config: StageConfig) -> dict[str, Any]:
    """The config as plain values, for the tracker."""
    return json.loads(json.dumps(asdict(config), default=lambda value: value.value))
