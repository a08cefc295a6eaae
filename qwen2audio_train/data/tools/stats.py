"""How much there is of what: examples, hours and tokens of corpora, and a histogram of their clips' lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
from transformers import AutoTokenizer

from qwen2audio_train.config.bounds import processors
from qwen2audio_train.config.data import (
    DataConfig,
    LabelledTurns,
    LongAudio,
    PromptStyle,
    SampleRecipe,
    SourceConfig,
    Timestamps,
)
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example, clips_of, task_of
from qwen2audio_train.data.manifests.cache import find_manifests
from qwen2audio_train.data.order.index import Index, Measure, Measured, open_index, why_empty
from qwen2audio_train.data.samples.maker import maker_of, with_duration
from qwen2audio_train.data.samples.recipe import recipe_of, remote_of
from qwen2audio_train.data.tools.sources import named_sources
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import NUM_MEL_BINS, num_samples_of

BINS_S = (0, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, float("inf"))


@dataclass
class IndexOptions:
    """The keys of `launch/data.py index` and `launch/data.py stats`.

    Attributes:
        manifests: each one a source, called as its file is (by its whole path where two files have the same name).
        sources: the same in full, as in a recipe's `data.sources`, for every other form.
        tokenizer: folder or hub id, the one that training uses. `index` needs it; `stats` leaves the text out without.
        prompt_style, prompt_seed, timestamps, labelled_turns, long_audio: the recipe's; an index is bound to them.
        family: that of the model.
        num_workers: processes.
        cache_dir: that of the recipe.
        image: PNG file for the histogram of `stats` (needs matplotlib).
    """

    manifests: list[str] = field(default_factory=list)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str | None = None
    prompt_style: PromptStyle = PromptStyle.natural
    prompt_seed: int = 0
    timestamps: Timestamps = Timestamps.text
    labelled_turns: LabelledTurns = LabelledTurns.all
    long_audio: LongAudio = LongAudio.split
    family: str = DEFAULT.name
    num_workers: int = processors()
    cache_dir: str = "data_cache"
    image: str | None = None


@dataclass
class VisualizeOptions:
    """The keys of `launch/data.py visualize`.

    Attributes:
        recipe: root of the stage whose mixture is shown.
        overrides: keys of that stage, as on its command line: `['data=mine']`.
        tokenizer: folder or hub id, the one that training uses; without it the text is left out.
    """

    recipe: str = "pretrain"
    overrides: list[str] = field(default_factory=list)
    tokenizer: str | None = None


@dataclass(frozen=True)
class SourceStats:
    """Figures of one source; `histogram` counts the examples whose audio lasts BINS_S[i] .. BINS_S[i + 1] seconds."""

    examples: int
    bad_lines: int
    hours: float
    percentiles_s: tuple[float, float, float, float]
    """5, 50, 95 and 100 % of the examples' audio lengths."""
    audio_tokens: int
    text_tokens: int
    tasks: Mapping[str, int]
    histogram: tuple[int, ...]


def index_sources(options: IndexOptions) -> dict[str, Index]:
    """The indexes of the sources, built where the cache lacks them.

    Raises:
        ConfigError: no sources, or one without an example.
        FileNotFoundError: a source's files do not exist.
    """
    data = DataConfig(
        sources=named_sources(options.manifests, options.sources),
        prompt_style=options.prompt_style,
        prompt_seed=options.prompt_seed,
        timestamps=options.timestamps,
        labelled_turns=options.labelled_turns,
        long_audio=options.long_audio,
        cache_dir=options.cache_dir,
        num_workers=options.num_workers,
    )
    return indexes_of(data, options.tokenizer, options.family, where="sources")


