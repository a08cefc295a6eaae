"""Held-out examples as samples, made when they are asked for; a clip that cannot be read costs its own sample only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Example, TaskExample, clips_of, with_clips
from qwen2audio_train.data.prompts.render import Text
from qwen2audio_train.data.prompts.tokenize import text_encoder
from qwen2audio_train.data.samples.maker import is_long, measure, with_duration
from qwen2audio_train.data.samples.sample import Sample, materialise
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.known import family_of

LOADING_THREADS = 4
"""Threads that decode the audio of the next batch while the model works on this one."""

Audio = Literal["own", "swapped", "silence"]
"""What a model hears: the example's own audio, another example's, or zeros of the same length."""


class LazySamples(Sequence[Sample | None]):
    """Samples of examples, made anew at each access; None where that fails, with the reason in `failed`.

    Args:
        options: per example the answers whose likelihood is asked for; they become branches of its prompt.

    Attributes:
        lengths: tokens of every sample (from the manifest's durations, or else the files' headers).
        failed: why a sample could not be made, by index.
        num_long: examples with a clip over 30 s.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        recipe: SampleRecipe,
        *,
        for_generation: bool,
        audio: Audio = "own",
        seed: int = 0,
        options: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.examples = swap_audio(examples, seed) if audio == "swapped" else list(examples)
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.for_generation = for_generation
        self.silent = audio == "silence"
        self.options = options
        self.failed: dict[int, str] = {}
        self.num_long = 0
        self.lengths = [self._length(index) for index in range(len(self.examples))]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if index in self.failed:
            return None
        try:
            sample = materialise(
                self.examples[index],
                self.tokenizer,
                self.recipe,
                for_generation=self.for_generation,
                augment_waveform=np.zeros_like if self.silent else None,
            )
            return sample if self.options is None else replace(sample, branches=self._branches(index))
        except ExampleError as error:
            self.failed[index] = str(error)
            return None

    def _length(self, index: int) -> int:
        example = self.examples[index]
        try:
            clips = tuple(with_duration(clip, self.recipe) for clip in clips_of(example))
            self.num_long += any(is_long(clip.duration_s or 0.0) for clip in clips)
            example = with_clips(example, clips)
            found = measure(example, self.tokenizer, self.recipe, for_generation=self.for_generation)
        except ExampleError as error:
            self.failed[index] = str(error)
            return 0
        answers = [] if self.options is None else self._branches(index)
        return found.audio_tokens + found.text_tokens + sum(map(len, answers))

    def _branches(self, index: int) -> tuple[np.ndarray, ...]:
        """The options of a prompt as answers that end as the example's own would."""
        family, options = family_of(self.recipe.family), self.options or ()
        end = family.text_end if isinstance(self.examples[index], TaskExample) else family.turn_end
        encoder = text_encoder(self.tokenizer)
        return tuple(
            np.array(encoder.encode([Text(text, True), Text(end, True, True)]), np.int64) for text in options[index]
        )


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
