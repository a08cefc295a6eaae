"""What ten minutes on one GPU tell: parity in bfloat16, steps at the 7B shape against the stock path, memory, MFU.

    python benchmarks/gpu/ten_minutes.py --out lines.jsonl                       # one H100 or H200, no network
    python benchmarks/gpu/ten_minutes.py --device cpu --shape small --dtype float32 --parts device parity lora.ours

Every part is a process of its own with a budget of seconds (`PARTS`, in the order of their worth). What it finds is
appended to `--out` line by line, as JSON, as it comes: a run that is cut off keeps what it had. A part that fails, for
want of memory or of time, is a line with `error`, and the next one starts. Weights are random and clips are noise;
batches are made before the first step, as a loader's workers would.

A step's line has the seconds of every timed step, `mfu` by the useful operations of `model/flops.py` (matrix products
and causal attention of real lengths, forward and backward, nothing that is computed twice; LoRA has no gradient of
frozen weights) over the dense bfloat16 peak of the data sheet, `of_matrix_rate` over what large products reach in the
same process, and `audio_hours_per_hour`. After the last part comes `summary`: seconds of every arm over ours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import parts

FORK = multiprocessing.get_context("fork")  # what all parts import is imported once, before any of them sees the GPU
ARMS = ("without_packed_encoder", "without_packed_decoder", "without_label_head", "without_selective")
PARTS: dict[str, int] = {
    "device": 40,
    "parity": 60,
    "lora.ours": 80,
    "lora.stock": 80,
    "memory.lora": 60,
    "full.ours": 80,
    "dpo.ours": 70,
    "dpo.stock": 70,
    "full.stock": 80,
    "memory.full": 60,
    **{f"lora.{arm}": 70 for arm in ARMS},
    "lora.trl_sft": 70,
}
"""Seconds that a part may take of ten minutes; most need less than they may take."""


def lines_of(part: str, options: argparse.Namespace, seconds: float) -> Iterator[dict[str, Any]]:
    """What a part finds, and a last line with `error` where it failed or took too long."""
    ends = time.monotonic() + seconds
    pipe, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_part, args=(part, options, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while pipe.poll(max(0.0, ends - time.monotonic())):
            yield pipe.recv()
        yield {"error": f"not done within {seconds:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"error": f"the process ended with exit code {process.exitcode}: out of the host's memory?"}
    finally:
        process.kill()
        process.join()


def _part(part: str, options: argparse.Namespace, pipe: Connection) -> None:
    """One part, in the process that was forked for it."""
    parts.say = lambda **figures: pipe.send(figures)
    try:
        parts.run(part, options)
    except Exception:
        pipe.send({"error": traceback.format_exc()[-1500:]})


def summary(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of a step of every arm over those of ours, by what is trained."""
    seconds = {line["part"]: line["seconds"] for line in lines if "seconds" in line}
    kinds = sorted({part.partition(".")[0] for part in seconds if f"{part.partition('.')[0]}.ours" in seconds})
    return {
        kind: {
            part.partition(".")[2]: round(value / seconds[f"{kind}.ours"], 2)
            for part, value in seconds.items()
            if part.startswith(f"{kind}.") and not part.endswith(".ours")
        }
        for kind in kinds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ten_minutes.jsonl"), help="lines are appended to it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--shape", choices=["tiny", "small", "7b"], default="7b")
    parser.add_argument("--clips", type=int, default=32, help="of a step, 8.9 s on average: 32 are 8 k tokens")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of an arm")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts; their budgets are for ten")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    found = []
    with options.out.open("a") as out:
        for part in options.parts:
            left = ends - time.monotonic()
            seconds = min(PARTS[part] * options.minutes / 10, left)
            for line in lines_of(part, options, seconds) if left > 0 else [{"error": "no time was left"}]:
                found.append({"part": part, **line})
                _keep(out, found[-1])
        _keep(out, {"part": "summary", "seconds_over_ours": summary(found)})


def _keep(out: IO[str], line: dict[str, Any]) -> None:
    for stream in (out, sys.stdout):
        print(json.dumps(line), file=stream, flush=True)


if __name__ == "__main__":
    main()
