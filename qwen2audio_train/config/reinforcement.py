"""What launch/grpo.py optimises: the group, its rewards, and the objective, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from qwen2audio_train.config.bounds import at_least


class LossType(StrEnum):
    grpo = "grpo"
    bnpo = "bnpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"


class ScaleRewards(StrEnum):
    group = "group"
    batch = "batch"
    none = "none"


@dataclass
class GrpoConfig:
    """Group-relative policy optimisation; keys are those of `trl.GRPOConfig` where it has them.

    Attributes:
        num_generations: completions sampled for each prompt; they are compared with each other.
        max_completion_length: longest completion, in tokens.
        temperature: of sampling; log-probabilities are taken at it too.
        top_p: nucleus that is sampled from; below 1 the policy that samples is not quite the one that learns.
        rewards: weight of each reward: error_rate (1 - WER), bleu, exact, choice, format, auto (by the example's task),
            or file.py:function for one of your own.
        beta: factor of the KL term against the policy as it starts; 0 keeps no reference.
        epsilon: clipping of the probability ratio below one.
        epsilon_high: clipping above one; null takes epsilon.
        num_iterations: optimiser steps on each set of completions; from the second on the ratio is no longer one.
        loss_type: how token losses are averaged: grpo, bnpo, dr_grpo or dapo.
        scale_rewards: divide advantages by the standard deviation of the group, of the batch, or not at all.
        mask_truncated_completions: completions that did not end teach nothing.
        patience: evaluations after which training stops because the held-out reward has not improved; 0 never stops.
        max_truncated_share: stop when more than this share of a step's completions do not end: the usual first sign
            that a reward is being gamed by length. 1 never stops.
    """

    num_generations: int = at_least(2, 8)
    max_completion_length: int = at_least(1, 128)
    temperature: float = at_least(0.01, 1.0)
    top_p: float = at_least(0.01, 1.0, 1)
    rewards: dict[str, float] = field(default_factory=lambda: {"auto": 1.0})
    beta: float = at_least(0, 0.0)
    epsilon: float = at_least(0, 0.2, 1)
    epsilon_high: float | None = at_least(0, None)
    num_iterations: int = at_least(1, 1)
    loss_type: LossType = LossType.dapo
    scale_rewards: ScaleRewards = ScaleRewards.group
    mask_truncated_completions: bool = False
    patience: int = at_least(0, 0)
    max_truncated_share: float = at_least(0, 1.0, 1)
