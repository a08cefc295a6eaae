"""A training step side by side: ours, ours with a trick taken away, and what others do with the same clips.

    python benchmarks/train_step.py                 # every arm on every length set: 20 minutes, 30 GB of memory
    python benchmarks/train_step.py --quick         # ours and the stock Trainer, under two minutes
    python benchmarks/train_step.py --save train_step.cpu2
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --shape 7b --train lora

Every arm is a whole trainer in a process of its own. They take turns, one optimiser step each, so that a busy machine
slows all of them alike. A step is everything between waveforms in memory and updated weights: spectrogram, tokens,
collation, forward, backward, clipping, AdamW. Nothing is prefetched on any side. The first step is not timed: its loss
and gradient norm have to be the same for all arms, or nothing is measured. An arm computes in one thread and its CPU
time counts, so that other processes do not. `--quick` runs two length sets at once, on a core each, and times one or
two steps, in which the stock Trainer still pages memory in: ours looks up to a fifth faster than later.

Memory is the peak of an arm's process above what it held before its model was built, so weights, gradients and the
optimiser's state are in it. On a GPU it is what torch has allocated at most. `workload.py` fixes what is measured on.
`external/others.py` does the same for ms-swift and LLaMA-Factory, which need environments of their own.

`--device cuda` has not been run yet. There the arms run one after the other, since not all of them fit at once.

The last line is JSON: speed-up over the stock Trainer and memory over its, for every length set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from counted import Memory, clock, counted, matrix_rate
from our_arms import OUR_ARMS
from peft import get_peft_model
from record import save
from transformers import PrinterCallback, TrainerCallback
from workload import CLIPS, LENGTH_SETS, SHAPES, STOCK_ARMS, Workload, seconds_of

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.adapters import lora_config

ARMS = OUR_ARMS | STOCK_ARMS
FORK = multiprocessing.get_context("fork")  # what all arms import is imported once
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}
"""Relative, of the loss and of the gradient norm."""
QUICK_ROUNDS = {"3s": 1, "lognormal": 1, "librispeech": 1, "30s": 2, "chat": 1}
"""Timed steps under `--quick`: two where the sides are nearest to each other, and one where a step is long."""


class Baton(TrainerCallback):
    """Waits for its turn before every step and reports the step when it is over."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.memory, self.clock, self.started = Memory(device), clock(device), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = self.clock() - self.started
        step = {"seconds": seconds, "memory": self.memory.peak(), "loss": logs["loss"], "norm": logs["grad_norm"]}
        self.pipe.send(step)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = self.pipe.recv() == "stop"
        self.started = self.clock()


def run_arm(arm: str, length_set: str, options: argparse.Namespace, pipe: Connection) -> None:
    """One arm, in the process that was forked for it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for others and says so
    try:
        with tempfile.TemporaryDirectory() as folder:
            workload = Workload(options, length_set, folder)
            baton = Baton(pipe, options.device)
            trainer = ARMS[arm](workload, baton, adapted if options.train == "lora" else lambda model: model)
            trainer.remove_callback(PrinterCallback)
            pipe.send(counted(workload, arm))
            trainer.train()
    except Exception:
        pipe.send(traceback.format_exc())


def adapted(model: Any) -> Any:
    """LoRA on the language model, by our names of its modules, which the stock model has too; all else is frozen."""
    torch.manual_seed(1)
    config = AdapterConfig(kind=AdapterKind.lora, modules=["language_model"])
    return get_peft_model(model, lora_config(config, QWEN2_AUDIO))


class Arm:
    """A forked process and the steps that it has reported."""

    def __init__(self, name: str, length_set: str, options: argparse.Namespace) -> None:
        self.name = name
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=run_arm, args=(name, length_set, options, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.counted: dict[str, Any] = self._receive()
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        self.pipe.send("go")
        self.steps.append(self._receive())

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join()

    def _receive(self) -> Any:
        try:
            received = self.pipe.recv()
        except EOFError:
            received = f"the process ended with exit code {self.process.exitcode}: out of memory?"
        if isinstance(received, str):
            sys.exit(f"{self.name} failed:\n{received}")
        return received


def race(length_set: str, names: Sequence[str], options: argparse.Namespace) -> list[Arm]:
    """All arms on one length set: a first step each, whose results have to agree, then rounds of one step each."""
    if options.device == "cuda":
        arms = []
        for name in names:
            arm = Arm(name, length_set, options)
            for _ in range(1 + options.rounds):
                arm.step()
            arm.stop()
            arms.append(arm)
        check_parity(length_set, arms, options.dtype)
        return arms
    arms = [Arm(name, length_set, options) for name in names]
    for arm in arms:
        arm.step()
    check_parity(length_set, arms, options.dtype)
    for _ in range(options.rounds):
        for arm in arms:
            arm.step()
    for arm in arms:
        arm.stop()
    return arms


def run_set(length_set: str, names: Sequence[str], options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Figures of every arm on one length set."""
    if options.quick:
        options = argparse.Namespace(**vars(options) | {"rounds": QUICK_ROUNDS[length_set]})
    arms = race(length_set, names, options)
    stock = next(arm for arm in arms if arm.name == "stock")
    return {arm.name: figures(arm, stock, rate) for arm in arms}


