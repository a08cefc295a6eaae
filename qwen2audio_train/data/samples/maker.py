"""What happens to an example between its line and the pack: measured for the plan, then made into a sample."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from qwen2audio_train.batch import Batch
from qwen2audio_train.config.data import MAX_SEED, DataConfig, LongAudio, SampleRecipe
from qwen2audio_train.data.audio.augment import Augmenter, augmenter_of
from qwen2audio_train.data.audio.length import clip_length
from qwen2audio_train.data.examples import Clip, Example, TaskExample, with_clips
from qwen2audio_train.data.order.index import Measured
from qwen2audio_train.data.order.permutation import hash_key
from qwen2audio_train.data.prompts.pools import fitting_prompts
from qwen2audio_train.data.prompts.tokenize import count_tokens
from qwen2audio_train.data.samples.collate import LoadedBatch, indexed, pack, pack_preference, unpacked
from qwen2audio_train.data.samples.collate_kto import Answers, pack_unpaired
from qwen2audio_train.data.samples.recipe import limits_of, plain, recipe_of, remote_of, render_as
from qwen2audio_train.data.samples.sample import Sample, materialise
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import MAX_FRAMES, num_frames, num_samples_of

MEASURED_KEYS = ("prompt_style", "prompt_seed", "prompts_per_task", "timestamps", "labelled_turns", "long_audio")
"""Fields of the recipe that the number of an example's tokens depends on, beside the tokenizer."""

NEWER_KEYS = ("prompts_per_task", "timestamps", "family")
"""Fields that indexes and states of earlier versions do not name: they are named where they are not the default."""


@dataclass(frozen=True)
class Maker:
    """Turns examples into what the planner counts and into samples. Pickles, and runs in the workers.

    Args:
        max_tokens: longer samples are refused, as a pack would not take them.
        task_weights: factor on the weight of a sample by its task.
        for_generation: make prompts that are to be answered, each with its example, instead of what is learnt.
        answers: how those of preference examples are laid out.
        prompt_per_pass: choose the prompt of a task example anew in every pass over its source.
    """

    tokenizer: PreTrainedTokenizerBase
    recipe: SampleRecipe
    max_tokens: int | None = None
    task_weights: Mapping[str, float] = field(default_factory=dict)
    augmenter: Augmenter | None = None
    for_generation: bool = False
    answers: Answers = Answers.paired
    prompt_per_pass: bool = False

    @property
    def measure_key(self) -> str:
        """Names everything that `measure` depends on."""
        text = self.tokenizer.backend_tokenizer.to_str()
        tokenizer = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        fields, defaults = plain(self.recipe), plain(SampleRecipe())
        what = [fields[key] for key in MEASURED_KEYS if key not in NEWER_KEYS]
        what += ["prompts"] if self.for_generation else []
        what += [f"{key}={fields[key]}" for key in NEWER_KEYS if fields[key] != defaults[key]]
        what += ["prompt_per_pass"] if self.prompt_per_pass else []
        return json.dumps([tokenizer, *what])

    def measure(self, example: Example, contents: Sequence[bytes | None] | None = None) -> Measured:
        """See `measure`."""
        return measure(
            example,
            self.tokenizer,
            self.recipe,
            contents=contents,
            for_generation=self.for_generation,
            longest_prompt=self.prompt_per_pass,
        )

    def make(
        self, example: Example, source: int, number: int, contents: Sequence[bytes | None] | None = None
    ) -> Sample:
        """The sample of an example of source `source`, in pass `number` over it. Raises AudioError, ExampleError."""
        task = example.task if isinstance(example, TaskExample) else "chat"
        augment = self.augmenter.for_example(number, example.id) if self.augmenter else (None, None)
        sample = materialise(
            example,
            self.tokenizer,
            self._recipe_of_pass(number),
            source_id=source,
            weight=self.task_weights.get(task, 1.0),
            audio_bytes=contents,
            augment_waveform=augment[0],
            augment_mel=augment[1],
            for_generation=self.for_generation,
        )
        if self.for_generation:
            sample = dataclasses.replace(sample, example=example)
        if self.max_tokens is not None and sample.num_tokens > self.max_tokens:
            raise ExampleError(
                f'example "{sample.id}": {sample.num_tokens} tokens ({len(sample.audio_slot)} of them audio) are '
                f"beyond the limit of {self.max_tokens}, and nothing is cut off; shorten it, or raise the limit"
            )
        return sample

    def _recipe_of_pass(self, number: int) -> SampleRecipe:
        """The recipe, with a seed of the prompts for this pass where each has its own; the first has the recipe's."""
        if not self.prompt_per_pass or number == 0:
            return self.recipe
        seed = hash_key(self.recipe.prompt_seed, "prompt", number) % (MAX_SEED + 1)
        return dataclasses.replace(self.recipe, prompt_seed=seed)


