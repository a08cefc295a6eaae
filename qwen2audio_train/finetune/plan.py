"""How a fine-tune is run on the device that is there: budget, steps, and the command lines of its scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, Example, TaskExample, clips_of
from qwen2audio_train.families.known import DEFAULT, FAMILIES
from qwen2audio_train.finetune.corpus import Prepared
from qwen2audio_train.layout import MAX_FRAMES, MAX_SAMPLES, SAMPLING_RATE
from qwen2audio_train.training.checkpoints.bases import base_of
from qwen2audio_train.training.checkpoints.folder import weights_folder

AUDIO_TOKENS_PER_S = DEFAULT.num_audio_tokens(MAX_FRAMES) / (MAX_SAMPLES / SAMPLING_RATE)
CHARACTERS_PER_TOKEN = 3
"""Fewer than the four of English text, so that estimates err on the large side."""
PROMPT_TOKENS = 40
"""Chat template and prompt."""
WINDOW_S = 30.0

FEWEST_STEPS = 10


@dataclass(frozen=True)
class Budget:
    """What a device takes: tokens of a pack, packs of a step, and the most steps of a run."""

    tokens_per_pack: int
    packs_per_step: int
    most_steps: int
    dtype: str


CPU = Budget(tokens_per_pack=500, packs_per_step=2, most_steps=150, dtype="float32")
"""150 steps of 1 000 tokens: minutes on two cores with 135 M parameters."""
GPU = Budget(tokens_per_pack=4096, packs_per_step=4, most_steps=2000, dtype="bfloat16")
"""LoRA at the 7B shape takes 0.26 MB per token with recomputed activations: 1 GB of them beside 17 GB of weights."""


@dataclass(frozen=True)
class Plan:
    """Figures of the training, and the arguments of each script."""

    budget: Budget
    tokens_per_pack: int
    steps: int
    train: list[str]
    before: list[str]
    after: list[str]
    export: list[str]


def device_budget() -> Budget:
    return GPU if torch.cuda.is_available() else CPU


def tokens_of(example: Example) -> int:
    """About how many tokens an example takes."""
    seconds = sum(clip.duration_s or WINDOW_S for clip in clips_of(example))
    if isinstance(example, TaskExample):
        characters = len(example.target) + len(example.question or "")
    else:
        messages = example.messages if isinstance(example, ChatExample) else ()
        characters = sum(len(part) for message in messages for part in message.content if isinstance(part, str))
    return math.ceil(AUDIO_TOKENS_PER_S * seconds + characters / CHARACTERS_PER_TOKEN + PROMPT_TOKENS)


def steps_of(tokens: int, step_tokens: int, epochs: float, most: int) -> int:
    """Steps of `epochs` passes over so many tokens, between `FEWEST_STEPS` and `most`."""
    return min(most, max(FEWEST_STEPS, math.ceil(epochs * tokens / step_tokens)))


def num_mel_bins(config: FinetuneConfig) -> list[str]:
    """The encoder's mel bands as a key of the stage, read off the checkpoint.

    Raises:
        ConfigError: the checkpoint is not there.
    """
    if config.init_from is None:
        return []
    try:
        audio = AutoConfig.from_pretrained(base_of(weights_folder(config.init_from), check=False)).audio_config
    except (ConfigError, OSError, ValueError) as error:
        raise ConfigError(f"init_from={config.init_from}: no checkpoint to start from ({error})") from error
    except AttributeError:
        raise ConfigError(
            f"init_from={config.init_from}: holds a model that hears nothing; expected {' or '.join(FAMILIES)}"
        ) from None
    return [f"model.num_mel_bins={audio.num_mel_bins}"]


def weighted_sources(config: FinetuneConfig, train: Path) -> list[str]:
    """The sources of the training: the corpus, and what is replayed beside it."""
    sources = {"mine": (str(train), 1 - config.replay_weight)}
    if config.replay is None:
        return [f"data.sources.mine.path={quoted([str(train)])}"]
    sources["replay"] = (config.replay, config.replay_weight)
    keys = ((name, path, weight) for name, (path, weight) in sources.items())
    return [
        text
        for name, path, weight in keys
        for text in (f"data.sources.{name}.path={quoted([path])}", f"data.sources.{name}.weight={weight:g}")
    ]


def make_plan(config: FinetuneConfig, found: Prepared, start: str) -> Plan:
    """The command lines; `start` is the checkpoint that is scored before."""
    run_dir, data, budget = Path(config.run_dir), Path(config.run_dir) / "data", device_budget()
    sizes = list(map(tokens_of, found.train))
    tokens_per_pack = max([budget.tokens_per_pack, *(size + PROMPT_TOKENS for size in sizes)])
    steps = config.max_steps or steps_of(
        sum(sizes), tokens_per_pack * budget.packs_per_step, config.epochs, budget.most_steps
    )
    common = [f"seed={config.seed}", f"num_threads={config.num_threads}"]
    on_cpu = [] if budget is GPU else ["model.activation_checkpointing=[]", "data.num_workers=0"]
    train = [
        *(f"name={config.name}", f"run_dir={run_dir / 'training'}", *common),
        *(f"model={config.model}", f"adapter={config.adapter}", "trainer=finetune", "data=none"),
        *([f"init_from={config.init_from}"] if config.init_from else []),
        *(f"model.dtype={budget.dtype}", f"trainer.bf16={str(budget is GPU).lower()}", *on_cpu),
        *weighted_sources(config, data / "train.jsonl"),
        *(f"data.tokens_per_pack={tokens_per_pack}", f"data.packs_per_step={budget.packs_per_step}"),
        *(f"data.loss_weighting={'sample' if found.labels else 'token'}", f"data.cache_dir={run_dir / 'cache'}"),
        *(f"trainer.max_steps={steps}", f"trainer.save_steps={max(1, math.ceil(steps / 4))}"),
        *num_mel_bins(config),
        *config.overrides,
    ]
    scored = [
        *(*common, f"max_examples={config.max_examples}", f"max_new_tokens={config.max_new_tokens}"),
        f"manifests.held_out={data / 'held_out.jsonl'}",
        *([f"manifests.guard={config.guard}"] if config.guard else []),
        f"train_manifests={quoted([str(data / 'train.jsonl')])}",
    ]
    return Plan(
        budget,
        tokens_per_pack,
        steps,
        train,
        [f"checkpoint={start}", f"output_dir={run_dir / 'before'}", f"dtype={budget.dtype}", *scored],
        [f"checkpoint={run_dir / 'training'}", f"output_dir={run_dir / 'after'}", f"dtype={budget.dtype}", *scored],
        [
            *(f"checkpoint={run_dir / 'training'}", f"output_dir={run_dir / 'export'}", f"dtype={budget.dtype}"),
            f"evaluation={run_dir / 'after'}",
            *(f"num_threads={config.num_threads}", f"check_manifest={data / 'held_out.jsonl'}", "check_examples=2"),
        ],
    )


def quoted(paths: Sequence[str]) -> str:
    """A list of paths as a value of Hydra's grammar."""
    return json.dumps(list(paths), ensure_ascii=False)


def described(config: FinetuneConfig, found: Prepared, plan: Plan) -> str:
    """The plan in a few lines."""
    hours = [
        sum(c.duration_s or 0.0 for e in side for c in clips_of(e)) / 3600 for side in (found.train, found.held_out)
    ]
    lines = [
        f"train on {len(found.train)} clips ({hours[0]:.2f} h), score {len(found.held_out)} ({hours[1]:.2f} h), "
        f"told apart {found.how}",
        f"answers: {', '.join(found.labels)}" if found.labels else "answers: free text",
        f"{plan.steps} steps of {plan.budget.packs_per_step} packs of up to {plan.tokens_per_pack} tokens, "
        f"adapter={config.adapter}, {plan.budget.dtype}, from {config.init_from or config.model}",
    ]
    if found.left_out:
        lines.append(f"left out: {len(found.left_out)}, listed in {Path(config.run_dir) / 'data' / 'left_out.txt'}")
        lines += [f"  {reason}" for reason in found.left_out[:3]]
    return "\n".join(lines)
