"""What `train_step.py` measures on, fixed in one place: shapes, batch, length sets, texts, and the stock trainers.

A step is `CLIPS` clips of noise (times `--micro-batches`) in memory at 16 kHz, each with a recognition prompt and a
target of `LABELS_PER_S` tokens a second: with the prompt, four text tokens a second for clips of 10 s. The lengths are
stratified draws (one from each of as many equal parts of the distribution as there are clips) with a fixed seed, so
that few clips stand for the whole distribution.

The stock trainers get what a user of transformers gets: `Qwen2AudioProcessor` in the collator,
`Qwen2AudioForConditionalGeneration` with `sdpa` attention, clips padded to 30 s, rows to the longest of their
micro-batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from datasets import Dataset as TableOfClips
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.data.prompts.render import Rendered, Text, render, rendered_text
from qwen2audio_train.data.prompts.tokenizer import build_processor, train_tokenizer
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.layout import SAMPLING_RATE, num_samples_of

CLIPS = {"3s": 8, "lognormal": 9, "librispeech": 9, "30s": 2, "chat": 8}
"""Clips of a forward: as many as `--quick` has time for. The more, the more of a padded row is padding."""

LABELS_PER_S = 3
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    # The ratio of encoder to language model is that of the published model.
    "small": {
        "audio_config": {"d_model": 320, "encoder_layers": 3, "encoder_attention_heads": 5, "encoder_ffn_dim": 1280},
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 1376,
            "vocab_size": 4096,
        },
    },
    # What tests take; nothing that is timed on it means anything.
    "tiny": {
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        "text_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 4096,
        },
    },
    "7b": {
        "audio_config": {},
        "text_config": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 156032,
        },
    },
}

LENGTH_SETS: dict[str, Callable[[float], float]] = {
    "3s": lambda _: 3.0,
    "lognormal": lambda share: 7.5 * math.exp(0.6 * NormalDist().inv_cdf(share)),
    "librispeech": lambda share: NormalDist(12.3, 3.8).inv_cdf(share),
    "30s": lambda _: 30.0,
    "chat": lambda _: 3.0,
}
"""Seconds at a share of the distribution in (0, 1), before they are clamped to [1, 30]."""


@dataclass(frozen=True)
class Example:
    """A clip (n,) float32 at 16 kHz and its text as pieces."""

    waveform: np.ndarray
    rendered: Rendered


def seconds_of(length_set: str, count: int) -> list[float]:
    """Lengths of `count` clips in an order that has nothing to do with them."""
    draw = random.Random(0)
    shares = [(place + draw.uniform(0.01, 0.99)) / count for place in range(count)]
    draw.shuffle(shares)
    return [min(max(LENGTH_SETS[length_set](share), 1.0), 30.0) for share in shares]


def examples_of(length_set: str, count: int) -> list[Example]:
    """Clips of noise, a prompt from the pool of recognition prompts, and digits, each of which is one token.

    Those of `chat` are asked aloud, after the system turn that every chat begins with.
    """
    rng = np.random.default_rng(0)
    examples = []
    for number, seconds in enumerate(seconds_of(length_set, count)):
        waveform = (0.1 * rng.standard_normal(num_samples_of(seconds))).astype(np.float32)
        digits = "".join(map(str, rng.integers(0, 10, max(1, round(LABELS_PER_S * seconds)))))
        clip = Clip("", seconds)
        turns = Message("user", (clip,)), Message("assistant", (digits,))
        example = (
            ChatExample(str(number), turns, length_set)
            if length_set == "chat"
            else TaskExample(str(number), clip, "asr", "en", digits, length_set)
        )
        examples.append(Example(waveform, render(example)))
    return examples


class Workload:
    """The clips of a step, and what the arms share: tokenizer, processor, config, weights and arguments.

    Attributes:
        clips: clips of a forward.
        order: clips of a step in the order of the forwards.
    """

    def __init__(self, options: Any, length_set: str, folder: str) -> None:
        self.options, self.folder = options, folder
        self.clips = CLIPS[length_set]
        self.examples = examples_of(length_set, self.clips * options.micro_batches)
        self.order = list(range(len(self.examples)))
        texts = ["".join(p.text for p in e.rendered.trunk if isinstance(p, Text)) for e in self.examples]
        self.tokenizer = train_tokenizer(texts, 4096, ["<|en|>"])
        self.processor = build_processor(self.tokenizer)
        self.dtype, self.device = getattr(torch, options.dtype), options.device

    def config(self) -> Qwen2AudioConfig:
        """A new one for every model, since a model writes its attention into it."""
        parts: Any = {name: dict(part) for name, part in SHAPES[self.options.shape].items()}
        parts["audio_token_index"] = self.tokenizer.convert_tokens_to_ids(QWEN2_AUDIO.audio_token)
        return Qwen2AudioConfig(**parts)

    def build(self, make: Callable[[Qwen2AudioConfig], Any]) -> Any:
        """A model with the weights that every arm starts from."""
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return make(self.config())
        finally:
            torch.set_default_dtype(default)

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Arguments of every trainer; a step is one log line, and nothing is saved."""
        return {
            "output_dir": self.folder,
            "max_steps": self.options.rounds + 1,
            "per_device_train_batch_size": self.clips,
            "gradient_accumulation_steps": self.options.micro_batches,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "optim": self.options.optim,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "bf16": False,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
            **more,
        }


