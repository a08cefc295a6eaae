"""What the trainers of preferences share: TRL's loss code on packed pairs, a mean over the whole step, its metrics.

`PreferenceTrainer` goes before a trainer of TRL that scores rows of prompt and answer (`DPOTrainer`, `KTOTrainer`).
What it adds is what TRL cannot know: batches that know their rank, a mean over all pairs of the optimiser step instead
of one per micro-batch, metrics to match, probes at evaluation, and a reference that takes no more memory than it must.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import use_adapter
from typing_extensions import override

from qwen2audio_train.batch import PreferenceBatch
from qwen2audio_train.config.preference import Reference
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.training.checkpoints.restore import kept_whole, whole
from qwen2audio_train.training.reference.reference import (
    REFERENCE_ADAPTER,
    adapter_left_as_it_is,
    trained_outside_adapter,
)
from qwen2audio_train.training.trainers.figures import tensor_of, unread
from qwen2audio_train.training.trainers.packed import PackedTrainer
from qwen2audio_train.training.trainers.speed import StepCounts

Probe = Callable[["PreferenceTrainer"], dict[str, float]]
"""Figures of the trainer's policy as it is now; every rank calls it at every evaluation."""

OWN_KEYS = frozenset({"pair_weight", "pair_key"})
"""Keys of a batch that neither TRL nor the model gets."""

SIDES = ("chosen", "rejected")

TOKEN_METRICS = {
    "entropy": "all",
    "mean_token_accuracy": "chosen",
    "logits/chosen": "chosen",
    "logits/rejected": "rejected",
}
"""Metrics of TRL that are means over the tokens of these answers; the others are means over pairs."""


HELD_OUT_METRICS = (
    "loss",
    "entropy",
    *(f"{name}/{side}" for name in ("lengths", "logits", "logps", "rewards") for side in SIDES),
    "rewards/margins",
)
"""What both objectives log about held-out pairs."""


