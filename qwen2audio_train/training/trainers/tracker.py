"""Weights & Biases: the lines of `log.jsonl`, from rank 0; a resumed run goes on in the run that it began in."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tracker import TrackerConfig, WandbMode
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.errors import UserError
from qwen2audio_train.layout import SAMPLING_RATE

RUN_ID_FILE = "wandb_run_id"
DEFAULT_PROJECT = "qwen2audio-train"


def wandb_mode(tracker: TrackerConfig, environment: Mapping[str, str]) -> WandbMode:
    """Where lines go: what the recipe says; `auto`: as WANDB_MODE says, else online when there is a key."""
    if tracker.wandb is not WandbMode.auto:
        return tracker.wandb
    known = {"online": WandbMode.online, "offline": WandbMode.offline, "dryrun": WandbMode.offline}
    if given := environment.get("WANDB_MODE"):
        return known.get(given, WandbMode.off)
    return WandbMode.online if environment.get("WANDB_API_KEY") else WandbMode.off


class Wandb(TrainerCallback):
    """Hand the log lines to Weights & Biases, from rank 0.

    The id of the run there is kept in `wandb_run_id` of the run folder: a start from a checkpoint goes on with it, a
    start from step 0 is another run.
    """

    def __init__(self, config: StageConfig, settings: dict[str, Any], mode: WandbMode) -> None:
        self.config = config
        self.settings = settings
        self.mode = mode
        self.run: Any = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run.

        Raises:
            UserError: Weights & Biases refuses, or cannot be reached.
        """
        if not state.is_world_process_zero:
            return
        import wandb

        config, tracker = self.config, self.config.tracker
        try:
            self.run = wandb.init(
                project=tracker.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
                entity=tracker.entity,
                group=tracker.group,
                job_type=config.stage.value,
                name=config.name,
                id=os.environ.get("WANDB_RUN_ID") or self._run_id(goes_on=state.global_step > 0),
                resume="allow",
                dir=config.run_dir,
                mode="offline" if self.mode is WandbMode.offline else "online",
                config=self.settings,
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise UserError(
                f"tracker.wandb={self.mode.value}: Weights & Biases cannot be used ({error}); "
                "set tracker.wandb=offline (or WANDB_MODE=offline), and `wandb sync` later"
            ) from error

    def _run_id(self, goes_on: bool) -> str:
        path = Path(self.config.run_dir) / RUN_ID_FILE
        if not goes_on or not path.is_file():
            path.write_text(secrets.token_hex(4))
        return path.read_text()

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.run is not None and logs:
            self.run.log(logs, step=state.global_step)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the first decoded answers, with what was heard."""
        path = Path(self.config.run_dir) / "decoded" / f"step-{state.global_step}" / "texts.jsonl"
        if self.run is None or not path.is_file():
            return
        import wandb

        table = wandb.Table(columns=["source", "reference", "answer", "audio"])
        for record in islice(json_lines(path), self.config.decoded.shown):
            clip = next(iter(record["clips"]), None)
            audio = None if clip is None else wandb.Audio(load_audio(Clip(**clip)), SAMPLING_RATE)
            table.add_data(record["source"], record["reference"], record["text"], audio)
        self.run.log({"decoded/answers": table}, step=state.global_step)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run is not None:
            self.run.finish()
