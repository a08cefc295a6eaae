"""Every kind of step through a GPU that is none: prints a line of JSON per kind.

    python -m tests.cuda.walk CORPUS SCRATCH [KIND ...]

A line has `error` where something raised, else `loss` of every step and `waits`: how often, and where, the host waits
for the device between the starts of two micro-batches of one step.
"""

from __future__ import annotations

import collections
import json
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import varlen

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.samples.collate import indexed, pack
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.evaluation.scoring.likelihood import _score_batch
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.stages.run import fit
from tests.cuda import cuda_like
from tests.runs import build_trainer, encoder_recipe, grpo_recipe, logged, pairs_recipe, recipe, warm_up_recipe

BF16 = ("model.dtype=bfloat16", "trainer.optim=adamw_bf16_kahan")
AUTOCAST = ("trainer.bf16=true",)
LORA = ("adapter.kind=lora", *AUTOCAST)
FROZEN = ("model.freeze.audio_tower=true",)

STEPS: dict[str, tuple[Callable[..., StageConfig], tuple[str, ...]]] = {
    "pretrain": (recipe, AUTOCAST),
    "pretrain in float32": (recipe, ()),
    "pretrain in bfloat16": (recipe, BF16),
    "sft": (recipe, ("stage=sft", "model.activation_checkpointing_policy=selective", *AUTOCAST)),
    "lora": (recipe, ("stage=sft", *LORA)),
    "lora in bfloat16": (recipe, ("stage=sft", "model.dtype=bfloat16", *LORA)),
    "frozen encoder": (recipe, (*FROZEN, *AUTOCAST)),
    "encoder cache": (recipe, (*FROZEN, *AUTOCAST, "model.encoder_cache_dir=CACHE")),
    "empty packs": (recipe, ("data.packs_per_step=3", "data.packs_per_forward=1", *AUTOCAST)),
    "dpo with lora": (pairs_recipe, LORA),
    "dpo with a frozen reference": (pairs_recipe, AUTOCAST),
    "dpo with a stored reference": (
        pairs_recipe,
        (*AUTOCAST, "preference.reference=cached", "preference.cache_dir=CACHE"),
    ),
    "kto": (pairs_recipe, ("preference.objective=kto", *LORA)),
    "grpo": (grpo_recipe, ("grpo.beta=0.05", *LORA)),
    "encoder": (encoder_recipe, AUTOCAST),
    "warm up": (warm_up_recipe, AUTOCAST),
}


TWICE = ("pretrain", "dpo with lora")
"""Kinds that take a second step, whose loss depends on the gradient of the first."""


def walked(kind: str, corpus: Path, folder: Path) -> dict[str, Any]:
    """Two steps of a kind."""
    make, options = STEPS[kind]
    options = tuple(option.replace("CACHE", str(folder / "cache")) for option in options)
    last = 2 if kind.startswith(TWICE) else 1
    ours = ("trainer.use_cpu=false", f"trainer.max_steps={last}", "trainer.warmup_steps=0")
    config = make(corpus, folder, *ours, *options)
    trainer: Any = build_trainer(config)
    if kind == "empty packs":
        trainer.loader = WithFillers(trainer.loader)
    marks = marked(trainer)
    trainer._save_checkpoint = lambda *_: None  # what has no memory cannot be written
    fit(trainer, config)
    found = [b[1] - a[1] for a, b in pairwise(marks) if a[0] == b[0]]
    return {"loss": [loss for (loss,) in logged(config, "loss")], "waits": dict(max(found, key=lambda c: c.total()))}


class WithFillers:
    """Every other batch is a filler."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield batch
            yield indexed(pack([], num_mel_bins=16), QWEN2_AUDIO)


def marked(trainer: Any) -> list[tuple[int, collections.Counter[str]]]:
    """Step and waits so far at the start of every micro-batch."""
    marks: list[tuple[int, collections.Counter[str]]] = []
    step = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> Any:
        marks.append((trainer.state.global_step, cuda_like.waits.copy()))
        return step(*args, **kwargs)

    trainer.training_step = noted
    return marks


def evaluated(kind: str, corpus: Path, folder: Path) -> dict[str, Any]:
    """Held-out loss under LoRA; answers, sampled and greedy, and what labels cost, under the policy of GRPO."""
    make, options = STEPS["lora" if kind == "evaluation" else "grpo"]
    held_out = f"data.eval_sources.dev.path=[{corpus / 'speech.jsonl'}]"
    trainer: Any = build_trainer(make(corpus, folder, "trainer.use_cpu=false", held_out, *options))
    trainer.model.to("cuda")
    if kind == "evaluation":
        return {"loss": [trainer.evaluate()["eval_loss"]]}
    prompts = next(iter(trainer.loader))["prompts"]
    if kind == "scoring":
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return {"loss": [score.nll for score in _score_batch(unwrap(trainer.model), prompts)]}
    before = cuda_like.waits.copy()
    texts = generate_texts(trainer.model, trainer.tokenizer, prompts, Decoding(max_new_tokens=5, min_new_tokens=5))
    assert all(texts)
    return {"loss": [trainer.evaluate()["eval_reward"]], "waits": dict(cuda_like.waits - before)}


def older(kind: str, corpus: Path, folder: Path) -> dict[str, Any]:
    """The trees of DPO through the arguments that older releases of torch's kernel take."""
    newest = varlen.varlen_attn
    varlen.varlen_attn = OLDER[kind](newest)
    try:
        return walked("dpo with lora", corpus, folder)
    finally:
        varlen.varlen_attn = newest


def without_groups(newest: Any) -> Any:
    """Windows, but as many heads of keys as of queries."""

    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        assert query.size(1) == key.size(1)
        return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return varlen_attn


def without_windows(newest: Any) -> Any:
    """Those of torch 2.11."""

    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        return_aux: Any = None,
        scale: float | None = None,
    ) -> Any:
        window = (-1, 0) if is_causal else (-1, -1)
        return without_groups(newest)(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window
        )

    return varlen_attn


OLDER = {"dpo without groups": without_groups, "dpo without windows": without_windows}

KINDS: dict[str, Callable[[str, Path, Path], dict[str, Any]]] = {
    **dict.fromkeys(STEPS, walked),
    **dict.fromkeys(OLDER, older),
    **dict.fromkeys(("evaluation", "generation", "scoring"), evaluated),
}


def main(corpus: str, scratch: str, *kinds: str) -> None:
    with cuda_like.install():
        for number, kind in enumerate(kinds or KINDS):
            folder = Path(scratch) / str(number)
            try:
                found = KINDS[kind](kind, Path(corpus), folder)
            except Exception:
                found = {"error": traceback.format_exc()}
            print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
