"""The loader beside other ways of feeding Qwen2-Audio: speed per core, memory, time to the first batch and to resume.

    python benchmarks/loader.py            # 5 s and 10 s clips, the best of three epochs: some minutes
    python benchmarks/loader.py --quick    # one epoch of fewer clips

Every way turns the same FLAC clips and texts into batches of 16 clips: decoded, spectrograms, ids. All of them run
without workers and each in a process of its own; speed is audio seconds per second of CPU time, that of helpers
included, so that other processes hardly count. The ways are

    ours            manifest and index, shuffled over the whole corpus, packed; clips are members of tar files
    ours_streaming  the same tar files read front to back, without an index
    ours_no_deadline  ours with data.decode_timeout_s=null: decoded in the worker itself, not in a helper
    stock_processor `datasets` streaming from Parquet, Qwen2AudioProcessor on every batch: what most scripts do
    stock_by_clip   the same with WhisperFeatureExtractor clip by clip, which is faster
    webdataset      tar files read by webdataset, WhisperFeatureExtractor clip by clip
    lhotse          lhotse's cuts, sampler and audio, and its own Whisper spectrogram, which is not padded to 30 s

`stock` in the last line is the better of the two stock ways. Resuming is from a fresh process to the first batch behind
1, 50 and 99 % of an epoch: ours loads its state; the stock ways go through what was seen, as Trainer does; webdataset
passes over the raw members; lhotse's sampler loads its state. Ways whose package is missing are left out.

Prints a JSON line per way and length; the last line has the speeds on 5 s clips, and ours in resuming.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from loader_ways import BATCH, STOCK, WAYS, Start, tokenizer, write_corpus
from record import save

RESUME_AT = (1, 50, 99)


def measure(way: str, folder: Path, num_clips: int, seconds: int, rounds: int) -> dict[str, Any]:
    """Best speed of some epochs, time to the first batch, memory, and times to resume; in this process."""
    torch.set_num_threads(1)
    tokenizer()
    skips = {percent: max(num_clips // BATCH * percent // 100, 1) for percent in RESUME_AT}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here on
    before_kib, began = _peak_kib(), time.perf_counter()
    start = WAYS[way](folder, [])
    next(start(0))
    first_s = time.perf_counter() - began
    speeds = []
    for _ in range(rounds):
        batches, clips = start(0), -BATCH  # the first batch starts the clock
        while clips < num_clips - 2 * BATCH:
            clips += next(batches)
            if clips == 0:
                began_cpu = cpu_seconds()
        speeds.append(clips * seconds / (cpu_seconds() - began_cpu))
    memory_kib = _peak_kib() - before_kib
    start = WAYS[way](folder, list(skips.values()))
    return {
        "way": way,
        "clip_s": seconds,
        "audio_s_per_s_per_core": round(max(speeds)),
        "first_batch_s": round(first_s, 3),
        "memory_mib": round(memory_kib / 1024),
        "resume_s": {str(percent): round(_first_batch_s(start, skip), 3) for percent, skip in skips.items()},
    }


def _peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def _first_batch_s(start: Start, skip: int) -> float:
    """CPU seconds from nothing to the first batch."""
    began = cpu_seconds()
    next(start(skip))
    return cpu_seconds() - began


def cpu_seconds() -> float:
    """CPU time of this process and of its living children: ours decodes in a helper, which has a deadline."""
    seconds = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            nanoseconds = int((path.parent / "schedstat").read_text().split()[0])
        except OSError:  # it has ended
            continue
        seconds += nanoseconds / 1e9 if parent == os.getpid() else 0.0
    return seconds


def in_process(way: str, *numbers: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, *map(str, numbers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch of few clips")
    parser.add_argument("--save", help="name of the file in results/ that keeps the figures")
    parser.add_argument(
        "--way", nargs=5, help=argparse.SUPPRESS, metavar=("WAY", "FOLDER", "CLIPS", "SECONDS", "ROUNDS")
    )
    args = parser.parse_args()
    if args.way:
        way, folder, *numbers = args.way
        print(json.dumps(measure(way, Path(folder), *map(int, numbers))))
        return
    ways = [way for way in WAYS if way not in ("webdataset", "lhotse") or importlib.util.find_spec(way)]
    for way in WAYS:
        if way not in ways:
            print(f"{way} is left out: pip install {way}")
    num_clips, rounds = (112, 1) if args.quick else (320, 3)
    figures: list[dict[str, Any]] = []
    for seconds in (5, 10):
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), num_clips, seconds)
            for way in ways:
                figures.append(in_process(way, folder, num_clips, seconds, rounds))
                print(json.dumps(figures[-1]), flush=True)
    if args.save:
        save(args.save, {"batch_clips": BATCH, "epoch_clips": num_clips, "ways": figures})
    speed = {one["way"]: one["audio_s_per_s_per_core"] for one in figures if one["clip_s"] == 5}
    stock = max(speed.pop(way) for way in STOCK)
    (mine,) = (one for one in figures if one["clip_s"] == 5 and one["way"] == "ours")
    print(
        json.dumps(
            {"audio_s_per_s_per_core": {"ours": speed.pop("ours"), "stock": stock, **speed}}
            | {"resume_s": mine["resume_s"]}
        )
    )


if __name__ == "__main__":
    main()
