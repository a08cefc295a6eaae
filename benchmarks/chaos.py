"""The whole matrix of faults, part by part:  python benchmarks/chaos.py --lines FILE [--minutes 60] [--save chaos]

Two ranks under ZeRO-2 and ZeRO-3 are disturbed by `python -m tests.chaos`, each time with another seed, until every
kind of fault has landed as often as `WANTED` says, and a kill at every border of a save that has a name. Every attempt
is a line of FILE; started again, it goes on with the seed after the last one there. The last line is JSON: what landed
by kind, where the kills landed, and what all runs came to beside the undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import save

ROOT = Path(__file__).parent.parent
WANTED = {
    "kill": 100,  # of one rank or of all, at a moment of its own
    "kill_at_border": 46,  # twice the syncs and renames of a save
    "sigterm_one": 20,
    "sigstop_one": 5,
    "full_disk": 10,
    "damaged": 20,  # a truncated file, or a flipped bit
}
GROUPS = {"kill_one": "kill", "kill_all": "kill", "truncated_file": "damaged", "flipped_bit": "damaged"}

Line = dict[str, Any]


def part(seed: int, faults: int, minutes: float) -> list[Line]:
    """Lines of one call: its attempts, then what they came to."""
    command = [sys.executable, "-m", "tests.chaos", "--jobs", "zero2", "zero3", "--seed", str(seed)]
    command += ["--faults", str(faults), "--minutes", str(minutes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines or "weights_equal" not in lines[-1]:
        raise SystemExit(f"seed {seed} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return [{"seed": seed, **line} for line in lines]


def summary(lines: Sequence[Line]) -> Line:
    """What landed, by kind and by place, and the sums over the parts."""
    landed = [line for line in lines if line.get("place") and line["fault"] != "none"]
    ends = [line for line in lines if "weights_equal" in line]
    places: dict[str, Counter[str]] = {}
    for line in landed:
        places.setdefault(str(GROUPS.get(line["fault"], line["fault"])), Counter())[line["place"]] += 1
    return {
        "faults": dict(sorted(Counter(line["fault"] for line in landed).items())),
        **{key: sum(line[key] for line in ends) for key in ("lost", "repeated", "hung")},
        "weights_equal": bool(ends) and all(line["weights_equal"] for line in ends),
        "attempts": len(lines) - len(ends),
        "places": {kind: dict(sorted(found.items())) for kind, found in sorted(places.items())},
    }


def missing(found: Line) -> dict[str, int]:
    """How many of each kind are still to land."""
    landed: Counter[str] = Counter()
    for kind, count in found["faults"].items():
        landed[GROUPS.get(kind, kind)] += count
    return {kind: count - landed[kind] for kind, count in WANTED.items() if landed[kind] < count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, required=True, metavar="FILE", help="where attempts are kept")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no new part is begun")
    parser.add_argument("--faults", type=int, default=12, help="of one part")
    parser.add_argument("--save", metavar="NAME", help="store the summary as benchmarks/results/NAME.json")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    lines = [json.loads(line) for line in options.lines.read_text().splitlines()] if options.lines.exists() else []
    while missing(summary(lines)) and time.monotonic() < ends:
        found = part(1 + max((line["seed"] for line in lines), default=0), options.faults, minutes=10.0)
        with options.lines.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in found)
        lines += found
        print(json.dumps({"seed": found[-1]["seed"], "missing": missing(summary(lines))}), flush=True)
    found_all = summary(lines) | {"missing": missing(summary(lines))}
    if options.save:
        save(options.save, found_all)
    print(json.dumps(found_all))


if __name__ == "__main__":
    main()
