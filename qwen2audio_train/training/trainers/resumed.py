"""A trainer goes on from a checkpoint: weights, optimizer, schedule, counters and place in the data, each checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from typing_extensions import override

from qwen2audio_train.model.adapters import adapter_names
from qwen2audio_train.model.ctc import HEAD_FILE
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints import optimizer_state
from qwen2audio_train.training.checkpoints.restore import SavedWeights, published_to_module, restore_weights

CONFIG_FILE = "config.yaml"


class ResumedTrainer(Trainer):
    """Mixin of `PackedTrainer`: what `train(resume_from_checkpoint=...)` does in place of Trainer's own restore.

    Only what was learned comes from the checkpoint; rates, decays and intervals are the recipe's. Weights are read from
    `model/` or `adapter/` under every backend.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    loader: Any
    files: Any

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing here: weights are restored after wrapping, at one place for every backend (`_restore`)."""

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with folders.only_tensors(Path(checkpoint) / "rng"):
                super()._load_rng_state(str(Path(checkpoint) / "rng"))

    @override
    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Counters and log from the checkpoint; intervals of saving, logging and evaluating from the recipe."""
        found: tuple[int, int] = super()._init_training_state(max_steps, steps_per_epoch, epochs, None, trial)
        if resume_from_checkpoint is not None:
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.state.compute_steps(self.args, max_steps)
            self._load_callback_state()
            self.state.init_training_references(self, max_steps, epochs, trial)
        return found

    @override
    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        if self.args.should_save:
            # Not before: a start that is refused leaves the record of the run as it was.
            (Path(str(self.args.output_dir)) / CONFIG_FILE).write_text(self.files.config_yaml)
        return prepared

    def _restore(self, folder: Path) -> None:
        """Weights, optimizer, schedule and place in the data of a verified checkpoint.

        Only what was learned comes from there: rates, decays and intervals are the recipe's.
        """
        base = folders.read_json(folder / "lineage.json")["base"]
        if self.args.should_save and is_peft_model(self.model) and base != self.files.lineage["base"]:
            raise folders.CheckpointError(
                f"{folder}: its adapter was trained on other base weights than those of init_from "
                f"({self.files.lineage['init_from']}); put them back"
            )
        self.loader.load_state_dict(folders.read_json(folder / "data_state.json"))
        saved = self._saved_weights(folder)
        trained = adapter_names(self.model).values() if is_peft_model(self.model) else None
        restore_weights(self.model, saved, trained or [name for name, _ in self.model.named_parameters()])
        state = folder / optimizer_state.FOLDER
        optimizer_state.restore_optimizer(self.model, self._whose_state(), state, saved)
        with folders.only_tensors(folder / "scheduler.pt"):
            schedule = torch.load(folder / "scheduler.pt", weights_only=True)
        restore_schedule(self.lr_scheduler, schedule)

    def _whose_state(self) -> Any:
        """The optimizer that holds the state: the engine's own, or torch's."""
        return self.model_wrapped.optimizer if self.is_deepspeed_enabled else self.optimizer

    def _saved_weights(self, folder: Path) -> SavedWeights:
        """The tensors of a checkpoint under the names of this trainer's model."""
        if is_peft_model(self.model):
            files = (folder / folders.ADAPTER_FOLDER).glob("*.safetensors")
            own = adapter_names(self.model)
            return SavedWeights(files, lambda name: own.get(name, name))
        names = {name for name, _ in self.model.named_parameters()}
        family = unwrap(self.model).family
        own_files = [*(folder / folders.MODEL_FOLDER).glob("*.safetensors"), *folder.glob(HEAD_FILE)]
        return SavedWeights(own_files, lambda name: published_to_module(name, names, family))


def restore_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """Put a schedule where a saved one stood, with the rates that the recipe now gives it there."""
    if not hasattr(scheduler, "lr_lambdas"):  # one that looks at results: what it has seen is in its state
        scheduler.load_state_dict(state)
    else:
        scheduler.last_epoch, scheduler._step_count = state["last_epoch"], state["_step_count"]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