class Repeated(Dataset[Any]):
    """The clips of a step over and over."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __len__(self) -> int:
        return len(self.workload.order) * (self.workload.options.rounds + 1)

    def __getitem__(self, place: int) -> dict[str, int]:
        order = self.workload.order
        return {"clip": order[place % len(order)]}


class StockCollator:
    """The stock processor on the waveforms, and labels on the last tokens of a row, which is padded on the left."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Tensor]:
        chosen = [self.workload.examples[row["clip"]] for row in rows]
        batch = self.workload.processor(
            text=[rendered_text(example.rendered) for example in chosen],
            audio=[example.waveform for example in chosen],
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            padding=True,
        )
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for row, example in enumerate(chosen):
            pieces = [p for p in example.rendered.trunk if isinstance(p, Text)]
            target = "".join(p.text for p in pieces if p.is_label)
            count = len(self.workload.tokenizer(target)["input_ids"])
            after = "" if pieces[-1].is_label else pieces[-1].text
            end = batch["labels"].size(1) - len(self.workload.tokenizer(after)["input_ids"])
            batch["labels"][row, end - count : end] = batch["input_ids"][row, end - count : end]
        batch["input_features"] = batch["input_features"].to(self.workload.dtype)
        return dict(batch)


def mended_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Sum over the labels of a forward, divided by those of the step.

    The stock model takes the mean over a forward and ignores `num_items_in_batch`, which Trainer believes it honours.
    """
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_items_in_batch


def stock_model(workload: Workload) -> Qwen2AudioForConditionalGeneration:
    def make(config: Qwen2AudioConfig) -> Qwen2AudioForConditionalGeneration:
        config._attn_implementation = "sdpa"
        return Qwen2AudioForConditionalGeneration(config)

    return workload.build(make)


def stock_trainer(workload: Workload, callback: TrainerCallback, prepare: Callable[[Any], Any]) -> Trainer:
    """`transformers.Trainer`, its accumulation mended."""
    return Trainer(
        prepare(stock_model(workload)),
        TrainingArguments(**workload.arguments()),
        data_collator=StockCollator(workload),
        train_dataset=Repeated(workload),
        compute_loss_func=mended_loss,
        callbacks=[callback],
    )


def grouped_trainer(workload: Workload, callback: TrainerCallback, prepare: Callable[[Any], Any]) -> Trainer:
    """The same with clips of like length in a micro-batch.

    Trainer's own sampler groups over many steps; sorting the clips of each step keeps its content that of the others.
    """
    workload.order.sort(key=lambda clip: len(workload.examples[clip].waveform))
    return stock_trainer(workload, callback, prepare)


class QuietSFTTrainer(SFTTrainer):
    """TRL's trainer, from which nothing leaves the machine."""

    def _send_telemetry(self) -> None:
        """Nothing."""


def trl_trainer(workload: Workload, callback: TrainerCallback, prepare: Callable[[Any], Any]) -> Trainer:
    """TRL's trainer with the collator above; its loss is a token mean over the step as it is."""
    clips = Repeated(workload)
    return QuietSFTTrainer(
        prepare(stock_model(workload)),
        args=SFTConfig(**workload.arguments(max_length=None, dataset_kwargs={"skip_prepare_dataset": True})),
        data_collator=StockCollator(workload),
        train_dataset=TableOfClips.from_list([clips[place] for place in range(len(clips))]),
        processing_class=workload.tokenizer,
        callbacks=[callback],
    )


STOCK_ARMS: dict[str, Callable[..., Any]] = {
    "stock": stock_trainer,
    "stock_grouped": grouped_trainer,
    "trl_sft": trl_trainer,
}
