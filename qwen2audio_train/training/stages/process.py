"""This rank among those that torchrun started, and what a stage sets up for the whole process."""

from __future__ import annotations

import torch
import transformers
from accelerate import PartialState


def process() -> PartialState:
    """This rank among those that torchrun started; on a machine without a GPU they talk over gloo."""
    return PartialState(cpu=not torch.cuda.is_available())


def warnings_only() -> None:
    """Libraries speak up when something is wrong, and from rank 0 alone."""
    level = transformers.logging.WARNING if process().is_main_process else transformers.logging.ERROR
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()
