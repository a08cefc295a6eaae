"""The parts of `ten_minutes.py`, each of which runs in a process of its own and says what it finds line by line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

import dpo_step
import memory
import workload as clips
from counted import clock, counted, matrix_rate
from our_arms import OUR_ARMS, Packs
from record import machine, versions
from train_step import adapted
from workload import STOCK_ARMS, StockCollator, Workload, mended_loss, stock_model

from qwen2audio_train.config.schema import CheckpointingPolicy
from qwen2audio_train.model.flops import peak_flops
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio

LENGTHS = "lognormal"
PARITY_LAYERS, PARITY_CLIPS = 2, 8
"""Layers of either stack, and clips, where gradients are held against float32, whose 7B would not fit."""

STOCK_FORWARDS = 4
"""Forwards of a step on the stock path: the float32 logits of 32 padded rows are 14 GB, and held three times."""


def say(**figures: Any) -> None:
    """A line; a part's process sends it to the one that keeps them."""
    print(json.dumps(figures), flush=True)


class Steps(TrainerCallback):
    """Seconds, loss and gradient norm of every step, printed as it ends."""

    def __init__(self, device: str) -> None:
        self.device, self.clock = device, clock(device)
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.clock()

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if "loss" not in logs:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(self.clock() - self.started)
        say(step=len(self.seconds), step_s=self.seconds[-1], loss=logs["loss"], grad_norm=logs.get("grad_norm"))


