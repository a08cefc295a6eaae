"""Pre-training and supervised fine-tuning: `transformers.Trainer` on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from typing_extensions import override

from qwen2audio_train.config.ctc import CtcConfig
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.trainers.packed import PackedTrainer


class AudioTrainer(PackedTrainer, Trainer):
    """Token-normalised loss over the whole optimiser step, with loss and accuracy per source from the same pass.

    Where the model has a `ctc_head`, `ctc.weight` times the loss per token of the transcripts comes on top.
    """

    def __init__(
        self, *args: Any, sources: list[str], ctc: CtcConfig | None = None, decoded: Any = None, **kwargs: Any
    ) -> None:
        """`decoded` takes the trainer and gives figures of held-out texts, which match its `figures`."""
        self.sources = sources
        self.decoded = decoded
        if decoded is not None:
            kwargs.setdefault("eval_dataset", [])
        self.ctc = ctc or CtcConfig()
        super().__init__(*args, **kwargs)
        # On the device, and read for the log alone: reading them at every batch would wait for it.
        self.sums = torch.zeros(len(sources), 3, dtype=torch.float64, device=self.args.device)
        self.ctc_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of weighted token losses, over the weights of the whole step on all ranks.

        DDP and DeepSpeed average gradients over ranks, hence the factor `world_size`; nothing divides again.
        """
        others = self.other_tokens(self.ctc.sampled_tokens)
        output = model(**inputs) if others is None else model(**inputs, others=others)
        self._add(self.sums, inputs["source_id"], output)
        scale = self.args.world_size / num_items_in_batch.clamp(min=1e-8).to(output.nll_sum.device)
        loss = output.nll_sum * scale
        if output.ctc_sum is not None:
            self.ctc_sums[0] += output.ctc_sum.detach()
            self.ctc_sums[1] += len(inputs["transcript"])
            loss = loss + output.ctc_sum * (self.ctc.weight * self.args.world_size / max(self.step.spoken, 1.0))
        return (loss, output) if return_outputs else loss

    @staticmethod
    def _add(sums: Tensor, source_id: Tensor, output: Any) -> None:
        rows = torch.stack((output.nll.double(), output.correct.double(), torch.ones_like(output.nll).double()), 1)
        rows = torch.where(rows[:, :1].isfinite(), rows, 0.0)  # a step that is no number is skipped
        sums.index_add_(0, source_id, rows)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._per_source("", self.sources, self.sum_over_ranks(self.sums))
            self.sums.zero_()
            if unwrap(self.model).ctc_head is not None:
                total, tokens = self.sum_over_ranks(self.ctc_sums).tolist()
                logs["ctc_loss"] = total / max(tokens, 1)
                self.ctc_sums.zero_()
        super().log(logs, start_time)

    @staticmethod
    def _per_source(prefix: str, sources: Sequence[str], sums: Tensor) -> dict[str, float]:
        """Mean loss per labelled token of each source and token accuracy over all."""
        nll, correct, count = sums.sum(0).tolist()
        figures = {f"{prefix}token_accuracy": round(correct / max(count, 1), 5)}
        if prefix:
            figures[f"{prefix}loss"] = nll / max(count, 1)
        for name, (source_nll, _, labels) in zip(sources, sums.tolist(), strict=True):
            if labels:
                figures[f"{prefix}loss/{name}"] = round(source_nll / labels, 5)
        return figures

    def held_out_figures(self) -> set[str]:
        decoded = {f"eval_{pattern}" for pattern in self.decoded.figures} if self.decoded else set()
        if self.eval_batches is None:
            return decoded
        of_sources = {f"eval_loss/{name}" for name in self.eval_batches().source_names}
        return super().held_out_figures() | {"eval_token_accuracy"} | of_sources | decoded

    @override
    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Teacher-forced loss and token accuracy on the held-out batches, and scores of decoded texts."""
        if self.eval_batches is None and self.decoded is None:
            return {}
        batches = self.eval_batches() if self.eval_batches else None
        metrics = {} if batches is None else self._held_out_loss(batches, metric_key_prefix)
        if self.decoded is not None:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.decoded(self).items()}
        return self.report(metrics, batches, metric_key_prefix)

    def _held_out_loss(self, batches: PackLoader, metric_key_prefix: str) -> dict[str, float]:
        """The same number of forwards on every rank."""
        sums = torch.zeros(len(batches.source_names), 3, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                self._add(sums, inputs["source_id"], model(**inputs))
        model.train(was_training)
        return self._per_source(f"{metric_key_prefix}_", batches.source_names, self.sum_over_ranks(sums))
