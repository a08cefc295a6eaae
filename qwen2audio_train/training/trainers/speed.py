"""What a step holds and how fast steps go: tokens, audio, share of the device's peak, memory.

MFU is the useful operations of a step (`model/flops.py`: matrix products and attention of real lengths, forward and
backward, without those that checkpointing repeats) over what the devices could have done at their peak in the time
between two log lines, which holds data, logging, evaluation and checkpoints too.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_train.config.schema import Dtype, StageConfig
from qwen2audio_train.layout import HOP_LENGTH, SAMPLING_RATE
from qwen2audio_train.model.flops import Load, forward_flops, peak_flops, training_flops
from qwen2audio_train.model.freeze import part_of
from qwen2audio_train.model.packed import unwrap

FRAME_S = HOP_LENGTH / SAMPLING_RATE


@dataclass
class StepCounts:
    """Sums of one optimiser step over all ranks and micro-batches; `spoken` are the tokens of transcripts."""

    weight: float = 0.0
    tokens: float = 0.0
    audio_s: float = 0.0
    labels: float = 0.0
    pairs: float = 0.0
    spoken: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Flops:
    """Useful operations of a batch on one model.

    Attributes:
        trained, adapted: parts that learn in full, and by low-rank adapters.
        reference_forwards: forwards of a reference model over the same batch.
    """

    config: Any
    trained: Collection[str]
    adapted: Collection[str]
    reference_forwards: int = 0

    def of(self, batch: Mapping[str, Tensor]) -> float:
        """Operations of forward, backward and the reference."""
        load = load_of(batch)
        passes = training_flops(self.config, load, trained=self.trained, adapted=self.adapted)
        reference = sum(forward_flops(self.config, load).values()) if self.reference_forwards else 0
        return float(sum(passes.values()) + self.reference_forwards * reference)


def flops_of(model: nn.Module, reference_forwards: int = 0) -> Flops:
    """The count for a model as it is frozen and adapted."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inner = unwrap(model)
    adapted = {part_of(name, inner.family) for name in names if "lora_" in name}
    trained = {part_of(name, inner.family) for name in names if "lora_" not in name}
    return Flops(inner.config, trained, adapted, reference_forwards)


def load_of(batch: Mapping[str, Tensor]) -> Load:
    """What a packed batch puts through the model; a segment's queries see the keys up to their own."""
    queries, keys = batch["cu_q"].diff(), batch["cu_k"].diff()
    pairs = int((queries * keys - queries * (queries - 1) // 2).sum())
    return Load(tuple(batch["clip_frames"].tolist()), _tokens(batch), pairs, _labels(batch))


def counts_of(batch: Mapping[str, Tensor], flops: Flops | None) -> tuple[float, ...]:
    """The fields of `StepCounts` of one micro-batch."""
    counts = StepCounts(
        weight=float(batch["weight"].sum()) if "weight" in batch else 0.0,
        tokens=float(_tokens(batch)),
        audio_s=float(batch["clip_frames"].sum()) * FRAME_S,
        labels=float(_labels(batch)),
        pairs=float(batch["pair_weight"].sum()) if "pair_weight" in batch else 0.0,
        spoken=float(len(batch["transcript"])) if "transcript" in batch else 0.0,
        flops=0.0 if flops is None else flops.of(batch),
    )
    return astuple(counts)


def _tokens(batch: Mapping[str, Tensor]) -> int:
    return batch.get("packed_ids", batch["input_ids"]).numel()


def _labels(batch: Mapping[str, Tensor]) -> int:
    return int(batch["completion_mask"].sum()) if "completion_mask" in batch else batch["target"].numel()


@dataclass
class Meter:
    """Running sums between two log lines."""

    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    steps: int = 0
    counts: StepCounts = field(default_factory=StepCounts)

    def add(self, step: StepCounts) -> None:
        """Count a step; one without tokens is the end of the data."""
        self.steps += step.tokens > 0
        self.counts = StepCounts(*(a + b for a, b in zip(astuple(self.counts), astuple(step), strict=True)))

    def figures(self, steps_left: int, peak_flops: float) -> dict[str, float]:
        """What a log line says of the time since the last one.

        Args:
            peak_flops: operations per second of all devices; 0 leaves the MFU out.
        """
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        found = {
            "tokens": int(self.counts.tokens),  # since the last line
            "tokens_per_s": round(self.counts.tokens / elapsed, 1),
            "audio_s_per_s": round(self.counts.audio_s / elapsed, 2),
            "data_wait_share": round(self.waited_s / elapsed, 4),
            "eta_s": round(elapsed / max(self.steps, 1) * max(steps_left, 0), 1),
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
        }
        return found | ({"mfu": round(self.counts.flops / elapsed / peak_flops, 4)} if peak_flops else {})


def peak_memory() -> int:
    """The most bytes that this rank has held so far: of its GPU what torch has allocated, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(config: StageConfig) -> float | None:
    """Operations per second that MFU is a share of: `tracker.peak_tflops`, else the data sheet's where it is known.

    The data sheet's is that of bfloat16, and None for training in float32.
    """
    if config.tracker.peak_tflops:
        return config.tracker.peak_tflops * 1e12
    half = config.trainer.get("bf16", False) or config.model.dtype is Dtype.bfloat16
    if not half or not torch.cuda.is_available() or config.trainer.get("use_cpu", False):
        return None
    return peak_flops(torch.cuda.get_device_name())
