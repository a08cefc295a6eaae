"""Random preference pairs, our trainer over them, and TRL's own trainer over the same pairs, padded and unshared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from qwen2audio_train.config.preference import Reference
from qwen2audio_train.data.loading.base import Seen
from qwen2audio_train.data.samples.collate import pack_preference
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.qwen2_audio import mel_columns, num_audio_tokens
from qwen2audio_train.layout import MAX_FRAMES
from qwen2audio_train.training.trainers.dpo import AudioDPOTrainer
from qwen2audio_train.training.trainers.packed import RunFiles
from tests.model.rows import AUDIO_ID, BANDS

PAD_ID = 0


def random_pair(
    rng: np.random.Generator,
    frames: Sequence[int] = (60,),
    *,
    num_rejected: int = 1,
    turns: int = 1,
    text: bool = True,
    longest: int = 6,
    name: str | None = None,
) -> Sample:
    """A pair with the clips `frames` spread over the turns of its prompt; without `text` a turn is audio alone."""

    def words(low: int = 1) -> np.ndarray:
        return rng.integers(1, AUDIO_ID, rng.integers(low, longest + 1))

    parts = [words(2)]
    for turn in range(turns):
        for clip in frames[turn::turns]:
            parts += [words(1)[:1], np.full(num_audio_tokens(clip), AUDIO_ID), words(1)[:1]]
        parts.append(words(2) if text else words(1)[:2])
    ids = np.concatenate(parts)
    order = [clip for turn in range(turns) for clip in frames[turn::turns]]
    mels = tuple(rng.standard_normal((BANDS, mel_columns(clip)), dtype=np.float32) for clip in order)
    for mel, clip in zip(mels, order, strict=True):
        mel[:, min(clip + 2, MAX_FRAMES) :] = 0.0
    return Sample(
        id=name or f"pair-{rng.integers(1 << 40)}",
        source="random",
        task="preference",
        input_ids=ids,
        label_mask=np.zeros(len(ids), dtype=bool),
        audio_slot=np.flatnonzero(ids == AUDIO_ID),
        branches=tuple(words(2) for _ in range(1 + num_rejected)),
        mels=mels,
        clip_frames=tuple(order),
    )


def batches_of(samples: Sequence[Sample], per_batch: int) -> list[dict[str, Tensor]]:
    """Packed batches of `per_batch` samples each."""
    return [pack_preference(samples[i : i + per_batch], BANDS) for i in range(0, len(samples), per_batch)]


class ListLoader:
    """The same batches over and over."""

    plan = 0

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches
        self.start = 0
        self.telemetry = SimpleNamespace(take=dict)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.start
        while True:
            yield dict(self.batches[index % len(self.batches)])
            index += 1

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("not resumed in these tests")


class HeldOut(list[Any]):
    """Held-out batches of which every example was used."""

    def seen(self) -> Seen:
        """What is planned is planned for all ranks."""
        pairs = torch.stack([batch["pair_weight"].sum() for batch in self]).sum()
        if dist.is_initialized():
            dist.all_reduce(pairs)
        return Seen(planned=int(pairs), too_long=0, bad_lines=0, unusable=0)


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step and every log line."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.by_name = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def tokenizer() -> PreTrainedTokenizerFast:
    """As much of a tokenizer as TRL's constructor asks for."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": PAD_ID}, "<pad>")), pad_token="<pad>")


def config(folder: Path, **changes: Any) -> DPOConfig:
    """Arguments of a run of one step in float32, without anything that would hide a difference."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "beta": 0.5,
    }
    return DPOConfig(**(values | changes))


def our_trainer(
    model: Any,
    batches: list[dict[str, Tensor]],
    args: DPOConfig,
    *,
    ref_model: nn.Module | None = None,
    reference: Reference = Reference.auto,
    eval_batches: list[dict[str, Tensor]] | None = None,
    **options: Any,
) -> tuple[AudioDPOTrainer, Gradients]:
    """The trainer of the package over fixed batches."""
    gradients = Gradients()
    trainer = AudioDPOTrainer(
        model,
        args=args,
        ref_model=ref_model,
        reference=reference,
        processing_class=tokenizer(),
        callbacks=[gradients],
        loader=ListLoader(batches),
        files=RunFiles("", {}, lambda folder: None),
        eval_batches=None if eval_batches is None else lambda: HeldOut(eval_batches),
        **options,
    )
    return trainer, gradients


class StockDPOTrainer(DPOTrainer):
    """TRL's trainer as it is, on a data set that is tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class StockCollator:
    """TRL's own collator for the ids, and 30 s of padded features per row: those of the chosen rows come again."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.ids = DataCollatorForPreference(pad_token_id=PAD_ID)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [self.samples[row["sample"]] for row in rows]
        return self.ids(rows) | self.features([*samples, *samples])

    @staticmethod
    def features(samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The clips of one row after the other, padded to 30 s."""
        frames = torch.tensor([clip for sample in samples for clip in sample.clip_frames])
        features = torch.zeros(len(frames), BANDS, MAX_FRAMES)
        for feature, mel in zip(features, (mel for sample in samples for mel in sample.mels), strict=True):
            width = min(mel.shape[1], MAX_FRAMES)
            feature[:, :width] = torch.from_numpy(mel)[:, :width]
        mask = (torch.arange(MAX_FRAMES) < frames[:, None]).long()
        return {"input_features": features, "feature_attention_mask": mask}


def stock_trainer(
    model: Any, samples: Sequence[Sample], args: DPOConfig, *, ref_model: nn.Module | None = None, **options: Any
) -> tuple[DPOTrainer, Gradients]:
    """TRL's trainer over the same pairs, every pair with a prompt and clips of its own."""
    gradients = Gradients()
    rows = [
        {
            "prompt_ids": sample.input_ids.tolist(),
            "chosen_ids": sample.branches[0].tolist(),
            "rejected_ids": rejected.tolist(),
            "sample": index,
        }
        for index, sample in enumerate(samples)
        for rejected in sample.branches[1:]
    ]
    trainer = StockDPOTrainer(
        model,
        ref_model=ref_model,
        args=args,
        data_collator=StockCollator(samples),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[gradients],
        **options,
    )
    return trainer, gradients
