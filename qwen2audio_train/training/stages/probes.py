"""Is preference training still doing what it should? Probes that evaluation runs, and a guard that stops.

A probe is called at every evaluation and gives figures, which are logged and may be watched: does the policy listen
(the margin must go when the audio does), do its answers drift (length, KL to the reference), and do its decoded answers
get worse.

Two more signs need no probe: `lengths/*` and `rewards/chosen` are in every log line, and `rewards/chosen` below zero
means that the chosen answers have become less likely than under the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from typing_extensions import override

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import ChatExample, Example, PreferenceExample, UnpairedExample
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding, sample_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.scoring.evaluate import evaluate
from qwen2audio_train.evaluation.scoring.likelihood import score_labels, score_pairs
from qwen2audio_train.training.trainers.preference import PreferenceTrainer, Probe

logger = logging.get_logger(__name__)


def listening_probe(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferenceExample],
    recipe: SampleRecipe,
    *,
    tokens_per_batch: int = 8192,
    seed: int = 0,
) -> Probe:
    """Mean reward margin of held-out pairs with their own audio, with another pair's, and with silence.

    A policy that has learnt to listen loses its margin without its audio; one that has learnt what good answers look
    like keeps it. Without a reference at hand the margins are of log-probabilities.
    """

    def probe(trainer: PreferenceTrainer) -> dict[str, float]:
        def margins(model: Any) -> np.ndarray:
            scores = [
                score_pairs(
                    model,
                    tokenizer,
                    pairs,
                    recipe,
                    audio=audio,
                    tokens_per_batch=tokens_per_batch,
                    seed=seed,
                    bootstrap_samples=0,
                )
                for audio in ("own", "swapped", "silence")
            ]
            return np.array([score.margin.value for score in scores])

        found = margins(trainer.model)
        with trainer.reference_model() as reference:
            if reference is not None:
                found = trainer.beta * (found - margins(reference))
        return {
            f"listening/margin_{audio}": float(x) for audio, x in zip(("own", "swapped", "silence"), found, strict=True)
        }

    return probe


def drift_probe(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    recipe: SampleRecipe,
    decoding: Decoding,
) -> Probe:
    """Answers sampled at temperature 1: their length, and how far the policy is from the reference.

    `drift/kl` is the mean over answers y of log p(y) - log p_reference(y), in nats per answer: an estimate of the KL
    divergence of the policy from the reference, unbiased up to texts that the tokenizer does not give back token by
    token. Answers that `decoding.max_new_tokens` cut off do not count in it, as their end was not drawn.
    """
    decoding = replace(decoding, temperature=1.0, top_p=1.0, num_return_sequences=2)

    def probe(trainer: PreferenceTrainer) -> dict[str, float]:
        asked = LazySamples(prompts, tokenizer, recipe, for_generation=True)
        texts = sample_texts(trainer.model, tokenizer, asked, decoding, asked.lengths)
        drawn = [text for answers in texts for text in answers or ()]
        figures = {"drift/characters": float(np.mean([len(text) for text in drawn]))} if drawn else {}
        ended = [
            [text for text in answers or () if len(tokenizer(text).input_ids) < decoding.max_new_tokens]
            for answers in texts
        ]
        answered = [_answered(example, answers) for example, answers in zip(prompts, ended, strict=True) if answers]
        if not answered:
            return figures
        samples = LazySamples(answered, tokenizer, recipe, for_generation=False)

        def logps(model: Any) -> np.ndarray:
            scores = score_labels(model, samples, decoding.tokens_per_batch)
            return np.array([value for score in scores if score is not None for value in score.logps])

        own = logps(trainer.model)
        with trainer.reference_model() as reference:
            if reference is not None:
                figures["drift/kl"] = float((own - logps(reference)).mean())
        return figures

    return probe


def decoded_probe(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: SampleRecipe, decoding: Decoding
) -> Probe:
    """Scores of greedy answers to held-out examples (task or chat form), as evaluation has them."""

    def probe(trainer: PreferenceTrainer) -> dict[str, float]:
        found = evaluate(trainer.model, tokenizer, examples, recipe, decoding=decoding, bootstrap_samples=0)
        return {f"decoded/{row.score.metric}/{row.source}": row.score.value for row in found.rows if not row.kind}

    return probe


def probe_figures(sources: Iterable[str]) -> list[str]:
    """Patterns of the names that the probes' figures may have; the metric of decoded answers is the task's."""
    return ["listening/margin_*", "drift/characters", "drift/kl", *(f"decoded/*/{source}" for source in sources)]


class HeldOutGuard(TrainerCallback):
    """Stop when a held-out figure has not been better than its best for `patience` evaluations in a row.

    It looks at the log alone, which a checkpoint holds, so a resumed run stops where an uninterrupted one would.

    Args:
        watched: name in the evaluation's figures, such as `eval_rewards/accuracies` or `eval_decoded/wer/dev`.
        patience: evaluations without a new best value.
        greater_is_better: false for error rates.
    """

    def __init__(self, watched: str, patience: int, *, greater_is_better: bool = True) -> None:
        self.watched = watched
        self.patience = patience
        self.sign = 1.0 if greater_is_better else -1.0

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Set `should_training_stop` when it is time."""
        if self.watched not in (metrics or {}):
            raise UserError(f"watched figure {self.watched}: not among {', '.join(sorted(metrics or {}))}")
        if reason := self.over(state.log_history):
            control.should_training_stop = True
            logger.warning(f"{reason}: stopping at step {state.global_step}")

    def over(self, history: Sequence[dict[str, float]]) -> str | None:
        """Why a run with this log is to stop, with its best and its last figure; None when it is not."""
        values = [(self.sign * line[self.watched], line.get("step", 0)) for line in history if self.watched in line]
        figures = [value for value, _ in values]
        if len(values) <= self.patience or max(figures[-self.patience :]) > max(figures[: -self.patience]):
            return None
        best, at = max(values, key=lambda pair: pair[0])
        return (
            f"{self.watched} has not improved for {self.patience} evaluations (best {self.sign * best:.4g} at step "
            f"{at}, now {self.sign * figures[-1]:.4g})"
        )


def _answered(example: Example, answers: Sequence[str]) -> PreferenceExample:
    """The answers as branches of one prompt, so that they share its computation."""
    prompt = example.prompt if isinstance(example, PreferenceExample | UnpairedExample) else ()
    if isinstance(example, ChatExample):
        prompt = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    if not prompt:
        raise UserError(f'example "{example.id}": a drift probe needs chat or preference examples')
    first, *others = answers
    return PreferenceExample(example.id, prompt, first, tuple(others), example.source)
