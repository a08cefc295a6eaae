"""A head that reads the audio embeddings of a stage's model as tokens: new, or from the weights that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.model.ctc import HEAD, HEAD_FILE, CtcHead
from qwen2audio_train.model.packed import PackedAudioLM
from qwen2audio_train.training.checkpoints import folder as folders


def attach_ctc_head(model: PackedAudioLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """A new head over the tokens that plain text is made of."""
    table = cast(nn.Embedding, model.get_input_embeddings()).weight
    special = set(tokenizer.get_added_vocab().values())
    spoken = [index for index in range(min(len(tokenizer), len(table))) if index not in special]
    model.attach_ctc_head(CtcHead(table.size(1), torch.tensor(spoken)).to(table.dtype))


def attach_auxiliary(config: StageConfig, model: PackedAudioLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """The head of a stage that trains the language model and reads the audio embeddings besides (`ctc.weight`).

    It goes on with the head of the checkpoint in `init_from`, if that has one.
    """
    attach_ctc_head(model, tokenizer)
    if config.init_from is None:
        return
    file = Path(folders.weights_folder(config.init_from)).parent / HEAD_FILE
    if file.is_file() and model.ctc_head is not None:
        model.ctc_head.load_state_dict({name.removeprefix(HEAD): tensor for name, tensor in load_file(file).items()})
