"""Stage zero, for a model that has no Whisper to start from: its audio tower learns to listen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.loading.build import Loader
from qwen2audio_train.data.prompts.pools import tag_tokens
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.model.recogniser import Recogniser
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.stages import run as stage
from qwen2audio_train.training.trainers.callbacks import callbacks
from qwen2audio_train.training.trainers.packed import PackedSeams, StepCounts, load_saved_state

HEAD_FILE = "recogniser_head.safetensors"


def byte_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """A tokenizer without merges: every byte of a transcript is a token."""
    languages = stage.languages_of(stage.training_examples(config.data))
    return train_tokenizer([], 2**16, tag_tokens(languages, config.data.prompt_style.value))


def build_recogniser(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Recogniser:
    """The random model of the recipe under a head for `tokenizer`."""
    model = build_model(config.model, tokenizer=tokenizer)
    return Recogniser(model, len(tokenizer), sorted(tokenizer.get_added_vocab().values()))


class EncoderTrainer(PackedSeams, Trainer):
    """The loss of a step is its sum over all transcripts, divided by their tokens over all ranks and micro-batches."""

    def _count(self, batches: list[dict[str, Tensor]], device: Any) -> StepCounts:
        spoken = self._recogniser().spoken.cpu()
        counts = super()._count(batches, device)
        labels = torch.tensor([float(sum(spoken[batch["target"]].sum() for batch in batches))], dtype=torch.float64)
        return dataclasses.replace(counts, weight=float(self.sum_over_ranks(labels, device)))

    def _recogniser(self) -> Recogniser:
        model: Any = self.model
        return model

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss x ranks / tokens of the whole step; nothing divides again."""
        return model(**inputs) * (self.args.world_size / num_items_in_batch.clamp(min=1e-8))

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss per token of the held-out transcripts."""
        if self.eval_batches is None:
            return {}
        model: Any = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.eval_batches():
            inputs = self._prepare_inputs(batch)
            sums += torch.stack((model(**inputs), self._recogniser().spoken[inputs["target"]].sum())).double().cpu()
        model.train()
        total, labels = self.sum_over_ranks(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(labels, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_weights(self, partial: Path) -> None:
        if self.args.should_save:
            unwrap(self._recogniser()).save_pretrained(partial / folders.MODEL_FOLDER)
            self.files.save_processor(partial / folders.MODEL_FOLDER)
            save_file(self._recogniser().lm_head.state_dict(), partial / HEAD_FILE)

    def _restore_weights(self, folder: Path) -> None:
        load_saved_state(unwrap(self._recogniser()), load_file(folder / folders.MODEL_FOLDER / "model.safetensors"))
        self._recogniser().lm_head.load_state_dict(load_file(folder / HEAD_FILE))


def encoder_trainer(
    config: StageConfig,
    arguments: TrainingArguments,
    model: Recogniser,
    tokenizer: PreTrainedTokenizerBase,
    batches: Loader,
) -> EncoderTrainer:
    """The trainer of stage zero."""
    held_out = stage.held_out(config, tokenizer)
    return EncoderTrainer(
        model=model,
        args=arguments,
        loader=batches,
        eval_batches=held_out,
        files=stage.run_files(config, tokenizer),
        callbacks=callbacks(config, stage.settings(config)),
    )