class GpuWorkload(Workload):
    """The clips of a step, with the arguments of the shipped recipes: autocast under LoRA; stock layers checkpointed.

    Without checkpoints the stock path's padded windows and rows do not fit beside 7B weights.
    """

    def arguments(self, **more: Any) -> dict[str, Any]:
        stock = self.options.arm in STOCK_ARMS
        autocast = self.options.train == "lora" and self.options.dtype == "bfloat16"
        checkpointed = {"gradient_checkpointing": stock, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return super().arguments(**{"bf16": autocast, **checkpointed, **more})


class Kept:
    """What `make` gave, again: batches are made before time counts."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.made: dict[str, Any] = {}

    def __call__(self, asked: Any) -> Any:
        key = json.dumps(asked)
        if key not in self.made:
            self.made[key] = self.make(asked)
        return dict(self.made[key])


class KeptPacks:
    """The packs of one step over and over."""

    def __init__(self, packs: Packs, micro_batches: int) -> None:
        whole = iter(packs)
        self.packs, self.batches = packs, [next(whole) for _ in range(micro_batches)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.packs, name)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from map(dict, self.batches)


def prepared(model: Any, train: str) -> Any:
    """An adapter on the language model, or the model as it is."""
    if train == "full":
        return model
    if not isinstance(model, PackedQwen2Audio):
        model.enable_input_require_grads()  # or a checkpoint of a frozen stack has no input with a gradient
    return adapted(model)


def device(options: argparse.Namespace) -> None:
    """The machine, versions, and what large products reach."""
    say(machine=machine(), versions=versions())
    if options.device == "cuda":
        props = torch.cuda.get_device_properties(0)
        capability = list(torch.cuda.get_device_capability())
        say(memory_gib=props.total_memory / 2**30, capability=capability, cuda=torch.version.cuda)
    say(matrix_tflops=matrix_rate(options) / 1e12, python=platform.python_version())


def parity(options: argparse.Namespace) -> None:
    """Loss and gradients of a step, packed and stock, in the device's dtype against stock in float32."""
    clips.CLIPS[LENGTHS] = min(options.clips, PARITY_CLIPS)
    for part, layers in (("audio_config", "encoder_layers"), ("text_config", "num_hidden_layers")):
        shape = clips.SHAPES[options.shape][part]
        shape[layers] = min(shape.get(layers, PARITY_LAYERS), PARITY_LAYERS)
    truth = _gradients("stock", "float32", options)
    for arm in ("ours", "stock"):
        loss, gradients = _gradients(arm, options.dtype, options)
        worst = {"relative_error": 0.0, "of": ""}
        off = of = 0.0
        for name, expected in truth[1].items():
            error, size = float((gradients[name] - expected).norm()) ** 2, float(expected.norm()) ** 2
            off, of = off + error, of + size
            if size and (error / size) ** 0.5 > worst["relative_error"]:
                worst = {"relative_error": (error / size) ** 0.5, "of": name}
        say(arm=arm, loss=loss, loss_in_float32=truth[0], gradient_error=(off / of) ** 0.5, worst=worst)


def _gradients(arm: str, dtype: str, options: argparse.Namespace) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients (float32, by name) of the first step of a few clips."""
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(_asked(options, arm="ours", train="full", dtype=dtype), LENGTHS, folder)
        seeded = Workload(_asked(options, arm="ours", train="full", dtype="float32"), LENGTHS, folder)
    weights = seeded.build(PackedQwen2Audio).state_dict()
    model: Any = work.build(PackedQwen2Audio) if arm == "ours" else stock_model(work)
    model.load_state_dict(weights)
    model.train()
    if arm == "ours":
        batch = next(iter(Packs(work)))
        out = model(**{name: _there(value, work) for name, value in batch.items()})
        loss = out.nll_sum / out.weight_sum
    else:
        batch = StockCollator(work)([{"clip": clip} for clip in work.order])
        labels = batch.pop("labels").to(work.device)
        out = model(**{name: _there(value, work) for name, value in batch.items()})
        loss = mended_loss(out, labels, (labels[:, 1:] != -100).sum())
    loss.backward()
    return float(loss), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def _there(value: Any, work: Workload) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(work.device, work.dtype) if value.is_floating_point() and value.dim() > 1 else value.to(work.device)


def step(kind: str, arm: str, options: argparse.Namespace) -> None:
    """Timed steps of one arm."""
    forwards = STOCK_FORWARDS if arm in STOCK_ARMS else 1
    clips.CLIPS[LENGTHS] = options.clips // forwards
    asked = _asked(options, arm=arm, train=kind, dtype=options.dtype, micro_batches=forwards)
    with tempfile.TemporaryDirectory() as folder:
        work, steps = GpuWorkload(asked, LENGTHS, folder), Steps(options.device)
        make = (OUR_ARMS | STOCK_ARMS)[arm]
        if arm in OUR_ARMS and kind == "full":  # selective keeps 36 GiB of 8 k tokens, beside 63 of weights and states
            make = partial(make, policy=CheckpointingPolicy.full)
        trainer: Any = make(work, steps, partial(prepared, train=kind))
        trainer.remove_callback(PrinterCallback)
        if arm in OUR_ARMS:
            trainer.loader = KeptPacks(trainer.loader, asked.micro_batches)
        else:
            trainer.data_collator = Kept(trainer.data_collator)
        trainer.train()
    seconds, work_done = median(steps.seconds[1:]), counted(work, arm)
    rate = work_done["useful_flops"] / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if options.device == "cuda" else None
    say(
        seconds=seconds,
        mfu=rate / peak if peak else None,
        peak_tflops=peak and peak / 1e12,
        of_matrix_rate=rate / matrix_rate(options),
        audio_hours_per_hour=work_done["audio_s"] / seconds,
        tflop=work_done["flops"] / 1e12,
        useful_tflop=work_done["useful_flops"] / 1e12,
        frame_padding=work_done["frame_padding"],
        token_padding=work_done["token_padding"],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
    )


def dpo(side: str, options: argparse.Namespace) -> None:
    """Steps of DPO with an adapter, whose absence is the reference."""
    settings = argparse.Namespace(
        device=options.device,
        dtype=options.dtype,
        shape=options.shape,
        pairs=max(1, options.clips // 4),
        steps=options.rounds + 1,
        threads=1,
    )
    found = dpo_step.run(side, "adapter_off", settings)
    say(seconds=found["seconds_per_step"], memory_mib=found["memory_mib"], losses=found["losses"], pairs=settings.pairs)


def held_against_forecast(kind: str, options: argparse.Namespace) -> None:
    """The peak of a step of the recipe against what `launch/plan.py` says of it."""
    name = {
        "lora": "bfloat16, LoRA, both checkpointed",
        "full": "bfloat16, AdamW with stochastic rounding, both checkpointed",
    }[kind]
    say(case=name, **memory.measure(name, options.clips, clips.SHAPES[options.shape]))


def _asked(options: argparse.Namespace, **more: Any) -> argparse.Namespace:
    fixed = {"micro_batches": 1, "threads": 1, "optim": "adamw_torch_fused"}
    return argparse.Namespace(**{**vars(options), **fixed, **more})


def run(part: str, options: argparse.Namespace) -> None:
    """A part by its name in `ten_minutes.PARTS`; it has this process for itself."""
    options.threads = 1 if options.device == "cpu" else (os.cpu_count() or 1)
    warnings.simplefilter("ignore")
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for others and says so
    torch.set_num_threads(options.threads)
    clips.CLIPS[LENGTHS] = options.clips
    kind, _, arm = part.partition(".")
    if kind == "device":
        device(options)
    elif kind == "parity":
        parity(options)
    elif kind == "memory":
        held_against_forecast(arm, options)
    elif kind == "dpo":
        dpo(arm, options)
    else:
        step(kind, arm, options)
