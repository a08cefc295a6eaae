"""What is measured of an arm besides time: operations and padding, memory, and the share of what the machine can do."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workload import STOCK_ARMS, Workload

from qwen2audio_train.data.prompts.tokenize import tokenize
from qwen2audio_train.layout import MAX_FRAMES, num_frames
from qwen2audio_train.model.flops import Load, packed_load, training_flops


def counted(workload: Workload, arm: str) -> dict[str, Any]:
    """Audio, labels, operations and padding of a step of one arm.

    `flops` are those that the arm computes, `useful_flops` those of the clips and labels alone; attention counts the
    pairs that causal masking leaves, over padded rows where rows are padded. A padded window counts for itself.
    """
    chosen = [workload.examples[clip] for clip in workload.order]
    tokens = [tokenize(e.rendered, workload.tokenizer, [len(e.waveform)]) for e in chosen]
    frames = [num_frames(len(e.waveform)) for e in chosen]
    lengths = [len(t.input_ids) for t in tokens]
    useful = packed_load(frames, lengths, sum(int(t.label_mask.sum()) for t in tokens))
    done = _done(arm, useful, lengths, workload.clips)
    flops, least = (_flops(workload, load) for load in (done, useful))
    return {
        "audio_s": useful.audio_s,
        "labels": useful.labels,
        "flops": flops,
        "useful_flops": least,
        "frame_padding": 1 - sum(useful.clip_frames) / sum(done.clip_frames),
        "token_padding": 1 - useful.tokens / done.tokens,
    }


def _done(arm: str, useful: Load, lengths: list[int], clips: int) -> Load:
    stock = arm in STOCK_ARMS
    frames, rows, labels = useful.clip_frames, lengths, useful.labels
    if stock or arm == "without_packed_encoder":
        frames = (MAX_FRAMES,) * len(frames)
    if stock or arm == "without_packed_decoder":
        batches = [lengths[start : start + clips] for start in range(0, len(lengths), clips)]
        rows = [max(batch) for batch in batches for _ in batch]
    if stock or arm == "without_label_head":
        labels = sum(rows)
    return packed_load(frames, rows, labels)


def _flops(workload: Workload, load: Load) -> int:
    if workload.options.train == "lora":
        parts: dict[str, Any] = {"trained": (), "adapted": ("language_model",)}
    else:
        parts = {}
    return sum(training_flops(workload.config(), load, **parts).values())


def matrix_rate(options: Any) -> float:
    """Operations per second of large matrix products, the best of five."""
    torch.set_num_threads(options.threads)
    size = 8192 if options.device == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=options.device, dtype=getattr(torch, options.dtype))
    now, best = clock(options.device), 0.0
    for _ in range(5):
        start = now()
        for _ in range(4):
            a @ b
        if options.device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (now() - start))
    return best


def clock(device: str) -> Callable[[], float]:
    """CPU time of this process where it computes in one thread, so that other processes do not count; else time."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


class Memory:
    """Peak memory of this process above what it holds now.

    On a CPU pages of files are left out: libraries are mapped in as they are used.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = 0 if device == "cuda" else _status("RssAnon")

    def peak(self) -> int:
        """In bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return most - _status("RssFile") - self.before


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
