"""Resume across backends: what one of {none, ZeRO-0..3} x {1, 2 ranks} saved, every other goes on from.

    python benchmarks/resume_table.py --work FOLDER        # all pairs; started again, it goes on where it stopped
    python benchmarks/resume_table.py --work FOLDER --sources none-1 zero3-2 --targets zero2-2

Tiny models over noise, in full and with LoRA, in float32 and in bfloat16 (`trainer.bf16`). Every source trains six
steps and saves after three; every target resumes that checkpoint and trains the other three. A cell holds the largest
relative difference of the three losses from the source's own, and of the last weights (relative to the largest weight
of a tensor), or the words of the refusal (the source's own where that is refused). In bfloat16 the backends do not
round alike, so the largest difference between two uninterrupted runs is printed beside. DeepSpeed compiles its
communication once, for a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


BACKENDS = ("none", "zero0", "zero1", "zero2", "zero3")
PLACES = tuple(f"{backend}-{ranks}" for backend, ranks in product(BACKENDS, (1, 2)))
PRECISIONS, KINDS = ("fp32", "bf16"), ("full", "lora")
STEPS = (
    "trainer.max_steps=6",
    "trainer.save_strategy=steps",
    "trainer.save_steps=3",
    "trainer.learning_rate=3e-3",
    "trainer.weight_decay=0.01",
    "data.packs_per_step=3",  # on two ranks one forward is a filler
    "data.tokens_per_pack=60",
)
LORA = ("adapter.kind=lora", "adapter.r=2", "adapter.modules=[language_model,audio_tower]", "adapter.dropout=0.0")


def overrides(place: str, precision: str, kind: str) -> list[str]:
    backend, _ = place.split("-")
    chosen = [*STEPS, f"trainer.bf16={str(precision == 'bf16').lower()}", *(LORA if kind == "lora" else ())]
    return chosen if backend == "none" else [*chosen, f"deepspeed.stage={backend[-1]}"]


def run_jobs(work: Path, place: str, jobs: list[dict[str, Any]]) -> None:
    """Train every job on the ranks of `place`, in one torchrun; each leaves a file with its outcome as it ends.

    A job that breaks is noted with the end of its output, and the others go on.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", place[-1]]
    command += [__file__, "--work", str(work), "--worker"]
    while jobs:
        for job in jobs:  # what a killed run left
            shutil.rmtree(work / "runs" / job["name"], ignore_errors=True)
        (work / "jobs.json").write_text(json.dumps(jobs))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        jobs = [job for job in jobs if not (work / "outcomes" / job["name"]).is_file()]
        if done.returncode and jobs:
            broken = jobs.pop(0)["name"]
            print(f"{broken} broke", flush=True)
            (work / "outcomes" / broken).write_text(json.dumps({"broke": done.stderr[-4000:]}))


def worker(work: Path) -> None:
    from qwen2audio_train.config.schema import ConfigError
    from qwen2audio_train.training.checkpoints.folder import CheckpointError
    from tests.distributed.train_worker import Job, run

    for job in json.loads((work / "jobs.json").read_text()):
        outcome = {}
        try:
            run(work / "noise", work / "runs", Job(job["name"], tuple(job["overrides"]), resume=job["resume"]))
        except (ConfigError, CheckpointError) as error:
            outcome["refused"] = str(error)
        if os.environ["RANK"] == "0":
            (work / "outcomes" / job["name"]).write_text(json.dumps(outcome))


def losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def compare(work: Path, source: str, cell: str) -> dict[str, Any]:
    """Largest differences of a resumed run from its source."""
    from safetensors.torch import load_file

    outcome = json.loads((work / "outcomes" / source).read_text()) or json.loads((work / "outcomes" / cell).read_text())
    if outcome:
        return outcome
    then, now = losses(work / "runs" / source), losses(work / "runs" / cell)
    weights = [
        load_file(next((work / "runs" / name / "checkpoint-6").glob("*/*model.safetensors"))) for name in (source, cell)
    ]
    apart = max(
        float((value.float() - weights[1][name].float()).abs().max() / value.float().abs().max().clamp(min=1e-8))
        for name, value in weights[0].items()
    )
    return {"steps": sorted(now), "loss": max(abs(now[s] - then[s]) / then[s] for s in now), "weights": apart}


