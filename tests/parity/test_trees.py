"""Prompt, chosen and rejected in one row, the prompt once, against two padded rows of the stock model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import IGNORED, Row, pack, pad, random_row
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst

PROMPTS = ((40,), (), (9, 30), (3000,))
"""Mel frames of the clips of each prompt."""


def preference_rows(seed: int = 0) -> tuple[list[Row], list[list[Tensor]]]:
    """Prompts, and for each a chosen and a rejected answer of unequal lengths."""
    rng = torch.Generator().manual_seed(seed)
    prompts = [random_row(rng, frames) for frames in PROMPTS]
    answers = [
        [torch.randint(0, 150, (int(torch.randint(1, 7, (), generator=rng)),), generator=rng) for _ in range(2)]
        for _ in prompts
    ]
    return prompts, answers


def tree(prompts: list[Row], answers: list[list[Tensor]]) -> dict[str, Tensor]:
    """Every prompt followed by its answers in one row; a plain packed batch whose labels are the answers."""
    batch = pack(prompts)
    ids, positions, predict_from, target, key_index = [], [], [], [], []
    q, k, rows, at = [0], [0], [], 0
    for prompt, branches in zip(prompts, answers, strict=True):
        trunk = torch.arange(at, at + len(prompt.ids))
        ids.append(prompt.ids)
        positions.append(torch.arange(len(trunk)))
        q.append(q[-1] + len(trunk))
        k.append(k[-1] + len(trunk))
        key_index.append(trunk)
        at += len(trunk)
        for branch in branches:
            own = torch.arange(at, at + len(branch))
            ids.append(branch)
            positions.append(torch.arange(len(trunk), len(trunk) + len(branch)))
            predict_from.append(torch.cat([trunk[-1:], own[:-1]]))
            target.append(branch)
            key_index.append(torch.cat([trunk, own]))
            q.append(q[-1] + len(own))
            k.append(k[-1] + len(trunk) + len(own))
            rows.append(torch.cat([trunk[-1:], own]))
            at += len(own)
    tokens = torch.cat(ids)
    batch |= {
        "input_ids": tokens[None],
        "position_ids": torch.cat(positions)[None],
        "predict_from": torch.cat(predict_from),
        "target": torch.cat(target),
        "weight": torch.ones(len(torch.cat(target))),
        "cu_q": torch.tensor(q, dtype=torch.int32),
        "cu_k": torch.tensor(k, dtype=torch.int32),
        "key_index": torch.cat(key_index),
        "audio_slot": (tokens == 150).nonzero()[:, 0],
    }
    del batch["source_id"]
    order = rows[0::2] + rows[1::2]  # chosen first
    batch["scatter"] = torch.nn.utils.rnn.pad_sequence(order, batch_first=True, padding_value=-1)
    return batch


def padded(prompts: list[Row], answers: list[list[Tensor]]) -> dict[str, Tensor]:
    """Prompt and answer of every pair as rows of their own, chosen first; labels are the answers."""
    rows = []
    for side in range(2):
        for prompt, branches in zip(prompts, answers, strict=True):
            answer = branches[side]
            labels = torch.cat([torch.full_like(prompt.ids, IGNORED), answer])
            rows.append(replace(prompt, ids=torch.cat([prompt.ids, answer]), labels=labels))
    return pad(rows, torch.Generator().manual_seed(9))


def test_a_tree_equals_two_rows() -> None:
    stock, packed = pair()
    prompts, answers = preference_rows()
    batch = tree(prompts, answers)
    del batch["scatter"]
    loss, grads = gradients(stock, stock(**padded(prompts, answers)).loss)
    out = packed(**batch)
    our_loss, our_grads = gradients(packed, out.nll_sum / out.weight_sum)
    assert torch.allclose(our_loss, loss, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def preference_batch(prompts: list[Row], answers: list[list[Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch that TRL's loss gets, and its labels: rows of the last prompt token and the answer."""
    batch = tree(prompts, answers)
    scatter, ids = batch["scatter"], batch.pop("input_ids")
    for name in ("predict_from", "target", "weight"):
        del batch[name]
    rows = ids[0][scatter.clamp(min=0)]
    batch |= {"packed_ids": ids, "packed_positions": batch.pop("position_ids")}
    batch |= {"input_ids": rows, "attention_mask": (scatter >= 0).long()}
    completion = scatter >= 0
    completion[:, 0] = False
    return batch, rows.masked_fill(~completion, IGNORED)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_of_trl_equal_those_of_padded_rows(checkpointing: bool) -> None:
    stock, packed = pair()
    for model in (stock, packed):
        add_fused_lm_head(model)
    if checkpointing:
        packed.gradient_checkpointing_enable()
    prompts, answers = preference_rows()
    batch, labels = preference_batch(prompts, answers)
    rows = padded(prompts, answers)
    theirs = stock(**rows, fused_lm_head=True).log_probs.sum(1)
    ours = packed.train()(**batch, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)
    assert torch.allclose(ours, theirs, rtol=RELATIVE_TOLERANCE)

    def dpo(logps: Tensor) -> Tensor:
        chosen, rejected = logps.chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    _, grads = gradients(stock, dpo(theirs))
    _, our_grads = gradients(packed, dpo(ours))
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def test_hidden_states_of_the_backbone_have_the_shape_of_the_rows() -> None:
    _, packed = pair()
    batch, _ = preference_batch(*preference_rows())
    hidden = packed.base_model(**batch).last_hidden_state
    assert hidden.shape == (*batch["input_ids"].shape, packed.config.text_config.hidden_size)
    assert torch.equal(hidden[batch["scatter"] < 0], torch.zeros_like(hidden[batch["scatter"] < 0]))
    assert isinstance(packed, PackedQwen2Audio)
