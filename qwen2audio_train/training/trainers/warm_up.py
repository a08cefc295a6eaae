"""The start of a model put together from real parts: encoder and projector learn to speak in token embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import jiwer
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer
from typing_extensions import override

from qwen2audio_train.batch import PackedBatch
from qwen2audio_train.model.ctc import HEAD
from qwen2audio_train.model.freeze import part_of
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.checkpoints.restore import SavedWeights, whole_state
from qwen2audio_train.training.trainers.packed import PackedTrainer
from qwen2audio_train.training.trainers.speed import StepCounts

UNSCALED_FILE = "unscaled.safetensors"
"""Projector and head as they are trained; `model/` has the projector with the norm of embeddings."""


class WarmUpTrainer(PackedTrainer, Trainer):
    """The loss of a step is its sum over all transcripts, divided by their tokens over all ranks and micro-batches.

    The projector that a checkpoint hands on is scaled, so that the audio embeddings of its last step have the mean norm
    of the language model's own; the head is scaled against it, so that both read the same.

    Args:
        sampled_tokens: see `CtcConfig`.
        embedding_norm: mean norm of the language model's token embeddings.
    """

    def __init__(
        self,
        *args: Any,
        tokenizer: PreTrainedTokenizerBase,
        sampled_tokens: int,
        embedding_norm: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer = tokenizer
        self.sampled_tokens = sampled_tokens
        self.embedding_norm = embedding_norm
        self.norms = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def _count(self, batches: list[PackedBatch], device: Any) -> StepCounts:
        self.norms.zero_()
        counts = super()._count(batches, device)
        return dataclasses.replace(counts, weight=counts.spoken)

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss x ranks / tokens of the whole step; nothing divides again."""
        output = model(**inputs, others=self.other_tokens(self.sampled_tokens))
        self.norms += output.audio_norms
        loss = output.ctc_sum * (self.args.world_size / num_items_in_batch.clamp(min=1e-8))
        return (loss, output) if return_outputs else loss

    def held_out_figures(self) -> set[str]:
        figures = super().held_out_figures()
        return figures | {"eval_wer", "eval_cer"} if figures else figures

    @override
    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss per token of the held-out transcripts, against the whole vocabulary, and error rates of what is read.

        The texts are compared in lower case and otherwise as they are.
        """
        if self.eval_batches is None:
            return {}
        model: Any = self.model_wrapped
        model.eval()
        sums = torch.zeros(6, dtype=torch.float64)
        batches = self.eval_batches()
        for batch in cast(Iterable[PackedBatch], batches):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                output = model(**inputs)
            sums[0] += output.ctc_sum.double().cpu()
            sums[1] += len(batch["transcript"])
            lengths = batch["transcript_length"].tolist()
            written = batch["transcript"].split(lengths) if lengths else ()
            sums[2:] += self._edits([pair for pair in zip(written, output.read, strict=True) if len(pair[0])])
        model.train()
        loss, tokens, word_edits, words, character_edits, characters = self.sum_over_ranks(sums).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(tokens, 1),
            f"{metric_key_prefix}_wer": word_edits / max(words, 1),
            f"{metric_key_prefix}_cer": character_edits / max(characters, 1),
        }
        return self.report(metrics, batches, metric_key_prefix)

    def _edits(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Word edits, words, character edits, characters (4,) of (written, read) token ids."""
        if not pairs:
            return torch.zeros(4, dtype=torch.float64)
        written, read = ([self._text(ids) for ids in side] for side in zip(*pairs, strict=True))
        figures: list[int] = []
        for out in (jiwer.process_words(written, read), jiwer.process_characters(written, read)):
            kept = out.hits + out.substitutions + out.deletions
            figures += [out.substitutions + out.deletions + out.insertions, kept]
        return torch.tensor(figures, dtype=torch.float64)

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids)).strip().lower()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        state = whole_state(self.model, self.args.should_save)
        family = unwrap(self.model).family
        parts = {name: "head" if name.startswith(HEAD) else part_of(name, family) for name in state}
        self._unscaled = {name: state[name] for name in state if parts[name] in ("head", "multi_modal_projector")}
        norms, count = self.sum_over_ranks(self.norms).tolist()
        factor = self.embedding_norm * count / max(norms, 1e-12)
        for name, tensor in self._unscaled.items():
            if parts[name] == "multi_modal_projector":
                state[name] = tensor * factor
            elif not name.endswith("bias"):
                state[name] = tensor / factor
        return state

    def _save_weights(self, partial: Path) -> None:
        super()._save_weights(partial)
        if self.args.should_save:
            save_file(self._unscaled, partial / UNSCALED_FILE)

    def _saved_weights(self, folder: Path) -> SavedWeights:
        found = super()._saved_weights(folder)
        found.places |= SavedWeights([folder / UNSCALED_FILE], str).places
        return found
