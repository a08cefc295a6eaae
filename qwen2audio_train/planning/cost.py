"""What a step costs: time, traffic and money, from the operations that `model/flops.py` counts."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2audio_train.errors import UserError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import num_frames, num_samples_of, window_samples
from qwen2audio_train.model.flops import PEAK_BF16_FLOPS, Load, packed_load

MEMORY_BYTES = {"A100-80": 80e9, "H100": 80e9, "H200": 141e9, "L40S": 48e9}
"""Memory of the same GPUs, from the same data sheets."""


def sample_load(
    clip_s: float, label_tokens: int, prompt_tokens: int, answers: int = 1, family: Family = DEFAULT
) -> Load:
    """The load of one sample with a single clip, of as many windows as it needs.

    Args:
        label_tokens: of each answer; several answers share the clip and the prompt, as the branches of a tree.
    """
    frames = [num_frames(n) for n in window_samples(num_samples_of(clip_s))] if clip_s else []
    trunk = sum(family.num_audio_tokens(f) for f in frames) + prompt_tokens
    if answers == 1:
        return packed_load(frames, [trunk + label_tokens], label_tokens)
    pairs = trunk * (trunk + 1) // 2 + answers * (label_tokens * trunk + label_tokens * (label_tokens + 1) // 2)
    return Load(tuple(frames), trunk + answers * label_tokens, pairs, answers * label_tokens)


def repeated(load: Load, times: int) -> Load:
    """`times` such samples in one row."""
    return Load(load.clip_frames * times, load.tokens * times, load.pairs * times, load.labels * times)


@dataclass(frozen=True)
class Throughput:
    """What a machine does with a load, per second of wall time and all GPUs together."""

    step_s: float
    tokens_per_s: float
    audio_hours_per_hour: float
    price_per_audio_hour: float


def throughput(
    load: Load, flops: float, *, gpu: str, utilisation: float, gpus: int = 1, gpu_hour_price: float = 0.0
) -> Throughput:
    """Speed at a given share of the peak.

    Args:
        load, flops: of one pass on one GPU; every GPU runs one like it.
        gpu: a key of `PEAK_BF16_FLOPS`.
        utilisation: share of the data sheet's peak that `flops` reach, in (0, 1]. It is the MFU where `flops` are the
            useful operations alone, without those that checkpointing repeats.
        gpu_hour_price: in any currency.

    Raises:
        ValueError: an unknown GPU, or a share outside of (0, 1].
    """
    if gpu not in PEAK_BF16_FLOPS:
        raise UserError(f"gpu {gpu} is unknown; known are {', '.join(PEAK_BF16_FLOPS)}")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation is {utilisation}, expected a share in (0, 1]")
    step_s = flops / (PEAK_BF16_FLOPS[gpu] * utilisation)
    audio_rate = load.audio_s * gpus / step_s
    return Throughput(
        step_s=step_s,
        tokens_per_s=load.tokens * gpus / step_s,
        audio_hours_per_hour=audio_rate,
        price_per_audio_hour=gpu_hour_price * gpus / audio_rate if audio_rate else 0.0,
    )


def traffic_bytes(parameters: int, stage: int, micro_steps: int, bytes_per_value: int = 2) -> int:
    """Bytes that each rank sends in one optimiser step under a ZeRO stage, for many ranks.

    Stages 0 and 1 reduce and gather once per step. Stage 2 reduces at every micro-step and gathers once. Stage 3
    gathers for forward and for backward and reduces, at every micro-step.

    Args:
        parameters: trained ones for stages 0 to 2, all for stage 3.
    """
    passes = {0: 2, 1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}
    return parameters * bytes_per_value * passes[stage]
