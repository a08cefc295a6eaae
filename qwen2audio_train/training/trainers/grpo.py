"""Group-relative policy optimisation of audio models: sample, score, and learn from a group as one tree.

A step reads prompts (clip and text), samples N completions of each with one prefill, scores them, and trains on one
tree a prompt: the clip is encoded once, the prompt computed once, and its N completions are branches. The objective is
`policy_loss`, in the same pass of the LM head that makes the gradients.

Shape legend: P prompts of N completions in a micro-batch, M tokens of completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from typing_extensions import override

from qwen2audio_train.config.reinforcement import GrpoConfig
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.samples.collate import PromptBatch, indexed, pack
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding, sample_tokens, stop_ids
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.trainers.packed import HELD_OUT_COUNTS, PackedTrainer
from qwen2audio_train.training.trainers.policy_loss import PolicyObjective, advantages, kl_estimate, token_weights

Reward = Callable[[Sequence[Example], Sequence[Sequence[str]]], list[list[float]]]
"""Scores of every completion of every prompt's example; more is better."""

OBJECTIVE_KEYS = ("advantage", "old_logp", "ref_logp")


class AudioGRPOTrainer(PackedTrainer, Trainer):
    """Trains on completions that it samples itself; see the module's docstring.

    Args:
        grpo: the recipe's `grpo`.
        rewards: functions by name; their weights are `grpo.rewards`.
        reference: a frozen copy of the policy; None where `beta` is 0 or an adapter can be switched off.
        seed: of sampling. What is drawn depends on it, on the step and on the prompt, so that a resumed run draws
            what an uninterrupted one would.
    """

    def __init__(
        self,
        *args: Any,
        grpo: GrpoConfig,
        rewards: dict[str, Reward],
        processing_class: PreTrainedTokenizerBase,
        num_mel_bins: int,
        reference: nn.Module | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.grpo, self.rewards, self.reference, self.seed = grpo, rewards, reference, seed
        self.tokenizer, self.num_mel_bins = processing_class, num_mel_bins
        self.tally: dict[str, tuple[Any, float]] = {}  # sums stay on the device until they are logged
        self.reference_forwards = int(grpo.beta > 0)
        super().__init__(*args, **kwargs)

    # The step ---------------------------------------------------------------------------------------------------------

    @override
    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step: prompts are read, answered, scored, and laid out as trees.

        Returns:
            The packed batches with `advantage` (M,), and the number one: their weights sum to one over the step.
        """
        read = self._read(epoch_iterator, num_batches)
        if not read:
            return [], torch.tensor(0.0, device=device)
        answered = [self._answered(batch["prompts"]) for batch in read]
        rewards = [self._rewards(*group) for group in answered]
        batches = [self._tree(*group, scores) for group, scores in zip(answered, rewards, strict=True)]
        self._weigh(batches)
        for batch in batches:
            batch |= self._log_probabilities(batch)
        self._tally_step(answered, rewards, batches)
        self._note(batches, device)
        for batch in batches:
            del batch["lengths"]
        return batches, torch.tensor(1.0, device=device)

    def decoding(self, *, greedy: bool = False) -> Decoding:
        """How completions are sampled at this step; `greedy`: one each, the likeliest."""
        return Decoding(
            max_new_tokens=self.grpo.max_completion_length,
            temperature=0.0 if greedy else self.grpo.temperature,
            top_p=1.0 if greedy else self.grpo.top_p,
            num_return_sequences=1 if greedy else self.grpo.num_generations,
            seed=self.seed * 1_000_003 + self.state.global_step,
        )

    def _answered(self, prompts: Sequence[Sample]) -> tuple[list[Sample], list[list[list[int]]]]:
        return list(prompts), sample_tokens(self.model, self.tokenizer, prompts, self.decoding())

    def _rewards(self, prompts: Sequence[Sample], completions: Sequence[Sequence[list[int]]]) -> dict[str, Tensor]:
        """Each reward of every completion, (P, N) float32."""
        if not prompts:
            return {name: torch.zeros(0, self.grpo.num_generations) for name in self.rewards}
        examples = [_example(prompt) for prompt in prompts]
        texts = [self.tokenizer.batch_decode([*rows], skip_special_tokens=True) for rows in completions]
        found = {name: torch.tensor(reward(examples, texts)) for name, reward in self.rewards.items()}
        for name, scores in found.items():
            if not bool(scores.isfinite().all()):
                raise UserError(f"grpo.rewards.{name}: gave a score that is no number; answers were {texts[0][:2]}")
        return found

    def _total(self, scores: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.grpo.rewards[name] * values for name, values in scores.items()]).sum(0)

    def _tree(
        self, prompts: list[Sample], completions: list[list[list[int]]], scores: dict[str, Tensor]
    ) -> dict[str, Any]:
        """One tree a prompt, with its completions as branches, and each token's advantage."""
        branches = [tuple(np.array(row, dtype=np.int64) for row in rows) for rows in completions]
        trees = [dataclasses.replace(p, branches=b, example=None) for p, b in zip(prompts, branches, strict=True)]
        batch = indexed(pack(trees, num_mel_bins=self.num_mel_bins), unwrap(self.model).family)
        lengths = torch.tensor([len(row) for rows in branches for row in rows], dtype=torch.long)
        gains = advantages(self._total(scores), self.grpo.scale_rewards).flatten()
        if self.grpo.mask_truncated_completions:
            ended = torch.tensor([self._ended(row) for rows in completions for row in rows], dtype=torch.bool)
            gains = gains * ended
        return {**batch, "advantage": gains.float().repeat_interleave(lengths), "lengths": lengths}

    def _ended(self, row: Sequence[int]) -> bool:
        return bool(row) and row[-1] in stop_ids(self.tokenizer, unwrap(self.model).family)

    def _weigh(self, batches: Sequence[dict[str, Any]]) -> None:
        """Give every token its share of the step's loss, over all ranks and micro-batches."""
        sums = [torch.tensor([len(b["lengths"]), int(b["lengths"].sum())], dtype=torch.float64) for b in batches]
        completions, tokens = self.sum_over_ranks(torch.stack(sums).sum(0)).tolist()
        for batch in batches:
            batch["weight"] = token_weights(
                batch["lengths"],
                self.grpo.loss_type,
                num_completions=max(completions, 1.0),
                num_tokens=tokens,
                longest=self.grpo.max_completion_length,
            )

    def _log_probabilities(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the reference, where a KL term needs them, (M,) float32."""
        if not self.grpo.beta:
            return {}
        inputs = self._prepare_inputs({key: value for key, value in batch.items() if key != "lengths"})
        with self._reference_model() as model, torch.no_grad(), self.compute_loss_context_manager():
            inputs.pop("advantage")
            output = model(**inputs, temperature=self.grpo.temperature)
        return {"ref_logp": -output.nll}

    @contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The policy as it started: the frozen copy, or the model without its adapter."""
        if self.reference is not None:
            yield self.reference.to(self.args.device)
            return
        model = self.accelerator.unwrap_model(self.model)
        if not is_peft_model(model):
            raise UserError("grpo.beta: the KL term needs a reference; set beta=0, or train an adapter")
        with model.disable_adapter():
            yield model

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The clipped objective of a micro-batch, so that ranks and micro-batches add up to that of the step.

        DDP and DeepSpeed average gradients over ranks, hence the factor `world_size`; nothing divides again.
        """
        batch = {key: value for key, value in inputs.items() if key not in OBJECTIVE_KEYS}
        grpo = self.grpo
        objective = PolicyObjective(
            inputs["advantage"],
            inputs["weight"],
            ref_logp=inputs.get("ref_logp"),
            beta=grpo.beta,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
        )
        output = model(**batch, objective=objective, temperature=grpo.temperature)
        self._tally_tokens(inputs, output.nll)
        loss = output.nll_sum * self.args.world_size
        return (loss, output) if return_outputs else loss

    # Metrics ----------------------------------------------------------------------------------------------------------

    def _tally_tokens(self, inputs: dict[str, Any], nll: Tensor) -> None:
        """Entropy, as the mean surprise at what was sampled, and divergence from the reference."""
        self._add("entropy", nll.double().sum(), len(nll))
        if "ref_logp" in inputs:
            self._add("kl", kl_estimate(-nll, inputs["ref_logp"]).double().sum(), len(nll))

    def _tally_step(
        self,
        answered: Sequence[tuple[list[Sample], list[list[list[int]]]]],
        rewards: Sequence[dict[str, Tensor]],
        batches: Sequence[dict[str, Any]],
    ) -> None:
        truncated = 0
        for (_, completions), scores, batch in zip(answered, rewards, batches, strict=True):
            total, count = self._total(scores), len(batch["lengths"])
            for name, values in scores.items():
                self._add(f"rewards/{name}", float(values.sum()), count)
            self._add("reward", float(total.sum()), count)
            self._add("reward_std", float(total.std(dim=1).sum()) if count else 0.0, len(total))
            self._add("frac_reward_zero_std", float((total.std(dim=1) == 0).sum()) if count else 0.0, len(total))
            self._add("completions/mean_length", float(batch["lengths"].sum()), count)
            cut = sum(not self._ended(row) for rows in completions for row in rows)
            truncated += cut
            self._add("completions/clipped_ratio", float(cut), count)
        done = torch.tensor([truncated, sum(len(b["lengths"]) for b in batches)], dtype=torch.float64)
        cut, count = self.sum_over_ranks(done).tolist()
        if count and cut / count > self.grpo.max_truncated_share:
            self.control.should_training_stop = True
            print(
                f"step {self.state.global_step}: {cut:.0f} of {count:.0f} completions do not end within "
                f"{self.grpo.max_completion_length} tokens (grpo.max_truncated_share): stopping"
            )

    def _add(self, name: str, value: Tensor | float, count: float) -> None:
        total, number = self.tally.get(name, (0.0, 0.0))
        self.tally[name] = (total + value, number + count)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the sampled completions since the last line, over all ranks."""
        if "loss" in logs and self.tally:
            names = sorted(self.tally)
            rows = [[*map(float, self.tally[name])] for name in names]
            sums = self.sum_over_ranks(torch.tensor(rows, dtype=torch.float64))
            logs |= {n: round(float(v / c), 6) for n, (v, c) in zip(names, sums, strict=True) if c > 0}
            self.tally = {}
        super().log(logs, start_time)

    def held_out_figures(self) -> set[str]:
        figures = {"eval_reward", "eval_length", *(f"eval_rewards/{name}" for name in self.rewards), *HELD_OUT_COUNTS}
        return figures if self.eval_batches is not None else set()

    @override
    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out prompts, and how long they are."""
        if self.eval_batches is None:
            return {}
        names = [*self.rewards, "reward", "length"]
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        batches = self.eval_batches()
        for batch in cast(Iterable[PromptBatch], batches):
            prompts = batch["prompts"]
            completions = sample_tokens(self.model, self.tokenizer, prompts, self.decoding(greedy=True))
            scores = self._rewards(prompts, completions)
            values = [*scores.values(), self._total(scores)] if prompts else []
            for place, value in enumerate(values):
                sums[place] += torch.tensor([float(value.sum()), len(prompts)], dtype=torch.float64)
            sums[-1] += torch.tensor([sum(len(rows[0]) for rows in completions), len(prompts)], dtype=torch.float64)
        total = self.sum_over_ranks(sums)
        metrics = {
            f"{metric_key_prefix}_{name if name in ('reward', 'length') else f'rewards/{name}'}": float(value / count)
            for name, (value, count) in zip(names, total, strict=True)
            if count > 0
        }
        return self.report(metrics, batches, metric_key_prefix)


def _example(prompt: Sample) -> Example:
    if prompt.example is None:
        raise ValueError(f'prompt "{prompt.id}" came without its example')
    return prompt.example
