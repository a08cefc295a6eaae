"""Random samples laid out twice: as one packed row and as the rows padded to 30 s that the stock model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2AudioConfig

from qwen2audio_train.families.qwen2_audio import mel_columns, num_audio_tokens
from qwen2audio_train.layout import MAX_FRAMES

AUDIO_ID = 150
VOCAB = 160
BANDS = 16
IGNORED = -100


def tiny_config(**changes: Any) -> Qwen2AudioConfig:
    """Architecture small enough for float32 parity in milliseconds; `changes` are `audio__x` and `text__x`."""
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "num_mel_bins": BANDS,
    }
    text = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCAB,
    }
    for name, value in changes.items():
        part, key = name.split("__")
        {"audio": audio, "text": text}[part][key] = value
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_ID)


@dataclass(frozen=True)
class Row:
    """A sample: token ids with placeholders, labels (-100 where none), spectrograms of its clips."""

    ids: Tensor
    labels: Tensor
    mels: tuple[Tensor, ...]
    frames: tuple[int, ...]


def random_row(
    rng: torch.Generator, frames: Sequence[int], *, turns: int = 1, text: int = 5, bands: int = BANDS
) -> Row:
    """Some text, the clips spread over the turns, and per turn a labelled answer."""
    ids, labels = [], []

    def add(tokens: Tensor, labelled: bool) -> None:
        ids.append(tokens)
        labels.append(tokens if labelled else torch.full_like(tokens, IGNORED))

    def words() -> Tensor:
        return torch.randint(0, AUDIO_ID, (int(torch.randint(2, text + 2, (), generator=rng)),), generator=rng)

    clips = list(frames)
    for turn in range(turns):
        add(words(), False)
        for f in clips if turn == turns - 1 else clips[turn : turn + 1]:
            add(torch.full((num_audio_tokens(f),), AUDIO_ID), False)
            add(words(), False)
        clips = clips if turn == turns - 1 else clips[:turn] + clips[turn + 1 :]
        add(words(), True)
    mels = tuple(torch.randn(bands, min(f + 2, MAX_FRAMES), generator=rng) for f in frames)
    order = _clip_order(len(frames), turns)
    return Row(torch.cat(ids), torch.cat(labels), tuple(mels[i] for i in order), tuple(frames[i] for i in order))


def _clip_order(clips: int, turns: int) -> list[int]:
    """Order in which `random_row` places its clips."""
    rest, order = list(range(clips)), []
    for turn in range(turns):
        taken = list(rest) if turn == turns - 1 else rest[turn : turn + 1]
        order += taken
        rest = [i for i in rest if i not in taken]
    return order


def slot(mel: Tensor, frames: int) -> Tensor:
    """Columns of one clip in a packed spectrogram: its frames, two more, zeros up to the next even column."""
    out = mel.new_zeros(mel.size(0), mel_columns(frames))
    out[:, : mel.size(1)] = mel
    return out


def pack(rows: Sequence[Row], bands: int = BANDS) -> dict[str, Tensor]:
    """The rows end to end, in the form that `PackedQwen2Audio` takes."""
    lengths = torch.tensor([len(r.ids) for r in rows])
    starts = lengths.cumsum(0) - lengths
    ids = torch.cat([r.ids for r in rows])
    labels = torch.cat([r.labels for r in rows])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    labelled = ((labels != IGNORED) & (positions > 0)).nonzero()[:, 0]
    cu = torch.cat([starts, lengths.sum(0, keepdim=True)]).int()
    slots = [slot(m, f) for r in rows for m, f in zip(r.mels, r.frames, strict=True)]
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "predict_from": labelled - 1,
        "target": labels[labelled],
        "source_id": torch.zeros_like(labelled),
        "weight": torch.ones(len(labelled)),
        "cu_q": cu,
        "cu_k": cu,
        "mel": torch.cat(slots, dim=1) if slots else torch.zeros(bands, 0),
        "clip_frames": torch.tensor([f for r in rows for f in r.frames], dtype=torch.long),
        "audio_slot": (ids == AUDIO_ID).nonzero()[:, 0],
    }


def pad(rows: Sequence[Row], rng: torch.Generator, bands: int = BANDS) -> dict[str, Tensor]:
    """The rows padded on the right, their clips padded to 30 s, in the form that the stock model takes."""
    width = max(len(r.ids) for r in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, row.labels, 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    frames = [f for r in rows for f in r.frames]
    if frames:
        mels = torch.randn(len(frames), bands, MAX_FRAMES, generator=rng)
        for i, mel in enumerate(m for r in rows for m in r.mels):
            mels[i, :, : mel.size(1)] = mel
        batch["input_features"] = mels
        batch["feature_attention_mask"] = (torch.arange(MAX_FRAMES) < torch.tensor(frames)[:, None]).long()
    return batch
