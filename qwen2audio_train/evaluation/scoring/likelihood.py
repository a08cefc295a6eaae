"""Teacher-forced scores: what the labels of held-out examples cost, and which answer of a preference is likelier."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Example, PreferenceExample
from qwen2audio_train.data.samples.collate import indexed, on_device, pack
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.evaluation.decoding.lazy_samples import Audio, LazySamples, load_ahead
from qwen2audio_train.evaluation.decoding.ranks import gather, is_sharded, rank_and_world
from qwen2audio_train.evaluation.scoring.bootstrap import Score, mean_score, proportion
from qwen2audio_train.model.packed import unwrap


@dataclass(frozen=True)
class LabelScore:
    """What one example's labels cost under the model.

    Attributes:
        nll: sum over the labels of the trunk, in nats.
        labels, correct: how many there are, and how many were the most likely token.
        logps: log-probability of each branch (the chosen answer of a preference first).
    """

    nll: float
    labels: int
    correct: int
    logps: tuple[float, ...] = ()


@dataclass(frozen=True)
class PairScores:
    """Held-out preference pairs under the model.

    Attributes:
        accuracy: share of pairs whose chosen answer is likelier than the rejected one.
        margin: mean of log p(chosen) - log p(rejected), in nats.
        reward_accuracy, reward_margin: the same of beta (log p - log p_reference), where a reference was given.
    """

    accuracy: Score
    margin: Score
    reward_accuracy: Score | None = None
    reward_margin: Score | None = None


@torch.no_grad()
def score_labels(model: nn.Module, samples: LazySamples, tokens_per_batch: int = 8192) -> list[LabelScore | None]:
    """Teacher-forced scores of every sample, in order; None for what could not be loaded. Ranks share the work."""
    rank, world = rank_and_world()
    plans = [_batches(range(r, len(samples), world), samples.lengths, tokens_per_batch) for r in range(world)]
    fillers: list[list[int]] = [[]] * (max(map(len, plans)) - len(plans[rank])) if is_sharded(model) else []
    inner = unwrap(model)
    training = inner.training
    inner.eval()
    scores: dict[int, LabelScore | None] = {}
    for batch, loaded in load_ahead(samples, plans[rank] + fillers):
        known = [sample for sample in loaded if sample is not None]
        found = iter(_score_batch(inner, known))
        scores |= {i: None if sample is None else next(found) for i, sample in zip(batch, loaded, strict=True)}
    inner.train(training)
    scores = gather(scores)
    return [scores[index] for index in range(len(samples))]


def held_out_loss(examples: Sequence[Example], scores: Sequence[LabelScore | None]) -> dict[str, dict[str, float]]:
    """Mean loss per label and token accuracy of every source."""
    sums: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        if score is not None:
            total = sums.setdefault(example.source, [0.0, 0, 0])
            for place, value in enumerate((score.nll, score.correct, score.labels)):
                total[place] += value
    return {
        source: {"loss": nll / labels, "token_accuracy": correct / labels, "labels": labels}
        for source, (nll, correct, labels) in sorted(sums.items())
        if labels
    }


def score_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[PreferenceExample],
    recipe: SampleRecipe,
    *,
    audio: Audio = "own",
    reference: nn.Module | None = None,
    beta: float = 0.1,
    tokens_per_batch: int = 8192,
    seed: int = 0,
    bootstrap_samples: int = 1000,
) -> PairScores:
    """Accuracy and margin on held-out pairs; an example with several rejected answers counts as so many pairs.

    Args:
        audio: "swapped" is the text-only scorer: the same model, but every prompt with another prompt's clip;
            "silence" hears zeros. A model that listens loses its lead in both.
        reference: model of the rewards; the policy itself where its adapter is to be switched off.
    """
    samples = LazySamples(examples, tokenizer, recipe, for_generation=False, audio=audio, seed=seed)

    def differences(scorer: nn.Module) -> np.ndarray:
        scores = score_labels(scorer, samples, tokens_per_batch)
        return np.array([s.logps[0] - rejected for s in scores if s is not None for rejected in s.logps[1:]])

    def summary(gaps: np.ndarray) -> tuple[Score, Score]:
        right = (gaps > 0).astype(int).tolist()
        share = proportion("pair_accuracy", right, samples=bootstrap_samples, seed=seed, extra={"chance": 0.5})
        return share, mean_score("margin", gaps, samples=bootstrap_samples, seed=seed)

    gaps = differences(model)
    if reference is None:
        return PairScores(*summary(gaps))
    with _without_adapter(model) if reference is model else nullcontext():
        base = differences(reference)
    return PairScores(*summary(gaps), *summary(beta * (gaps - base)))


def _without_adapter(model: Any) -> Any:
    if not hasattr(model, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} has no adapter to switch off: give the reference model itself")
    return model.disable_adapter()


def _batches(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    size = 0
    for index in indices:
        if batches and size + lengths[index] <= budget:
            batches[-1].append(index)
            size += lengths[index]
        else:
            batches.append([index])
            size = lengths[index]
    return batches


def _score_batch(model: Any, samples: Sequence[Sample]) -> list[LabelScore]:
    batch = indexed(pack(samples, num_mel_bins=model.config.audio_config.num_mel_bins), model.family)
    output = model(**on_device(batch, model.device))
    counts = [[int(s.label_mask.sum()), *map(len, s.branches)] for s in samples]
    nll: list[Tensor] = list(output.nll.double().cpu().split([n for row in counts for n in row]))
    correct = list(output.correct.cpu().split([n for row in counts for n in row]))
    scores = []
    for labels, *branches in counts:
        trunk, answers = nll.pop(0), [-float(nll.pop(0).sum()) for _ in branches]
        right = correct.pop(0)
        del correct[: len(branches)]
        scores.append(LabelScore(float(trunk.sum()), labels, int(right.sum()), tuple(answers)))
    return scores