def check_parity(length_set: str, arms: Sequence[Arm], dtype: str) -> None:
    """The first steps have the same loss and the same gradient norm."""
    ours = arms[0].steps[0]
    for arm in arms[1:]:
        for figure, tolerance in zip(("loss", "norm"), TOLERANCE[dtype], strict=True):
            found, expected = arm.steps[0][figure], ours[figure]
            if abs(found - expected) > tolerance * expected:
                sys.exit(
                    f"{length_set}: {figure} of {arm.name} is {found}, of {arms[0].name} {expected}; they are to agree "
                    f"to {tolerance:g}, or the times mean nothing"
                )


def figures(arm: Arm, stock: Arm, rate: float) -> dict[str, Any]:
    """What is reported of an arm."""
    seconds = spread([step["seconds"] for step in arm.steps[1:]])
    pairs = list(zip(stock.steps[1:], arm.steps[1:], strict=True))
    work = arm.counted
    return {
        "seconds": seconds,
        "speedup": spread([theirs["seconds"] / own["seconds"] for theirs, own in pairs]),
        "audio_s_per_s": work["audio_s"] / seconds["median"],
        "labels_per_s": work["labels"] / seconds["median"],
        "tflop": work["flops"] / 1e12,
        "mfu": work["useful_flops"] / seconds["median"] / rate,
        "frame_padding": work["frame_padding"],
        "token_padding": work["token_padding"],
        "memory_mib": arm.steps[-1]["memory"] / 2**20,
        "memory_ratio": arm.steps[-1]["memory"] / stock.steps[-1]["memory"],
        "loss": arm.steps[0]["loss"],
        "grad_norm": arm.steps[0]["norm"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def show(length_set: str, rows: dict[str, dict[str, Any]]) -> None:
    """A table of one length set."""
    table = {name: cells(row) for name, row in rows.items()}
    print("".join(f"{title:>12}" for title in ("", *table["ours"])).replace(" " * 12, f"{length_set:24}", 1))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{cell:>12}" for cell in row.values()), flush=True)


def cells(row: dict[str, Any]) -> dict[str, str]:
    times = row["seconds"]
    return {
        "s/step": f"{times['median']:.2f}",
        "spread": f"{times['least']:.2f}-{times['most']:.2f}",
        "speed-up": f"{row['speedup']['median']:.2f}",
        "audio-s/s": f"{row['audio_s_per_s']:.1f}",
        "labels/s": f"{row['labels_per_s']:.1f}",
        "TFLOP": f"{row['tflop']:.3f}",
        "MFU": f"{row['mfu']:.0%}",
        "padding": f"{row['frame_padding']:.0%} {row['token_padding']:.0%}",
        "MiB": f"{row['memory_mib']:.0f}",
        "MiB ratio": f"{row['memory_ratio']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--train", choices=["full", "lora"], default="full", help="lora: on the language model alone")
    parser.add_argument("--optim", default="adamw_torch_fused", help="as in TrainingArguments")
    parser.add_argument("--sets", nargs="+", choices=list(LENGTH_SETS), help="all; of --quick all but chat")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="ours and stock always run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1, help="forwards of a step")
    parser.add_argument("--threads", type=int, default=1, help="of every arm; with one, CPU time is measured")
    parser.add_argument("--jobs", type=int, default=1, help="length sets at once")
    parser.add_argument("--save", metavar="NAME", help="store the figures as benchmarks/results/NAME.json")
    options = parser.parse_args()
    options.sets = options.sets or [name for name in LENGTH_SETS if not (options.quick and name == "chat")]
    if options.quick:
        options.arms, options.jobs = ["ours", "stock"], 2
    names = [name for name in ARMS if name in ("ours", "stock", *options.arms)]
    with ProcessPoolExecutor(options.jobs, mp_context=FORK) as pool:
        rate = pool.submit(matrix_rate, options).result()
        print(f"matrix products: {rate / 1e9:.0f} GFLOP/s", flush=True)
        longest_first = sorted(options.sets, key=lambda s: -sum(seconds_of(s, CLIPS[s])))
        running = {pool.submit(run_set, s, names, options, rate): s for s in longest_first}
        done = {}
        for future in as_completed(running):
            done[running[future]] = future.result()
            show(running[future], future.result())
    found = {length_set: done[length_set] for length_set in options.sets}
    if options.save:
        save(options.save, {"options": vars(options), "matrix_gflops": rate / 1e9, "sets": found})
    speedup = {length_set: round(rows["ours"]["speedup"]["median"], 2) for length_set, rows in found.items()}
    memory = {length_set: round(rows["ours"]["memory_ratio"], 2) for length_set, rows in found.items()}
    print(json.dumps({"speedup": speedup, "memory_ratio": memory}))


if __name__ == "__main__":
    main()