def pending(work: Path, names: list[str]) -> list[str]:
    return [name for name in names if not (work / "outcomes" / name).is_file()]


def table(cells: dict[str, dict[str, Any]], sources: list[str], targets: list[str]) -> str:
    lines = []
    for precision, kind in product(PRECISIONS, KINDS):
        lines += [
            f"\n{precision} {kind}: largest relative difference of a loss",
            "| saved by | " + " | ".join(targets) + " |",
        ]
        lines.append("| --- |" + " ---: |" * len(targets))
        for source in sources:
            found = [cells[f"{source}-{precision}-{kind}@{target}"] for target in targets]
            shown = [f"{cell['loss']:.0e}" if "loss" in cell else next(iter(cell)) for cell in found]
            lines.append(f"| {source} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sources", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--targets", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--save", help="name of the file in results/ that keeps the figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.work)
        return
    from tests.noise import write_noise

    (args.work / "outcomes").mkdir(parents=True, exist_ok=True)
    if not (args.work / "noise").is_dir():
        (args.work / "noise").mkdir()
        write_noise(args.work / "noise")
    ways = [f"{precision}-{kind}" for precision, kind in product(PRECISIONS, KINDS)]
    run_sources(args.work, args.sources, ways)
    cells: dict[str, dict[str, Any]] = {}
    for target in args.targets:
        cells |= resumed(args.work, [f"{source}-{way}" for source in args.sources for way in ways], target)
        print(target, len(cells), "cells", flush=True)
    print(table(cells, args.sources, args.targets))
    totals = totals_of(args.work, cells, args.sources, ways)
    if args.save:
        from record import save

        save(args.save, {**totals, "each": cells})
    print(json.dumps(totals))


def run_sources(work: Path, places: Sequence[str], ways: Sequence[str]) -> None:
    """Run and save on every place what has not run yet."""
    for place in places:
        todo = pending(work, [f"{place}-{way}" for way in ways])
        jobs = [{"name": n, "overrides": overrides(place, *n.split("-")[2:]), "resume": "auto"} for n in todo]
        if jobs:
            run_jobs(work, place, jobs)


def resumed(work: Path, sources: Sequence[str], target: str) -> dict[str, dict[str, Any]]:
    """The cells of one place: what every source that was saved comes to when it is resumed there."""
    names = [f"{source}@{target}" for source in sources]
    saved = [name for name in names if (work / "outcomes" / name.partition("@")[0]).read_text() == "{}"]
    jobs = [
        {
            "name": name,
            "overrides": overrides(target, *name.partition("@")[0].split("-")[2:]),
            "resume": f"{name.partition('@')[0]}/checkpoint-3",
        }
        for name in pending(work, saved)
    ]
    if jobs:
        run_jobs(work, target, jobs)
    return {name: compare(work, name.partition("@")[0], name) for name in names}


def totals_of(
    work: Path, cells: Mapping[str, Mapping[str, Any]], sources: Sequence[str], ways: Sequence[str]
) -> dict[str, Any]:
    """Counts of the cells, and their worst loss beside that of two uninterrupted runs, per precision."""
    carried = [cell for cell in cells.values() if "loss" in cell]
    worst = {p: max((c["loss"] for n, c in cells.items() if p in n and "loss" in c), default=None) for p in PRECISIONS}
    pairs = [(f"{a}-{way}", f"{b}-{way}") for a, b in product(sources, repeat=2) for way in ways]
    whole = [(pair[0], found["loss"]) for pair in pairs if "loss" in (found := compare(work, *pair))]
    return {
        "cells": len(cells),
        "carried out": len(carried),
        "refused": sum("refused" in cell for cell in cells.values()),
        "broke": sum("broke" in cell for cell in cells.values()),
        "worst loss": worst,
        "of two uninterrupted runs": {p: max((x for n, x in whole if p in n), default=None) for p in PRECISIONS},
    }


if __name__ == "__main__":
    main()
