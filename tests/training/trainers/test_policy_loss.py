"""The policy's objective: TRL's numbers, and gradients that the head makes in its one pass."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from qwen2audio_train.model.loss import LabelHead, label_nll
from qwen2audio_train.training.trainers.policy_loss import PolicyObjective, advantages, token_weights

GROUPS, COPIES, LONGEST = 2, 3, 6


def drawn(seed: int) -> dict[str, Tensor]:
    """Rows of completions, padded: log-probabilities of three policies, mask and advantages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (GROUPS * COPIES, LONGEST)
    lengths = torch.randint(1, LONGEST + 1, shape[:1], generator=generator)
    lengths[0] = LONGEST
    logps = {name: -torch.rand(shape, generator=generator) * 3 for name in ("new", "old", "ref")}
    rewards = torch.rand(GROUPS, COPIES, generator=generator)
    mask = (torch.arange(LONGEST) < lengths[:, None]).int()
    return {**logps, "mask": mask, "lengths": lengths, "advantages": advantages(rewards).flatten()}


def trl_loss(rows: dict[str, Tensor], loss_type: str, beta: float) -> tuple[Tensor, Tensor]:
    """Loss of TRL's own code and its gradient by the log-probabilities."""
    logp = rows["new"].clone().requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.__dict__ |= {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logp, torch.zeros_like(logp), None),
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "beta": beta, "loss_type": loss_type, "epsilon_low": 0.1,
        "epsilon_high": 0.3, "use_vllm": False, "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST, "_entropy_bonus_enabled": False, "model": torch.nn.Linear(1, 1),
        "accelerator": SimpleNamespace(
            num_processes=1, device="cpu", gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_metrics": {"train": defaultdict(list)}, "use_adaptive_entropy": False,
    }  # fmt: skip
    empty = torch.zeros(len(logp), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": rows["mask"].long(),
        "completion_mask": rows["mask"], "advantages": rows["advantages"], "old_per_token_logps": rows["old"],
        "ref_per_token_logps": rows["ref"], "num_items_in_batch": rows["mask"].sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def packed(rows: dict[str, Tensor], loss_type: str, beta: float) -> PolicyObjective:
    kept = rows["mask"].bool()
    weight = token_weights(
        rows["lengths"], loss_type, num_completions=len(kept), num_tokens=float(kept.sum()), longest=LONGEST
    )
    advantage = rows["advantages"].repeat_interleave(rows["lengths"])
    return PolicyObjective(advantage, weight, rows["old"][kept], rows["ref"][kept], beta, 0.1, 0.3)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_and_gradient_are_trls(loss_type: str, beta: float) -> None:
    rows = drawn(3)
    loss, slope = packed(rows, loss_type, beta)(-rows["new"][rows["mask"].bool()], slice(None))
    expected, gradient = trl_loss(rows, loss_type, beta)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(-slope, gradient[rows["mask"].bool()], rtol=1e-5, atol=1e-7)
    assert float(slope.abs().sum()) > 0


def test_the_head_makes_the_gradients_of_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of two rows, those of autograd through all logits at once."""
    monkeypatch.setattr("qwen2audio_train.model.loss.LOGIT_BYTES", 4 * 11 * 2)
    rows = drawn(5)
    objective = packed(rows, "dapo", 0.1)
    count = int(rows["mask"].sum())
    torch.manual_seed(0)
    head, hidden = LabelHead(7, 11, bias=False), torch.randn(count, 7, requires_grad=True)
    target = torch.randint(0, 11, (count,))
    found = label_nll(hidden, head, target, torch.ones(count), objective)
    ours = torch.autograd.grad(found.nll_sum, [hidden, head.weight])
    logp = head(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    loss = (objective.per_token(logp) * objective.weight).sum()
    torch.testing.assert_close(found.nll_sum, loss, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(ours, torch.autograd.grad(loss, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_policy_follows_its_advantages() -> None:
    """Where the policy has sampled itself the ratio is one, and the slope by nll is the advantage."""
    rows = drawn(7)
    kept = rows["mask"].bool()
    advantage = rows["advantages"].repeat_interleave(rows["lengths"])
    objective = PolicyObjective(advantage, torch.full((int(kept.sum()),), 0.5))
    _, slope = objective(-rows["new"][kept], slice(None))
    torch.testing.assert_close(slope, 0.5 * advantage)


def test_groups_without_a_difference_teach_nothing() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    for scale in ("group", "batch", "none"):
        found = advantages(rewards, scale)
        assert found[0].tolist() == [0.0, 0.0, 0.0]
        torch.testing.assert_close(found.mean(1), torch.zeros(2))
    torch.testing.assert_close(advantages(rewards, "none")[1], torch.tensor([-0.5, 0.0, 0.5]))
    torch.testing.assert_close(advantages(rewards)[1].std(), torch.tensor(1.0), rtol=1e-3, atol=0)