def measure(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe,
    *,
    contents: Sequence[bytes | None] | None = None,
    for_generation: bool = False,
    longest_prompt: bool = False,
) -> Measured:
    """Tokens and seconds of an example, without decoding; a missing duration is read from the file's header.

    Args:
        contents: bytes of the clips' files, where they are at hand.
        for_generation: of the prompt alone.
        longest_prompt: of a task example, with the longest of the prompts that it may get.

    Raises:
        ExampleError: nothing to learn from it, or a clip over 30 s where those are rejected.
        AudioError: a header that had to be read cannot be.
    """
    rendered = render_as(recipe, example, for_generation=for_generation)
    at_hand = iter(contents or [None] * len(rendered.clips))
    trunk = tuple(
        with_duration(piece, recipe, next(at_hand)) if isinstance(piece, Clip) else piece for piece in rendered.trunk
    )
    rendered = dataclasses.replace(rendered, trunk=trunk)
    durations = [clip.duration_s or 0.0 for clip in rendered.clips]
    if recipe.long_audio is LongAudio.reject and any(map(is_long, durations)):
        raise ExampleError(
            f'example "{example.id}": {max(durations):.2f} s of audio, and data.long_audio rejects over 30 s'
        )
    counts = [count_tokens(rendered, tokenizer)]
    if longest_prompt and isinstance(example, TaskExample) and not for_generation:
        timed = with_clips(example, rendered.clips)
        for template in fitting_prompts(example, recipe.prompt_style, recipe.prompts_per_task):
            counts.append(count_tokens(render_as(recipe, timed, template=template), tokenizer))
    count = max(counts, key=lambda found: found.total)
    return Measured(sum(durations), count.audio, count.total - count.audio, rendered.task)


def with_duration(clip: Clip, recipe: SampleRecipe, data: bytes | None = None) -> Clip:
    """The clip with its duration, read from the header of the file (or of its `data`) where the manifest has none.

    Raises:
        AudioError: the file cannot be read, or has no such slice.
    """
    if clip.duration_s is not None:
        return clip
    return dataclasses.replace(clip, duration_s=clip_length(clip, data, limits_of(recipe), remote_of(recipe)))


def is_long(duration_s: float) -> bool:
    """Whether a clip needs more than one encoder window (30 s)."""
    return num_frames(num_samples_of(duration_s)) > MAX_FRAMES


def maker_of(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_mel_bins: int,
    *,
    family: str = DEFAULT.name,
    for_generation: bool = False,
) -> Maker:
    """How the recipe wants examples to be made into samples, or into prompts to be answered."""
    augmenter = augmenter_of(data.augment, data.seed, limits_of(data))
    limit = min(data.max_tokens_per_example or data.tokens_per_pack, data.tokens_per_pack)
    slowest = min(1.0, *data.augment.speed_factors) if data.augment.speed else 1.0
    recipe = recipe_of(data, num_mel_bins, family)
    longest = math.ceil(limit / slowest)
    return Maker(
        tokenizer,
        recipe,
        longest,
        augmenter=augmenter,
        for_generation=for_generation,
        prompt_per_pass=data.prompt_per_pass,
    )


def collator_of(data: DataConfig, maker: Maker, is_preference: bool) -> Callable[[Sequence[Sample]], LoadedBatch]:
    """What lays the samples of a batch end to end, or hands prompts on as they are."""
    if maker.for_generation:
        return unpacked
    return partial(_indexed, _packer(data, maker, is_preference), maker.recipe.family)


def _packer(data: DataConfig, maker: Maker, is_preference: bool) -> Callable[[Sequence[Sample]], Batch]:
    num_mel_bins, shares = maker.recipe.num_mel_bins, data.share_prefixes
    if is_preference and maker.answers is Answers.paired:
        return partial(pack_preference, num_mel_bins=num_mel_bins, share_prefixes=shares)
    if is_preference:
        foreign = maker.answers is Answers.with_foreign
        return partial(pack_unpaired, num_mel_bins=num_mel_bins, foreign=foreign, share_prefixes=shares)
    return partial(pack, loss_weighting=data.loss_weighting, num_mel_bins=num_mel_bins, share_prefixes=shares)


def _indexed(packer: Callable[[Sequence[Sample]], Batch], family: str, samples: Sequence[Sample]) -> Batch:
    return indexed(packer(samples), family_of(family))
