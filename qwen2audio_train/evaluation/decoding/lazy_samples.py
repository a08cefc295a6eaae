"""Held-out examples as samples, made when they are asked for; a clip that cannot be read costs its own sample only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.data.audio.decode import probe
from qwen2audio_train.data.examples import Clip, Example, clips_of, with_clips
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.prompts.tokenize import tokenize
from qwen2audio_train.data.samples.sample import Sample, SampleOptions, materialise
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.layout import num_samples_of

LOADING_THREADS = 4
"""Threads that decode the audio of the next batch while the model works on this one."""

Audio = Literal["own", "swapped", "silence"]
"""What a model hears: the example's own audio, another example's, or zeros of the same length."""


class LazySamples(Sequence[Sample | None]):
    """Samples of examples, made anew at each access; None where that fails, with the reason in `failed`.

    Attributes:
        lengths: tokens of every sample (from the manifest's durations, or else the files' headers).
        failed: why a sample could not be made, by index.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        options: SampleOptions,
        *,
        for_generation: bool,
        audio: Audio = "own",
        seed: int = 0,
    ) -> None:
        self.examples = swap_audio(examples, seed) if audio == "swapped" else list(examples)
        self.tokenizer = tokenizer
        self.options = options
        self.for_generation = for_generation
        self.silent = audio == "silence"
        self.failed: dict[int, str] = {}
        self.lengths = [self._length(index) for index in range(len(self.examples))]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if index in self.failed:
            return None
        try:
            return materialise(
                self.examples[index],
                self.tokenizer,
                self.options,
                for_generation=self.for_generation,
                augment_waveform=np.zeros_like if self.silent else None,
            )
        except ExampleError as error:
            self.failed[index] = str(error)
            return None

    def _length(self, index: int) -> int:
        example, options = self.examples[index], self.options
        try:
            rendered = render(
                example,
                prompt_style=options.prompt_style,
                seed=options.prompt_seed,
                labelled_turns=options.labelled_turns,
                for_generation=self.for_generation,
            )
            tokens = tokenize(rendered, self.tokenizer, [_num_samples(clip) for clip in rendered.clips])
        except ExampleError as error:
            self.failed[index] = str(error)
            return 0
        return len(tokens.input_ids) + sum(map(len, tokens.branches))


def load_ahead(
    samples: Sequence[Sample | None], batches: Sequence[list[int]]
) -> Iterator[tuple[list[int], list[Sample | None]]]:
    """Each batch of indices with its samples, the next batch being loaded meanwhile."""
    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        ahead: list[tuple[list[int], list[Future[Sample | None]]]] = []
        for batch in batches:
            ahead.append((batch, [pool.submit(samples.__getitem__, index) for index in batch]))
            if len(ahead) > 1:
                ready, futures = ahead.pop(0)
                yield ready, [future.result() for future in futures]
        for ready, futures in ahead:
            yield ready, [future.result() for future in futures]


def swap_audio(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """The examples with each other's clips: everything that is written stays, what is heard belongs to another one.

    Clips go round among examples with the same number of them, in an order drawn by `seed`; an example whose clips all
    the others share, or that is alone, is left out.
    """
    by_count: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_count.setdefault(len(clips_of(example)), []).append(index)
    swapped: dict[int, Example] = {}
    rng = np.random.default_rng(seed)
    for count, indices in sorted(by_count.items()):
        order = [indices[i] for i in rng.permutation(len(indices))]
        for place, index in enumerate(order if count else []):
            own = clips_of(examples[index])
            others = (clips_of(examples[i]) for i in order[place + 1 :] + order[:place])
            other = next((clips for clips in others if clips != own), None)
            if other is not None:
                swapped[index] = with_clips(examples[index], other)
    return [swapped[index] for index in sorted(swapped)]


def _num_samples(clip: Clip) -> int:
    if clip.duration_s is not None:
        return num_samples_of(clip.duration_s)
    info = probe(clip.path)
    return num_samples_of((clip.end_s or info.duration_s) - clip.start_s)
