"""What is written and shown while a stage trains: `log.jsonl` and a progress bar; Weights & Biases: `tracker.py`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tracker import WandbMode
from qwen2audio_train.training.trainers.tracker import Wandb, wandb_mode


class JsonlLog(TrainerCallback):
    """Append every log line to `log.jsonl`: one JSON object with stage, step, seconds since the start, and figures."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self.started = time.time()

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines beyond the step that training goes on from: they will be written again."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept) if state.global_step else "")

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"stage": self.stage, "step": state.global_step, "seconds": round(time.time() - self.started, 2)}
            # Trainer's epoch is a share of max_steps; passes over the sources are in `data/*/pass`.
            logs = {name: value for name, value in logs.items() if name != "epoch"}
            with self.path.open("a") as file:
                file.write(json.dumps(line | logs) + "\n")


class Progress(TrainerCallback):
    """A bar with loss, speed and memory, and the time that is left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: tqdm[Any] | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, dynamic_ncols=True)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(speed_line(logs))
        elif "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def speed_line(logs: Mapping[str, float]) -> str:
    """A log line on the screen; seconds of audio per second are hours per hour too. The bar says how long is left."""
    shown = [
        f"loss {logs['loss']:.3f}",
        f"{logs['tokens_per_s']:.0f} tokens/s",
        f"{logs['audio_s_per_s']:.0f} audio-h/h",
        *([f"MFU {logs['mfu']:.1%}"] if "mfu" in logs else []),
        f"{logs['peak_memory_gib']:.1f} GiB",
    ]
    return ", ".join(shown)


def callbacks(config: StageConfig, settings: dict[str, Any]) -> list[TrainerCallback]:
    """The callbacks of a stage."""
    chosen: list[TrainerCallback] = [
        JsonlLog(Path(config.run_dir) / "log.jsonl", config.stage.value),
        Progress(config.stage.value),
    ]
    mode = wandb_mode(config.tracker, os.environ)
    if mode is not WandbMode.off:
        chosen.append(Wandb(config, settings, mode))
    return chosen
