"""What crosses from data to model: the keys of a batch, with the type and the number of dimensions of every tensor.

Shapes: N tokens of the row, M targets, S segments, K keys, A encoder windows, F mel columns, n audio tokens, t tokens
of transcripts; B pairs, or R answers one by one, in rows of T tokens. `data/samples/collate.py` has an example of each.
"""

from typing import Annotated, NotRequired, TypedDict

import torch
from torch import Tensor

Ids = Annotated[Tensor, torch.int64, 1]
Borders = Annotated[Tensor, torch.int32, 1]
Floats = Annotated[Tensor, torch.float32, 1]
Flags = Annotated[Tensor, torch.bool, 1]
Spectrogram = Annotated[Tensor, torch.float32, 2]
Rows = Annotated[Tensor, torch.int64, 2]


class Audio(TypedDict):
    """Encoder windows end to end, and where what is heard goes.

    Attributes:
        mel: (num_mel_bins, F), windows in the family's slot layout.
        clip_frames: (A,) mel frames of each.
        audio_slot: (n,) places in the row, in the order of the windows.
    """

    mel: Spectrogram
    clip_frames: Ids
    audio_slot: Ids


class Segments(TypedDict):
    """Who attends to whom.

    Attributes:
        cu_q, cu_k: (S + 1,) borders of the segments among queries and among keys.
        max_q, max_k: length of the longest of each, a number, so that nothing is read back from a GPU.
        key_index: (K,) places of the keys, where a segment attends to more than itself.
    """

    cu_q: Borders
    cu_k: Borders
    max_q: int
    max_k: int
    key_index: NotRequired[Ids]


class Transcripts(TypedDict):
    """What is said.

    Attributes:
        transcript: (t,) end to end.
        transcript_length: (A,) tokens of it in each window, 0 where that is not known.
    """

    transcript: Ids
    transcript_length: Ids


class PackedBatch(Audio, Segments, Transcripts):
    """Samples end to end, labels by their place.

    Attributes:
        input_ids, position_ids: (1, N).
        predict_from, target, source_id: (M,) place that predicts, token that it should, and source of the label.
        weight: (M,) of each label in the loss.
    """

    input_ids: Rows
    position_ids: Rows
    predict_from: Ids
    target: Ids
    source_id: Ids
    weight: Floats


class PreferenceBatch(Audio, Segments):
    """Trees of a prompt and its answers, and the rows that TRL's loss reads: chosen ones first.

    Attributes:
        packed_ids, packed_positions: (1, N).
        input_ids, attention_mask, completion_mask: (2 B, T), the last token of the prompt and the answer.
        scatter: (2 B, T) place in N of a row's token, -1 for padding.
        pair_weight: (B,) zero for a filler; (R,) where answers are rows by themselves.
        pair_key: (B, 2) names a pair by what it is made of.
        label: (R,) whether an answer is desirable, where there are no pairs.
    """

    packed_ids: Rows
    packed_positions: Rows
    input_ids: Rows
    attention_mask: Rows
    completion_mask: Rows
    scatter: Rows
    pair_weight: Floats
    pair_key: NotRequired[Rows]
    label: NotRequired[Flags]


class UnpairedBatch(PreferenceBatch):
    """For KTO: `label` is there, and beside each row, where its loss asks for it, one whose answer belongs elsewhere.

    Attributes:
        KL_input_ids, KL_attention_mask, KL_completion_mask, KL_scatter: (R, T').
    """

    KL_input_ids: NotRequired[Rows]
    KL_attention_mask: NotRequired[Rows]
    KL_completion_mask: NotRequired[Rows]
    KL_scatter: NotRequired[Rows]


Batch = PackedBatch | PreferenceBatch | UnpairedBatch


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The batch without its plain numbers, for what treats all of its tensors alike."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
