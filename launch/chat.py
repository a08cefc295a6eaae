"""A page to talk to a checkpoint, by microphone or with a file, and to two of them side by side.

    python launch/chat.py checkpoints.mine=runs/mine
    python launch/chat.py checkpoints.base=Qwen/Qwen2-Audio-7B-Instruct checkpoints.mine=runs/mine port=7861

Needs the extra `chat` (pip install 'qwen2audio-train[chat]'). The page is served on this machine and calls no other.
The keys are the fields of ChatConfig; a YAML file may hold any of them, and keys on the command line win.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen2audio_train.chat.conversation import Talker
from qwen2audio_train.cli.compose import HELP, given
from qwen2audio_train.cli.door import door
from qwen2audio_train.cli.help import script_help
from qwen2audio_train.config.chat import ChatConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.training.stages.policy import load_for_inference

OPTIONS = ChatConfig


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line or a checkpoint is wrong."""
    if not arguments or arguments[0] in HELP:
        print(script_help(__doc__, OPTIONS))
        return 0 if arguments else 2
    with door():
        config = given(arguments, OPTIONS)
        if not config.checkpoints:
            raise ConfigError("checkpoints: empty; name who answers: checkpoints.NAME=CHECKPOINT")
        try:
            from qwen2audio_train.chat.page import serve
        except ImportError as error:
            raise UserError(f"the page needs Gradio ({error}): pip install 'qwen2audio-train[chat]'") from error
        talkers = {name: talker(checkpoint, config) for name, checkpoint in config.checkpoints.items()}
        serve(talkers, Decoding(max_new_tokens=config.max_new_tokens), config.host, config.port)
    return 0


def talker(checkpoint: str, config: ChatConfig) -> Talker:
    loaded = load_for_inference(checkpoint, num_threads=config.num_threads, dtype=config.dtype)
    return Talker(loaded.model, loaded.tokenizer, loaded.samples)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
