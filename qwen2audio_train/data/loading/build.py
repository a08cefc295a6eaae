"""From the data part of a recipe to loaders: open the sources, mix, plan, and wire the workers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import AugmentConfig, DataConfig, LossWeighting, Order, SourceConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.loading.base import BatchLoader, are_preferences
from qwen2audio_train.data.loading.build_streaming import build_streams
from qwen2audio_train.data.loading.indexed import PackDataset, PackLoader
from qwen2audio_train.data.manifests.cache import find_manifests
from qwen2audio_train.data.order.index import Index, open_index, release, why_empty
from qwen2audio_train.data.order.mixture import MixedSource, Mixture, weighting_of
from qwen2audio_train.data.order.planner import Planner
from qwen2audio_train.data.quarantine import Quarantine
from qwen2audio_train.data.samples.collate import task_weights
from qwen2audio_train.data.samples.collate_kto import Answers
from qwen2audio_train.data.samples.maker import Maker, collator_of, maker_of
from qwen2audio_train.data.samples.recipe import remote_of
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import NUM_MEL_BINS

RECORDS_READ = 2**16
"""Records of an index that are looked at together: 1.8 MB of pages."""


def build_batches(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = None,
    num_mel_bins: int = NUM_MEL_BINS,
    family: str = DEFAULT.name,
    bad_examples_path: Path | None = None,
    for_generation: bool = False,
    keep_too_long: bool = False,
    answers: Answers = Answers.paired,
) -> BatchLoader[Any]:
    """Training batches of `data.sources` for one rank; preference examples become batches of pairs.

    Args:
        epochs: passes over the mixture; None = without end. Streaming sources have no end.
        bad_examples_path: where this rank lists the examples that could not be used.
        for_generation: batches of prompts (`samples.collate.unpacked`) instead of packed ones.
        keep_too_long: give examples that no pack takes a pack of their own (indexed sources alone).
        answers: layout of preference examples.

    Raises:
        ConfigError: no sources, weights that make no mixture, sources that do not go together.
        FileNotFoundError: a source's files do not exist.
        TooManyBadExamples: the manifests hold more bad lines than the limit allows.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty: name at least one source")
    maker = maker_of(data, tokenizer, num_mel_bins, family=family, for_generation=for_generation)
    maker = dataclasses.replace(maker, answers=answers)
    if keep_too_long:
        maker = dataclasses.replace(maker, max_tokens=None)
    shown = rank == 0 and not keep_too_long  # held-out examples are read at every evaluation: the trainer tells once
    quarantine = Quarantine(bad_examples_path, data.max_bad_examples, data.max_bad_share, shown=shown)
    if _all_stream(data, epochs):
        return build_streams(data, maker, quarantine, rank, world_size)
    return _indexed(data, maker, quarantine, rank, world_size, epochs)


def _indexed(
    data: DataConfig, maker: Maker, quarantine: Quarantine, rank: int, world_size: int, epochs: int | None
) -> PackLoader:
    """The loader over indexes. A maker without a limit gives what no pack takes a pack of its own."""
    indexes = {name: open_source(name, source, data, maker) for name, source in sorted(data.sources.items())}
    planner = build_planner(data, indexes, keep_too_long=maker.max_tokens is None)
    for name, index in indexes.items():
        bad = [dataclasses.replace(item, source=name) for item in index.bad()]
        quarantine.add(len(index) + len(bad), bad)
    return PackLoader(
        planner,
        _dataset(data, indexes, planner.mixture, maker),
        packs_per_step=data.packs_per_step,
        quarantine=quarantine,
        rank=rank,
        world_size=world_size,
        packs_per_forward=data.packs_per_forward,
        epochs=epochs,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        on_changed_data=data.on_changed_data,
        prefetch=remote_of(data).prefetch,
        num_bad_lines=quarantine.num_bad,
    )


def _all_stream(data: DataConfig, epochs: int | None) -> bool:
    """Whether the sources are streams. Raises ConfigError where some are, or all are and should end."""
    streaming = [name for name, source in data.sources.items() if source.streaming]
    if streaming and (len(streaming) < len(data.sources) or epochs is not None):
        raise ConfigError(
            f"data.sources.{streaming[0]}.streaming: streams have no end and do not mix with indexed sources; set "
            "it for all sources and train by steps, or for none"
        )
    return bool(streaming)


def eval_batches(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_mel_bins: int = NUM_MEL_BINS,
    family: str = DEFAULT.name,
    bad_examples_path: Path | None = None,
    for_generation: bool = False,
    keep_too_long: bool = True,
    answers: Answers = Answers.paired,
) -> PackLoader:
    """Batches over `data.eval_sources`, every example once and in the manifests' order before packing.

    All ranks get equally many batches, fillers where there are no examples left. Nothing is augmented. Nothing
    is learnt from them, so an example beyond the budget of training has a pack of its own.
    """
    if not data.eval_sources:
        raise ConfigError("data.eval_sources is empty: name at least one source")
    if streaming := [name for name, source in data.eval_sources.items() if source.streaming]:
        raise ConfigError(f"data.eval_sources.{streaming[0]}.streaming: held-out sources are read whole; unset it")
    loader = build_batches(
        _once_through(data, world_size),
        tokenizer,
        rank=rank,
        world_size=world_size,
        epochs=1,
        num_mel_bins=num_mel_bins,
        family=family,
        bad_examples_path=bad_examples_path,
        for_generation=for_generation,
        keep_too_long=keep_too_long,
        answers=answers,
    )
    assert isinstance(loader, PackLoader)  # streams were refused above
    return loader


