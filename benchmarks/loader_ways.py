"""The ways of `loader.py`: a corpus, and for each way a function that starts it anywhere in an epoch."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet
import soundfile
import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from qwen2audio_train.batch import PackedBatch
from qwen2audio_train.config.data import DataConfig, SourceConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.prompts.tokenizer import build_processor, train_tokenizer
from qwen2audio_train.layout import NUM_MEL_BINS, SAMPLING_RATE

BATCH, SHARDS = 16, 8
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "nobody",
    "in",
    "town",
    "saw",
    "it",
)
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech:"

Start = Callable[[int], Iterator[int]]
"""Starts behind so many batches; yields the number of clips of every batch."""


def write_corpus(folder: Path, num_clips: int, seconds: int) -> None:
    """The same clips, noise with the spectrum and the rhythm of speech, in every form that a way reads."""
    rng = np.random.default_rng(0)
    pool = speech_like(rng, 120 * SAMPLING_RATE)
    lines, rows = [], []
    with ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(folder / f"{shard:02d}.tar", "w")) for shard in range(SHARDS)]
        for i in range(num_clips):
            start = rng.integers(len(pool) - seconds * SAMPLING_RATE)
            file = folder / f"{i:05d}.flac"
            soundfile.write(file, pool[start : start + seconds * SAMPLING_RATE], SAMPLING_RATE, subtype="PCM_16")
            text, flac = " ".join(rng.choice(WORDS, 3 * seconds)), file.read_bytes()
            for suffix, data in ((".flac", flac), (".txt", text.encode())):
                info = tarfile.TarInfo(f"{i:05d}{suffix}")
                info.size = len(data)
                tars[i % SHARDS].addfile(info, io.BytesIO(data))
            clip = {"id": str(i), "audio": f"{i % SHARDS:02d}.tar::{file.name}", "duration_s": seconds}
            lines.append({**clip, "task": "asr", "language": "en", "target": text})
            rows.append({"audio": {"bytes": flac, "path": file.name}, "text": text})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "texts.json").write_text(json.dumps([row["text"] for row in rows]))
    for shard in range(SHARDS):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[shard::SHARDS]), folder / f"{shard:02d}.parquet")


def speech_like(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise of -12 dB per octave above 500 Hz that swells and fades four times a second: 17 kB of FLAC a second."""
    spectrum = np.fft.rfft(rng.normal(size=num_samples))
    spectrum /= 1 + (np.fft.rfftfreq(num_samples, 1 / SAMPLING_RATE) / 500) ** 2
    noise = np.fft.irfft(spectrum, num_samples)
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(num_samples) / SAMPLING_RATE)
    return (0.15 * swell * noise / noise.std()).clip(-1, 1).astype(np.float32)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS), PROMPT], 400, ["<|en|>"])


@cache
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=NUM_MEL_BINS)


def decoded(flac: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(flac), dtype="float32")[0]


def ours(folder: Path, skips: Sequence[int]) -> Start:
    return _start_ours(folder, SourceConfig([str(folder / "manifest.jsonl")]), skips)


def ours_no_deadline(folder: Path, skips: Sequence[int]) -> Start:
    return _start_ours(folder, SourceConfig([str(folder / "manifest.jsonl")]), skips, decode_timeout_s=None)


def ours_streaming(folder: Path, skips: Sequence[int]) -> Start:
    constants = {"task": "asr", "language": "en"}
    return _start_ours(folder, SourceConfig([str(folder / "*.tar")], constants=constants, streaming=True), skips)


def _start_ours(folder: Path, source: SourceConfig, skips: Sequence[int], **more: Any) -> Start:
    """One pack of `BATCH` samples is a step, and a batch."""
    steps: dict[str, Any] = {"samples_per_pack": BATCH, "packs_per_step": 1, "num_workers": 0}
    data = DataConfig({"s": source}, **steps, cache_dir=str(folder / "cache"), **more)

    def loader() -> BatchLoader[Any]:
        return build_batches(data, tokenizer())

    whole, states = loader(), {}
    batches = iter(whole) if skips else iter(())
    for skip in skips:
        for _ in islice(batches, skip - whole.steps_done):
            pass
        states[skip] = json.dumps(whole.state_dict())

    def start(skip: int) -> Iterator[int]:
        fresh = loader()
        if skip:
            fresh.load_state_dict(json.loads(states[skip]))
        for batch in cast(Iterable[PackedBatch], fresh):
            yield len(batch["clip_frames"])

    return start


