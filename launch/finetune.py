"""Fine-tune on your own recordings, in one go: make the manifest, hold a part out, score, train, score, export.

    python launch/finetune.py audio=recordings run_dir=runs/mine
    python launch/finetune.py audio=table.csv run_dir=runs/mine init_from=runs/small/sft language=de guard=general.jsonl

`audio` is a folder for each class, a table (CSV, TSV, JSON Lines) of files and transcripts or labels, a Kaldi folder,
conversations, or a data set. Started again, it goes on where it stopped. run_dir holds summary.json, report.html and
the model (export/). The keys are the fields of FinetuneConfig; a YAML file may hold any of them, and keys on the
command line win.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from qwen2audio_train.cli.compose import LAUNCH, compose, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig, ExportConfig
from qwen2audio_train.finetune.run import finetune

OPTIONS = FinetuneConfig
SCHEMAS: dict[str, Any] = {"sft": StageConfig, "evaluate": EvaluateConfig, "export": ExportConfig}


def config_of(root: str, overrides: list[str]) -> Any:
    """The checked config of a script, as it would see it itself."""
    return compose(root, overrides, SCHEMAS[root])


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line, the corpus or the checkpoint is wrong."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    with door():
        command = shlex.join(["python", "launch/finetune.py", *arguments])
        print(finetune(given(arguments, OPTIONS), config_of, LAUNCH, command))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
