"""The clipped objective of group-relative policy optimisation, as a loss of labels.

GRPO (Shao et al. 2024, arXiv:2402.03300) samples a group of completions to a prompt, scores them, and moves the policy
towards those that are better than the group's mean. The names and the arithmetic are those of `trl.GRPOConfig` and
`GRPOTrainer`: ratio r = exp(logp - old_logp), per token

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(ref - logp) - (ref - logp) - 1)

Shape legend: M tokens of completions in a pack, P prompts of N completions each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2audio_train.config.reinforcement import LossType, ScaleRewards

EPSILON_STD = 1e-4
"""What TRL adds to a standard deviation that it divides by."""


@dataclass(frozen=True)
class PolicyObjective:
    """Loss of the tokens of completions and its derivative: a `model.loss.LabelObjective`.

    Attributes:
        advantage: (M,) float32, that of the token's completion.
        weight: (M,) float32, the token's share in the loss; it sums to one over a step for a mean over tokens.
        old_logp: (M,) of the policy that sampled; None where it is the policy itself, whose ratio is one.
        ref_logp: (M,) of the reference; None without a KL term.
        beta: factor of the KL term.
        epsilon, epsilon_high: clipping of the ratio below and above one.
    """

    advantage: Tensor
    weight: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2

    def __call__(self, nll: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logp = (-nll).detach().requires_grad_()
            loss = (self.per_token(logp, at) * self.weight[at]).sum()
            (slope,) = torch.autograd.grad(loss, logp)
        return loss.detach(), -slope

    def per_token(self, logp: Tensor, at: slice = slice(None)) -> Tensor:
        """Unweighted loss of each token whose log-probability is `logp`."""
        advantage = self.advantage[at]
        old = logp.detach() if self.old_logp is None else self.old_logp[at]
        ratio = (logp - old).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.beta and self.ref_logp is not None:
            loss = loss + self.beta * kl_estimate(logp, self.ref_logp[at])
        return loss


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy | reference) per sampled token, never negative (Schulman 2020, the third estimator)."""
    gap = ref_logp - logp
    return gap.exp() - gap - 1


def advantages(rewards: Tensor, scale_rewards: ScaleRewards = ScaleRewards.group) -> Tensor:
    """How much better each completion is than its group: (P, N) rewards -> (P, N).

    Args:
        scale_rewards: divide by the standard deviation of the group, of all completions, or not at all
            (Dr. GRPO, arXiv:2503.20783).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "none" or rewards.size(1) < 2:
        return centred
    std = rewards.std(dim=1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centred / (std + EPSILON_STD)


def token_weights(
    lengths: Tensor, loss_type: LossType, *, num_completions: float, num_tokens: float, longest: int
) -> Tensor:
    """Share of every token of completions of `lengths` (C,) in the loss of a step, end to end (M,).

    Args:
        loss_type: `grpo` a mean over completions of their means over tokens; `bnpo` and `dapo` a mean over all tokens
            of the step; `dr_grpo` a sum over tokens, divided by completions x `longest`.
        num_completions, num_tokens: of the whole step, over all ranks and micro-batches.
        longest: `max_completion_length`.
    """
    each = lengths.float()
    if loss_type == "grpo":
        share = 1.0 / (each.clamp(min=1.0) * num_completions)
    elif loss_type == "dr_grpo":
        share = torch.full_like(each, 1.0 / (num_completions * longest))
    else:
        share = torch.full_like(each, 1.0 / max(num_tokens, 1.0))
    return share.repeat_interleave(lengths)
