"""Stage zero, for a model that has no Whisper to start from: its audio tower learns to listen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer
from typing_extensions import override

from qwen2audio_train.batch import PackedBatch
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.model.recogniser import Recogniser
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints.restore import SavedWeights, published_to_module, whole_state
from qwen2audio_train.training.trainers.packed import PackedTrainer
from qwen2audio_train.training.trainers.speed import StepCounts

HEAD_FILE = "recogniser_head.safetensors"
AUDIO, HEAD = "audio.", "lm_head."
"""Where the tower's model and the head stand in a recogniser."""


class EncoderTrainer(PackedTrainer, Trainer):
    """The loss of a step is its sum over all transcripts, divided by their tokens over all ranks and micro-batches."""

    def _count(self, batches: list[PackedBatch], device: Any) -> StepCounts:
        spoken = self._recogniser().spoken.cpu()
        counts = super()._count(batches, device)
        labels = torch.tensor([float(sum(spoken[batch["target"]].sum() for batch in batches))], dtype=torch.float64)
        return dataclasses.replace(counts, weight=float(self.sum_over_ranks(labels, device)))

    def _recogniser(self) -> Recogniser:
        model: Any = self.model
        return model

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss x ranks / tokens of the whole step; nothing divides again."""
        return model(**inputs) * (self.args.world_size / num_items_in_batch.clamp(min=1e-8))

    @override
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
        batches = self.eval_batches()
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            sums += torch.stack((model(**inputs), self._recogniser().spoken[inputs["target"]].sum())).double().cpu()
        model.train()
        total, labels = self.sum_over_ranks(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(labels, 1)}
        return self.report(metrics, batches, metric_key_prefix)

    def _save_weights(self, partial: Path) -> None:
        state = whole_state(self._recogniser(), self.args.should_save)
        if self.args.should_save:
            model, head = ({n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in (AUDIO, HEAD))
            unwrap(self._recogniser()).save_pretrained(partial / folders.MODEL_FOLDER, state_dict=model)
            self.files.save_processor(partial / folders.MODEL_FOLDER)
            save_file(head, partial / HEAD_FILE)

    def _saved_weights(self, folder: Path) -> SavedWeights:
        names = {name.removeprefix(AUDIO) for name, _ in self._recogniser().named_parameters()}
        head = SavedWeights([folder / HEAD_FILE], lambda name: HEAD + name)
        family = unwrap(self._recogniser()).family
        found = SavedWeights(
            (folder / folders.MODEL_FOLDER).glob("*.safetensors"),
            lambda name: AUDIO + published_to_module(name, names, family),
        )
        found.places |= head.places
        return found
