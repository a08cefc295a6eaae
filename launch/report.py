"""One page, or tables, from any set of evaluations.

    python launch/report.py results.base=runs/base/evaluation results.mine=runs/mine/evaluation output=report.html
    python launch/report.py runs.base=runs/base runs.mine=runs/mine output=training.html

.html is one self-contained page: all numbers beside published ones, intervals, where the errors are, confusions, and
the worst examples with their audio. .md and .tex are the table alone. With `runs` it shows how runs
trained, from their log.jsonl alone. The keys are the fields of ReportOptions; a YAML
file may hold any of them, and keys on the command line win.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen2audio_train.cli.compose import HELP, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.evaluation.reporting.write import ReportOptions, write_results

OPTIONS = ReportOptions


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line or a folder is wrong."""
    if not arguments or arguments[0] in HELP:
        print(script_help(__doc__, OPTIONS))
        return 0 if arguments else 2
    with door():
        print(write_results(given(arguments, OPTIONS)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
