"""The way out of a launch script: what the user can mend is a message and an exit status, never a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

NO_ROOM = (
    "free some space there, or name another folder: run_dir (checkpoints and logs), data.cache_dir (indexes, copies of "
    "remote data), data.selfmade.folder, output or output_dir of the tools"
)
"""How to mend a disk that is full or read-only."""


@contextmanager
def door() -> Iterator[None]:
    """End the process with a message and no traceback where the user can mend what stopped it.

    The exit status is 2, which tells a launcher that trying again is no use, and 130 after Ctrl-C. Files of keys that
    Hydra, OmegaConf or YAML cannot read are the user's; any other error goes on, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an ASCII locale prints what it lacks as \\u4e2d
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        hint = f"; {NO_ROOM}" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def check_file(key: str, path: str) -> None:
    """Raises ConfigError when the file that `key` names is not there; better now than after the model is loaded."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no file {path!r} (looked in {Path.cwd()})")