class PreferenceTrainer(PackedTrainer):
    """Mixin; see the module's docstring.

    Args:
        model: the policy, a `PackedAudioLM` or a PEFT model around one.
        reference: where the reference's log-probabilities come from, as `resolve_reference` gave it.
        ref_model: the frozen copy.
        probes: what evaluation measures besides the held-out pairs, see `guards`; `probe_figures` are patterns of the
            names of their figures.
        args, processing_class, callbacks, optimizers: as for TRL's trainer (a tokenizer, not a processor).
        loader, files, eval_batches: see `PackedTrainer`.
    """

    model: Any
    args: Any
    ref_model: Any
    beta: float
    loss_is_scaled_for_ga: Any = True  # compute_loss divides by the pairs of the whole step
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        reference: Reference,
        ref_model: nn.Module | None = None,
        probes: Sequence[Probe] = (),
        probe_figures: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        adapted = is_peft_model(model)
        self.reference_forwards = int(reference is not Reference.cached)
        self.probes, self.probe_figures = tuple(probes), tuple(probe_figures)
        self._adapter_is_reference = adapted and ref_model is None and not trained_outside_adapter(model)
        self._tallies: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        # Else TRL would load a reference for a policy that has neither adapter nor ref_model.
        args.precompute_ref_log_probs = reference is Reference.cached and not adapted
        # TRL wants a data set to look into; the batches come from `loader`.
        stand_in = Dataset.from_dict({"prompt": [""]})
        held_out = stand_in if kwargs.get("eval_batches") else None
        data = {"train_dataset": stand_in, "eval_dataset": held_out}
        with adapter_left_as_it_is(model):
            super().__init__(model=model, ref_model=ref_model, args=args, **data, **kwargs)
        args.precompute_ref_log_probs = False
        self.precompute_ref_logps = False

    # What TRL does with a data set, and we do in `data` ---------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    # The step ---------------------------------------------------------------------------------------------------------

    def _count(self, batches: list[PreferenceBatch], device: Any) -> StepCounts:
        """The weight of a step is its number of pairs."""
        counts = super()._count(batches, device)
        return dataclasses.replace(counts, weight=counts.pairs)

    @override
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """TRL's loss of a micro-batch, scaled so that ranks and micro-batches add up to the mean over all pairs.

        Args:
            num_items_in_batch: pairs of the step over all ranks; None (evaluation) leaves TRL's mean as it is.

        Returns:
            () float32; zero for a filler, whose `pair_weight` is zero.
        """
        batch = without_own_keys(inputs)
        pairs = inputs["pair_weight"].sum()
        with self._tallied(cast(PreferenceBatch, batch), pairs):
            loss: Any = super().compute_loss(model, batch)
        return loss if num_items_in_batch is None else loss * (pairs * self.args.world_size / num_items_in_batch)

    # Metrics ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _tallied(self, batch: PreferenceBatch, pairs: Tensor) -> Iterator[None]:
        """Keep what TRL logs about this micro-batch as weighted sums of this rank; `_means` joins the ranks.

        TRL gathers each figure over the ranks at once and averages over micro-batches: fillers would count, and ranks
        would have to hold equally many pairs.
        """
        mode = "train" if self.model.training else "eval"
        tokens_before = self._total_train_tokens
        self._metrics[mode].clear()
        with unread(self.accelerator):
            yield
        if mode == "train":  # TRL counted the answers' rows, the model ran the packed one
            self._total_train_tokens = tokens_before + batch["packed_ids"].numel()
        logged = {name: values[0] for name, values in self._metrics[mode].items() if name != "num_tokens"}
        tokens, rows = _sizes(batch)
        figures = {name: tensor_of(value, pairs) for name, value in logged.items()}
        figures |= {f"lengths/{side}": tokens[side] / rows[side].clamp(min=1.0) for side in SIDES}
        figures |= {name: figures.get(name, torch.zeros_like(pairs)) for name in map(_twin, list(figures))}
        self._tally(mode, figures, [self._weight(name, tokens, rows, pairs) for name in figures])

    @staticmethod
    def _weight(name: str, tokens: dict[str, Tensor], rows: dict[str, Tensor], pairs: Tensor) -> Tensor:
        """What a figure counts among those of other micro-batches: nothing in a filler."""
        side = name.rpartition("/")[2]
        weight = tokens[TOKEN_METRICS[name]] if name in TOKEN_METRICS else rows.get(side, pairs)
        return weight * (pairs > 0)

    def _tally(self, mode: str, figures: dict[str, Tensor], weights: Sequence[Tensor]) -> None:
        """Add figures, on the device; one that is no number is left out, as its step is skipped."""
        value, weight = torch.stack([*figures.values()]).double(), torch.stack([*weights]).double()
        counts = value.isfinite() & (weight > 0)
        rows = torch.where(counts, torch.stack((value * weight, weight)), 0.0)
        tally = self._tallies[mode]
        for name, row in zip(figures, rows.unbind(1), strict=True):
            tally[name] = tally[name] + row if name in tally else row

    def _means(self, mode: str) -> dict[str, float]:
        """Means of the tallied metrics over all ranks since the last call."""
        tally, self._tallies[mode] = self._tallies[mode], {}
        if not tally:
            return {}
        names = sorted(tally)
        sums = self.sum_over_ranks(torch.stack([tally[name] for name in names]))
        return {name: float(total / weight) for name, (total, weight) in zip(names, sums, strict=True) if weight > 0}

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the means to TRL's own log."""
        mode = "train" if self.model.training else "eval"
        means = self._means(mode)
        if means and mode == "train":
            tokens = torch.tensor([self._total_train_tokens], dtype=torch.float64)
            means["num_tokens"] = float(self.sum_over_ranks(tokens))
        self._metrics[mode] = defaultdict(list, {name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and TRL's metrics over the held-out pairs: every rank runs its own batches, sums are joined once."""
        with self._inference_model() as model:
            was_training = model.training
            model.eval()
            batches = self.held_out()
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs)
                self._tally("eval", {"loss": loss}, [inputs["pair_weight"].sum()])
            figures = self._means("eval")
            for probe in self.probes:
                figures |= probe(self)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
            self.report(metrics, batches, metric_key_prefix)
            model.train(was_training)
        return metrics

    held_out_metrics: tuple[str, ...] = ()
    """Names of the figures of TRL's trainer over held-out pairs."""

    def held_out_figures(self) -> set[str]:
        if self.eval_batches is None:
            return set()
        own = {f"eval_{name}" for name in (*HELD_OUT_METRICS, *self.held_out_metrics, *self.probe_figures)}
        return super().held_out_figures() | own

    def held_out(self) -> PackLoader:
        """This rank's batches of held-out pairs.

        Raises:
            ValueError: the trainer was given no `eval_batches`.
        """
        if self.eval_batches is None:
            raise ValueError("evaluation needs held-out pairs: give the trainer `eval_batches`")
        return self.eval_batches()

    @contextmanager
    def _inference_model(self) -> Iterator[Any]:
        """The policy as it can be run now: as it is wrapped for training, before that by itself.

        Under DeepSpeed it is whole and on its device for that time: an engine before the one that trains would leave
        its hooks behind, and ZeRO-3 would lose count of what it has gathered.
        """
        if not self.is_deepspeed_enabled or self.model_wrapped is not self.model:
            yield self.model_wrapped
            return
        device = self.args.device
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16)
        with whole(self.model.parameters()), kept_whole(), bf16:  # hidden, or TRL gathers a head that is whole
            yield self.model.to(device)

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """The model that gives reference log-probabilities, for the time of the context; None if there is none."""
        if self.ref_model is None and self._adapter_is_reference:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
                yield model
        else:
            yield self.ref_model


def _sizes(batch: PreferenceBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tokens of the answers, and rows, of all, of the chosen (or desirable) and of the rejected (or undesirable)."""
    lengths = batch["completion_mask"].sum(dim=1)
    first = torch.arange(len(lengths), device=lengths.device) < len(lengths) // 2
    chosen = batch.get("label", first)
    tokens = {side: (lengths * which).sum() for side, which in zip(SIDES, (chosen, ~chosen), strict=True)}
    return tokens | {"all": lengths.sum()}, {"chosen": chosen.sum(), "rejected": (~chosen).sum()}


def _twin(name: str) -> str:
    """Name of the same metric for the other side, chosen or rejected; other metrics keep theirs.

    Both are tallied always, so that every rank reduces the same keys where a micro-batch has one side only.
    """
    metric, _, side = name.rpartition("/")
    return f"{metric}/{SIDES[1 - SIDES.index(side)]}" if side in SIDES else name


def without_own_keys(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch TRL and the model get."""
    return {key: value for key, value in inputs.items() if key not in OWN_KEYS}