def indexes_of(data: DataConfig, tokenizer: str | None, family: str, where: str) -> dict[str, Index]:
    """The same of the sources of a recipe, whose key is `where`; without a tokenizer they know of the audio alone."""
    measure: Measure = partial(measure_audio, recipe=recipe_of(data, NUM_MEL_BINS, family))
    key = "audio" if family == DEFAULT.name else f"audio {family}"
    if tokenizer is not None:
        maker = maker_of(data, AutoTokenizer.from_pretrained(tokenizer), NUM_MEL_BINS, family=family)
        measure, key = maker.measure, maker.measure_key
    indexes = {}
    for name, source in data.sources.items():
        manifests = find_manifests(name, source, remote_of(data), data.num_workers, where=f"{where}.{name}")
        indexes[name] = open_index(manifests, measure, key, data.cache_dir, data.num_workers)
        if not len(indexes[name]):
            raise ConfigError(f"{where}.{name}: no usable example: {why_empty(indexes[name])}")
    return indexes


def measure_audio(example: Example, recipe: SampleRecipe) -> Measured:
    """What can be said of an example without a tokenizer: its audio. Raises AudioError."""
    seconds, tokens, family = 0.0, 0, family_of(recipe.family)
    for clip in clips_of(example):
        length = with_duration(clip, recipe).duration_s or 0.0
        seconds += length
        tokens += family.num_clip_tokens(num_samples_of(length))
    return Measured(seconds, tokens, 0, task_of(example))


def stats_of(index: Index) -> SourceStats:
    """Figures of an indexed source."""
    seconds = np.asarray(index.records["duration_s"], dtype=np.float64)
    spread = np.percentile(seconds, [5, 50, 95, 100]) if len(seconds) else np.zeros(4)
    return SourceStats(
        examples=len(index),
        bad_lines=len(index.bad()),
        hours=float(seconds.sum()) / 3600,
        percentiles_s=(float(spread[0]), float(spread[1]), float(spread[2]), float(spread[3])),
        audio_tokens=int(index.records["audio_tokens"].sum(dtype=np.int64)),
        text_tokens=int(index.records["text_tokens"].sum(dtype=np.int64)),
        tasks=index.task_counts,
        histogram=tuple(int(count) for count in np.histogram(seconds, BINS_S)[0]),
    )


def stats_table(stats: Mapping[str, SourceStats]) -> str:
    """The figures of all sources as text."""
    head = ["source", "examples", "hours", "seconds 5 / 50 / 95 / 100 %", "audio tokens", "text tokens", "bad", "tasks"]
    rows = [head]
    for name, one in stats.items():
        tasks = ", ".join(f"{task} {count}" for task, count in sorted(one.tasks.items(), key=lambda item: -item[1]))
        spread = " / ".join(f"{value:.1f}" for value in one.percentiles_s)
        counts = [f"{one.audio_tokens:,}", f"{one.text_tokens:,}", str(one.bad_lines)]
        rows.append([name, f"{one.examples:,}", f"{one.hours:.2f}", spread, *counts, tasks])
    return _aligned(rows)


def histogram_table(stats: Mapping[str, SourceStats]) -> str:
    """How many examples of each source are how long, as text: a row for every stretch of seconds that has any."""
    rows = [["seconds", *stats]]
    for place, (low, high) in enumerate(pairwise(BINS_S)):
        counts = [one.histogram[place] for one in stats.values()]
        if any(counts):
            rows.append([f"{low:g} to {high:g}", *(f"{count:,}" for count in counts)])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def draw_histogram(indexes: Mapping[str, Index], path: str) -> None:
    """A picture of how the hours spread over the examples' lengths. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError('image: needs matplotlib; pip install "qwen2audio-train[demo]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max((float(np.max(index.records["duration_s"], initial=0)) for index in indexes.values()), default=0)
    edges = np.linspace(0, max(longest, 1.0), 61).tolist()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, index in indexes.items():
        seconds = np.asarray(index.records["duration_s"], dtype=np.float64)
        axes.hist(seconds, edges, weights=seconds / 3600, histtype="step", label=name)
    axes.set(xlabel="length of an example's audio in s", ylabel="hours")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def index_sizes(indexes: Mapping[str, Index]) -> Sequence[str]:
    """A line for every index: what it holds and where it lies."""
    return [f"{name}: {len(i):,} examples, {len(i.bad())} bad lines, {i.folder}" for name, i in indexes.items()]
