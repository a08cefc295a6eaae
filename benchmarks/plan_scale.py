"""Planning over a simulated index of 100 million examples: memory, and examples planned per second.

    python benchmarks/plan_scale.py            # 100 million: 2.8 GB of records in the folder for temporary files
    python benchmarks/plan_scale.py --quick    # 5 million

Durations are LibriSpeech-like: N(12.3 s, 3.8 s) within 1.3 to 34 s. The records are memory mapped, as every index is,
and examples are drawn all over the file. The plan is begun at the first, the middle and the last window of the epoch,
as a resumed run begins it. `resident_mib` is the most that planning adds to the memory of the process, mapped pages of
the records included; `anonymous_mib` is the part of it that is no such page.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import save

from qwen2audio_train.data.order.index import RECORD, Index
from qwen2audio_train.data.order.mixture import MixedSource, Mixture
from qwen2audio_train.data.order.planner import Cursor, Planner, steps
from qwen2audio_train.data.order.state import save_state

TOKENS_PER_PACK, PACKS_PER_STEP = 8192, 64
BLOCK = 5_000_000


def write_index(folder: Path, num_examples: int) -> Index:
    """Records alone; no manifest is behind them."""
    rng = np.random.default_rng(0)
    with (folder / "records.bin").open("wb") as out:
        for start in range(0, num_examples, BLOCK):
            records = np.zeros(min(BLOCK, num_examples - start), RECORD)
            records["duration_s"] = rng.normal(12.3, 3.8, len(records)).clip(1.3, 34)
            records["audio_tokens"] = np.round(records["duration_s"] * 25)
            records["text_tokens"] = np.round(records["duration_s"] * 4) + 12
            out.write(records.tobytes())
    return Index(folder, (), {"asr": num_examples}, (num_examples,), "simulated", "simulated")


def memory_mib(key: str) -> float:
    """A line of this process's status, in MiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) / 1024


def plan_from(planner: Planner, window: int, num_examples: int, peak: dict[str, float]) -> dict[str, Any]:
    """Plan so many examples from the start of a window on: seconds to the first step, speed, how full the packs are."""
    began, began_cpu, first_s = time.perf_counter(), time.process_time(), 0.0
    planned = packs = tokens = 0
    start = behind = Cursor(0, window, 0)
    for step, cursor, left_out in steps(planner, start, PACKS_PER_STEP, epochs=2):
        behind = cursor
        first_s = first_s or time.perf_counter() - began
        planned += sum(len(pack.rows) for pack in step) + len(left_out)
        packs += len(step)
        tokens += sum(pack.tokens for pack in step)
        peak |= {key: max(value, memory_mib(key)) for key, value in peak.items()}
        if planned >= num_examples:
            break
    return {
        "window": window,
        "examples_per_s": round(planned / (time.process_time() - began_cpu)),
        "first_step_s": round(first_s, 3),
        "fill": round(tokens / (packs * TOKENS_PER_PACK), 4),
        "state_bytes": len(json.dumps(save_state(planner, PACKS_PER_STEP, 1, behind))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 million examples")
    parser.add_argument("--save", help="name of the file in results/ that keeps the figures")
    args = parser.parse_args()
    num_examples, planned = (5_000_000, 40_000) if args.quick else (100_000_000, 400_000)
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), num_examples)
        before = {key: memory_mib(key) for key in ("RssAnon", "VmRSS")}
        peak = dict(before)
        planner = Planner(Mixture((MixedSource("s", num_examples, 1.0),), seed=0), (index,), TOKENS_PER_PACK)
        last = planner.num_windows(0) - 1
        runs = []
        for window in (0, last // 2, last):
            runs.append(plan_from(planner, window, planned, peak))
            print(json.dumps(runs[-1]), flush=True)
    figures = {
        "examples": num_examples,
        "anonymous_mib": round(peak["RssAnon"] - before["RssAnon"], 1),
        "resident_mib": round(peak["VmRSS"] - before["VmRSS"], 1),
        "examples_per_s": min(run["examples_per_s"] for run in runs),
        "fill": min(run["fill"] for run in runs),
        "state_bytes": max(run["state_bytes"] for run in runs),
    }
    if args.save:
        save(args.save, {**figures, "runs": runs})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