def _once_through(data: DataConfig, world_size: int) -> DataConfig:
    """The held-out sources as sources: in their order, each once, as they are."""
    alone = {name: dataclasses.replace(s, weight=None, group="", epochs=None) for name, s in data.eval_sources.items()}
    return dataclasses.replace(
        data,
        sources=alone,
        groups={},
        temperature=1.0,
        order=Order.sequential,
        packs_per_step=world_size * data.packs_per_forward,
        augment=AugmentConfig(),
    )


def build_planner(data: DataConfig, indexes: Mapping[str, Index], keep_too_long: bool = False) -> Planner:
    """The planner over opened sources (in sorted order of their names)."""
    sizes = {name: _size(index, data.sources[name]) for name, index in indexes.items()}
    for name, size in sizes.items():
        if size == 0:
            advice = "see `launch/data.py check`, or leave the source out"
            raise ConfigError(f"data.sources.{name}: no usable example: {why_empty(indexes[name])}; {advice}")
    chances = weighting_of(data, sizes).probabilities(data.temperature)
    mixed = tuple(
        MixedSource(
            name,
            sizes[name],
            chances[name],
            data.sources[name].epochs,
            _by_length(data, index, sizes[name]),
            _shards(index, sizes[name]),
        )
        for name, index in indexes.items()
    )
    planner = Planner(
        Mixture(mixed, data.seed, data.order),
        tuple(indexes.values()),
        tokens_per_pack=data.tokens_per_pack,
        window_examples=data.window_examples,
        samples_per_pack=data.samples_per_pack,
        max_tokens=data.max_tokens_per_example,
        keep_too_long=keep_too_long,
    )
    if keep_too_long:
        return planner
    for source, index in zip(mixed, indexes.values(), strict=True):
        _check_lengths(source, index, planner.token_limit)
    return planner


def open_source(name: str, source: SourceConfig, data: DataConfig, maker: Maker) -> Index:
    """The index of a source, built if the cache lacks it."""
    manifests = find_manifests(name, source, remote_of(maker.recipe), data.num_workers)
    return open_index(manifests, maker.measure, maker.measure_key, data.cache_dir, num_workers=data.num_workers)


def task_shares(indexes: Mapping[str, Index], mixture: Mixture) -> dict[str, float]:
    """Probability that a drawn example belongs to each task."""
    shares: dict[str, float] = {}
    for source, index in zip(mixture.sources, indexes.values(), strict=True):
        for task, count in index.task_counts.items():
            shares[task] = shares.get(task, 0.0) + source.probability * count / len(index)
    return shares


def _check_lengths(source: MixedSource, index: Index, limit: int) -> None:
    """Refuse a source of which nothing fits; read no further than the first that does, which is among the first."""
    shortest = sys.maxsize
    for start in range(0, source.size, RECORDS_READ):
        records = index.records[start : min(start + RECORDS_READ, source.size)]
        shortest = min(shortest, int((records["audio_tokens"].astype(np.int64) + records["text_tokens"]).min()))
        release(index.records)
        if shortest <= limit:
            return
    raise ConfigError(
        f"every example of {source.name} is longer than a pack: the shortest has {shortest} tokens, the limit is "
        f"{limit}; raise data.tokens_per_pack (and data.max_tokens_per_example), or leave the source out"
    )


def _size(index: Index, source: SourceConfig) -> int:
    return len(index) if source.max_examples is None else min(len(index), source.max_examples)


def _by_length(data: DataConfig, index: Index, size: int) -> NDArray[np.integer] | None:
    if data.order != Order.short_first:
        return None
    return index.by_length if size == len(index) else index.by_length[index.by_length < size]


def _shards(index: Index, size: int) -> NDArray[np.int64] | None:
    """Examples in each shard of a remote source, of the first `size`."""
    if not index.is_remote:
        return None
    ends = np.minimum(np.cumsum(index.file_counts), size)
    return np.diff(ends, prepend=0)


def _dataset(data: DataConfig, indexes: Mapping[str, Index], mixture: Mixture, maker: Maker) -> PackDataset:
    shares = task_shares(indexes, mixture)
    is_preference = are_preferences({name: tuple(index.task_counts) for name, index in indexes.items()})
    if data.loss_weighting is LossWeighting.task:
        maker = dataclasses.replace(maker, task_weights=task_weights(shares))
    collate = collator_of(data, maker, is_preference)
    return PackDataset(tuple(indexes), tuple(indexes.values()), maker.make, collate)