def stock_processor(folder: Path, _: Sequence[int]) -> Start:
    processor = build_processor(tokenizer())

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        clips = [decoded(row["audio"]["bytes"]) for row in rows]
        texts = [PROMPT + row["text"] for row in rows]
        batch = processor(text=texts, audio=clips, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return _start_stock(folder, collate)


def stock_by_clip(folder: Path, _: Sequence[int]) -> Start:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate_by_clip([(row["audio"]["bytes"], row["text"]) for row in rows])

    return _start_stock(folder, collate)


def collate_by_clip(rows: Sequence[tuple[bytes, str]]) -> dict[str, torch.Tensor]:
    """Padded to 30 s, every clip by itself: the extractor is faster on one clip than on many."""
    features = [
        extractor()(decoded(flac), sampling_rate=SAMPLING_RATE, return_attention_mask=True, return_tensors="pt")
        for flac, _ in rows
    ]
    mask = torch.cat([f["attention_mask"] for f in features])
    tokens = ["<|AUDIO|>" * (((int(m.sum()) - 1) // 2 - 1) // 2 + 1) for m in mask]
    texts = [PROMPT.replace("<|AUDIO|>", audio) + text for audio, (_, text) in zip(tokens, rows, strict=True)]
    ids = tokenizer()(texts, padding=True, return_tensors="pt")
    return {
        "input_features": torch.cat([f["input_features"] for f in features]),
        "feature_attention_mask": mask,
        **ids,
        "labels": ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100),
    }


def _start_stock(folder: Path, collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> Start:
    from datasets import load_dataset

    def start(skip: int) -> Iterator[int]:
        rows = load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)
        loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, collate_fn=collate)
        for batch in islice(loader, skip, None):
            yield len(batch["input_features"])

    return start


def webdataset(folder: Path, _: Sequence[int]) -> Start:
    import webdataset as wds

    shards = sorted(map(str, folder.glob("*.tar")))

    def start(skip: int) -> Iterator[int]:
        members = wds.WebDataset(shards, shardshuffle=False).slice(skip * BATCH, 10**9)
        rows = members.to_tuple("flac", "txt").map_tuple(lambda flac: flac, bytes.decode)
        for batch in rows.batched(BATCH, collation_fn=collate_by_clip):
            yield len(batch["input_features"])

    return start


def lhotse(folder: Path, skips: Sequence[int]) -> Start:
    from lhotse import CutSet, Recording, SupervisionSegment
    from lhotse.dataset.sampling import SimpleCutSampler
    from lhotse.features.whisper_fbank import log_mel_spectrogram
    from transformers.audio_utils import mel_filter_bank

    filters = torch.from_numpy(mel_filter_bank(201, NUM_MEL_BINS, 0.0, 8000.0, SAMPLING_RATE, "slaney", "slaney"))
    filters, window = filters.T.float().contiguous(), torch.hann_window(400)
    cuts = []
    for path, text in zip(sorted(folder.glob("*.flac")), json.loads((folder / "texts.json").read_text()), strict=True):
        cut = Recording.from_file(path).to_cut()
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, text=text)]
        cuts.append(cut)
    corpus = CutSet.from_items(cuts) if hasattr(CutSet, "from_items") else CutSet.from_cuts(cuts)

    def sampler() -> Any:
        return SimpleCutSampler(corpus, max_cuts=BATCH, shuffle=False, world_size=1, rank=0)

    def features(cut: Any) -> torch.Tensor:
        return log_mel_spectrogram(cut.load_audio(), filters, n_mels=NUM_MEL_BINS, window=window)

    states, whole = {}, sampler()
    batches = iter(whole)
    for skip, before in zip(skips, [0, *skips], strict=False):
        for _ in islice(batches, skip - before):
            pass
        states[skip] = whole.state_dict()

    def start(skip: int) -> Iterator[int]:
        fresh = sampler()
        if skip:
            fresh.load_state_dict(dict(states[skip]))
        for batch in fresh:
            mels = [features(cut) for cut in batch]
            texts = [PROMPT.replace("<|AUDIO|>", "<|AUDIO|>" * (len(mel) // 4)) for mel in mels]
            texts = [prompt + cut.supervisions[0].text for prompt, cut in zip(texts, batch, strict=True)]
            tokenizer()(texts, padding=True, return_tensors="pt")
            yield len(torch.nn.utils.rnn.pad_sequence(mels, batch_first=True))

    return start


WAYS = {
    way.__name__: way
    for way in (ours, ours_no_deadline, ours_streaming, stock_by_clip, stock_processor, webdataset, lhotse)
}
STOCK = ("stock_by_clip", "stock_processor")
