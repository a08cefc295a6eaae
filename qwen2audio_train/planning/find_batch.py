"""The largest pack that a device takes, found by real steps with packs of growing size: the recipe's model, random
weights, random audio and text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen2audio_train.batch import PackedBatch
from qwen2audio_train.config.schema import ConfigError, Stage, StageConfig
from qwen2audio_train.data.samples.collate import indexed, on_device, pack
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.build import MODELS, architecture_config
from qwen2audio_train.model.freeze import set_trainable
from qwen2audio_train.model.packed import PackedAudioLM
from qwen2audio_train.planning.dry_run import Plan, gib
from qwen2audio_train.planning.forecast import PlanOptions, Typical, typical_sample
from qwen2audio_train.planning.peak_memory import PeakMemory
from qwen2audio_train.training.stages.arguments import forwards_per_step
from qwen2audio_train.training.stages.policy import compile_blocks
from qwen2audio_train.training.trainers.optimizers import build_optimizer

MOST_SAMPLES = 2**14
"""Where the search ends on a device that takes everything."""


@dataclass(frozen=True)
class Trial:
    """A step that was taken: samples of its packs, the most memory beyond the baseline, and its time."""

    samples: int
    peak_bytes: int
    seconds: float


def largest(fits: Callable[[int], bool], most: int = MOST_SAMPLES) -> int:
    """The largest number up to `most` that fits, by doubling and then halving the gap; 0 where not even 1 does.

    Args:
        fits: true up to some number and false beyond it.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def print_largest_pack(plan: Plan, options: PlanOptions) -> Trial:
    """Try packs until one does not fit, and print the token budget of the largest that does.

    Raises:
        ConfigError: a recipe that one process cannot try, no limit on a CPU, or a single sample that does not fit.
    """
    check(plan.config, options)
    typical = typical_sample(plan, options)
    tokens, forwards = typical.load.tokens, min(forwards_per_step(plan.config, 1), 2)
    limit = float("inf") if options.limit_gib is None else options.limit_gib * 2**30
    memory = PeakMemory()
    step, _ = stepper(plan, typical, forwards)
    attempt(step, 1, memory)  # what is made once, such as the optimizer's state, belongs to every step
    trials: dict[int, Trial] = {}

    def fits(samples: int) -> bool:
        trial = attempt(step, samples, memory)
        taken = trial is not None and trial.peak_bytes <= limit
        if trial is not None and taken:
            trials[samples] = trial
        used = "out of memory" if trial is None else f"{gib(trial.peak_bytes)}, {trial.seconds:.2f} s"
        print(f"{samples * tokens:,} tokens ({samples} samples): {used}{'' if taken else ', does not fit'}", flush=True)
        return taken

    best = largest(fits)
    if not best:
        raise ConfigError(f"one sample of {tokens} tokens does not fit; {typical.origin}")
    found = trials[best]
    print(
        f"data.tokens_per_pack={best * tokens} fits, one sample more does not: {gib(found.peak_bytes)}, "
        f"{best * tokens * forwards / found.seconds:,.0f} tokens/s on {device()}. The samples: {typical.origin}. "
        "Leave some of it to packs of another mixture."
    )
    return found


def check(config: StageConfig, options: PlanOptions) -> None:
    """Refuse what a process alone cannot try."""
    if config.stage not in (Stage.pretrain, Stage.sft):
        raise ConfigError(f"mode=find_batch and stage {config.stage}: only pretrain and sft have a token budget")
    if config.deepspeed.stage is not None or options.gpus > 1:
        raise ConfigError("mode=find_batch: tries one process; set deepspeed=none gpus=1, or ask for mode=forecast")
    if config.adapter.kind.value == "qlora":
        raise ConfigError("mode=find_batch and adapter.kind=qlora: random weights are not quantised; try adapter=lora")
    if options.limit_gib is None and not torch.cuda.is_available():
        raise ConfigError("limit_gib: no value was given, and without a GPU nothing else ends the search")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attempt(step: Callable[[int], None], samples: int, memory: PeakMemory) -> Trial | None:
    """A step with its peak and time; None where the device's memory did not suffice."""
    memory.reset()
    started = time.perf_counter()
    try:
        step(samples)
    except torch.OutOfMemoryError:
        return None
    return Trial(samples, memory.peak(), time.perf_counter() - started)


def stepper(plan: Plan, typical: Typical, forwards: int) -> tuple[Callable[[int], None], torch.optim.Optimizer]:
    """What trains the recipe's model for a step of `forwards` packs of so many samples, and its optimizer."""
    config, arguments = plan.config, plan.arguments
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    model: Any = apply_adapter(random_model(config), config.adapter)
    set_activation_checkpointing(
        model, config.model.activation_checkpointing, config.model.activation_checkpointing_policy
    )
    if config.model.compile:
        compile_blocks(model)
    model.train()
    optimizer = build_optimizer(arguments, model, config.optimizer)

    def step(samples: int) -> None:
        optimizer.zero_grad()
        family = family_of(config.model.family)
        batch = indexed(random_pack(typical, samples, config.model.num_mel_bins, family), family)
        inputs = on_device(batch, device())
        for _ in range(forwards):
            with torch.autocast(device().type, torch.bfloat16, enabled=bool(arguments.bf16)):
                output = model(**inputs)
            (output.nll_sum / output.weight_sum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        if device().type == "cuda":
            torch.cuda.synchronize()

    return step, optimizer


def random_model(config: StageConfig) -> PackedAudioLM:
    """The architecture of a recipe with random weights on the device, frozen as it says."""
    with torch.device(device()):
        model: PackedAudioLM = MODELS[config.model.family]._from_config(
            architecture_config(config.model, None), dtype=getattr(torch, config.model.dtype.value)
        )
    set_trainable(model, config.model.freeze)
    return model


def random_pack(typical: Typical, samples: int, num_mel_bins: int, family: Family) -> PackedBatch:
    """So many samples of random audio and text end to end."""
    frames = typical.load.clip_frames
    audio = sum(family.num_audio_tokens(f) for f in frames)
    length = audio + typical.prompt_tokens + typical.label_tokens
    rng = np.random.default_rng(0)
    sample = Sample(
        id="random",
        source="",
        task="asr",
        input_ids=rng.integers(0, 256, length),
        label_mask=np.arange(length) >= length - typical.label_tokens,
        audio_slot=np.arange(audio),
        mels=tuple(rng.standard_normal((num_mel_bins, family.mel_columns(f)), dtype=np.float32) for f in frames),
        clip_frames=frames,
        position_ids=family.positions(length, np.arange(audio)),
    )
    return pack([sample] * samples, num_mel_bins=num_mel_bins, share_prefixes=False)
