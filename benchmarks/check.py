"""Whether a benchmark's `--quick` ratios have dropped below what this kind of machine gave before.

    python benchmarks/check.py                            # every benchmark of the baseline, against cpu2
    python benchmarks/check.py train_step --kind cpu2     # one
    python benchmarks/check.py train_step --lines FILE    # what a run printed, instead of running it
    python benchmarks/check.py loader --record            # keep the figures as one more run of the baseline
    python benchmarks/check.py --table                    # the table of docs/costs.md

A benchmark prints one JSON object as its last line. Of it ratios alone are kept, all so that more is better: times of
two sides of one run, or memory of the other side over ours; a time by itself says how busy the machine was. The
baseline of a kind of machine, `baselines/KIND.json`, holds what every recorded run gave. A figure has dropped when it
is below the least of these runs by more than `NOISE`. Exit status 1 where one has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import machine, versions

HERE = Path(__file__).parent
NOISE = 0.15
"""Relative; a guess until several runs are recorded: `--quick` times a step once or twice, and the stock Trainer still
pages memory in."""

Baseline = dict[str, Any]


def _train_step(line: dict[str, Any]) -> dict[str, float]:
    """The stock Trainer's seconds and memory over ours, by length set."""
    memory = {name: 1 / ratio for name, ratio in line["memory_ratio"].items()}
    return _named(speed=line["speedup"], memory=memory)


def _dpo_step(line: dict[str, Any]) -> dict[str, float]:
    """TRL's seconds and memory over ours, by kind of reference."""
    return _named(speed=line["speedup"], memory=line["memory_ratio"])


def _loader(line: dict[str, Any]) -> dict[str, float]:
    """Our audio seconds per second and core over every other way's, on clips of 5 s."""
    others = dict(line["audio_s_per_s_per_core"])
    ours = others.pop("ours")
    return _named(speed={name: ours / rate for name, rate in others.items() if not name.startswith("ours")})


def _generation(line: dict[str, Any]) -> dict[str, float]:
    """The stock class's seconds over ours, and how many answers to a prompt cost as much as one by itself."""
    found = line["generation"]
    return _named(speed={"stock": found["over_stock"], "eight answers": 8 / found["eight_over_one"]})


def _memory(line: dict[str, Any]) -> dict[str, float]:
    """What the forecast says over the measured peak: 1 is right, less is a promise that is not kept."""
    cases = {name: case for name, case in line["cases"].items() if "peak_mib" in case}
    return _named(forecast={name: case["forecast_mib"] / case["peak_mib"] for name, case in cases.items()})


RATIOS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "train_step": _train_step,
    "dpo_step": _dpo_step,
    "loader": _loader,
    "generation": _generation,
    "memory": _memory,
}
"""From a benchmark's last line to its ratios."""


def _named(**groups: dict[str, float]) -> dict[str, float]:
    return {f"{group}: {name}": value for group, values in groups.items() for name, value in values.items()}


def dropped(runs: list[dict[str, float]], found: dict[str, float], noise: float = NOISE) -> dict[str, str]:
    """What has dropped, by name of the figure, with a sentence each.

    Args:
        runs: ratios of every recorded run.
        found: ratios of this one. A figure of the newest run that this one lacks has dropped; a new one has not.
    """
    told = {}
    for name in runs[-1] if runs else ():
        before = [run[name] for run in runs if name in run]
        least = min(before) * (1 - noise)
        if name not in found:
            told[name] = f"is not printed any more; it was {before[-1]:.2f}"
        elif not found[name] >= least:  # a figure that is no number has dropped too
            told[name] = (
                f"{found[name]:.2f}, expected at least {least:.2f}: {len(before)} run(s) gave {min(before):.2f} or more"
            )
    return told


def table(baseline: Baseline) -> str:
    """Markdown: a row for every ratio, with the least, the middle and the most of its runs."""
    rows = ["| benchmark | ratio | runs | least | median | most |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for benchmark, runs in baseline["runs"].items():
        for name in runs[-1]:
            values = sorted(run[name] for run in runs if name in run)
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            figures = " | ".join(f"{value:.2f}" for value in (values[0], middle, values[-1]))
            rows.append(f"| `{benchmark}` | {name} | {len(values)} | {figures} |")
    return "\n".join(rows) + "\n"


def last_line(text: str) -> dict[str, Any]:
    """The last line of JSON that a benchmark printed. Raises SystemExit where there is none."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"found no line of JSON, expected one as the last; what was printed ends in: {text[-500:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def run(benchmark: str) -> dict[str, Any]:
    """The last line of `benchmark --quick`."""
    command = [sys.executable, str(HERE / f"{benchmark}.py"), "--quick"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{benchmark} --quick ended with exit code {done.returncode}: {done.stdout[-500:]}")
    return last_line(done.stdout)


def load(path: Path) -> Baseline:
    return json.loads(path.read_text()) if path.exists() else {"runs": {}}


def kept(path: Path, benchmark: str, found: dict[str, float]) -> None:
    """Add a run to the baseline in `path`, which then says what machine and versions gave the newest."""
    baseline = load(path)
    rounded = {name: round(value, 3) for name, value in found.items()}
    runs = {**baseline["runs"], benchmark: [*baseline["runs"].get(benchmark, []), rounded]}
    path.write_text(json.dumps({"machine": machine(), "versions": versions(), "runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(RATIOS)}")
    parser.add_argument("--kind", default="cpu2", help="kind of machine, a file of baselines/")
    parser.add_argument("--lines", type=Path, help="what the benchmark printed")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path = HERE / "baselines" / f"{options.kind}.json"
    baseline = load(path)
    if options.table:
        print(table(baseline), end="")
        return
    if unknown := set(options.benchmarks) - set(RATIOS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(RATIOS)}")
    failed = False
    for benchmark in options.benchmarks or baseline["runs"]:
        found = RATIOS[benchmark](last_line(options.lines.read_text()) if options.lines else run(benchmark))
        if options.record:
            kept(path, benchmark, found)
            continue
        told = dropped(baseline["runs"].get(benchmark, []), found)
        failed = failed or bool(told)
        for name in found | told:
            print(f"{benchmark}: {name}: {told.get(name) or f'{found[name]:.2f}, as before'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
