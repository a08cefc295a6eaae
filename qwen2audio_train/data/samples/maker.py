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

from qwen2audio_train.config.data import DataConfig
from qwen2audio_train.data.audio.augment import Augmenter, augmenter_of
from qwen2audio_train.data.audio.decode import AudioError, probe
from qwen2audio_train.data.examples import Clip, Example, TaskExample, clips_of
from qwen2audio_train.data.order.index import Measured
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.prompts.tokenize import count_tokens
from qwen2audio_train.data.samples.collate import Batch, pack, pack_preference
from qwen2audio_train.data.samples.sample import Sample, SampleOptions, materialise
from qwen2audio_train.data.storage.blobs import BlobError
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.layout import MAX_FRAMES, num_frames, num_samples_of

MEASURED_OPTIONS = ("prompt_style", "prompt_seed", "labelled_turns", "long_audio")
"""What the number of an example's tokens depends on, beside the tokenizer."""


@dataclass(frozen=True)
class Maker:
    """Turns examples into what the planner counts and into samples. Pickles, and runs in the workers.

    Args:
        task_weights: factor on the weight of a sample by its task.
    """

    tokenizer: PreTrainedTokenizerBase
    options: SampleOptions
    remote: Remote
    task_weights: Mapping[str, float] = field(default_factory=dict)
    augmenter: Augmenter | None = None

    @property
    def measure_key(self) -> str:
        """Names everything that `measure` depends on."""
        text = self.tokenizer.backend_tokenizer.to_str()
        tokenizer = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return json.dumps([tokenizer, *(getattr(self.options, name) for name in MEASURED_OPTIONS)])

    def measure(self, example: Example, contents: Sequence[bytes | None] | None = None) -> Measured:
        """Tokens and seconds of an example, without decoding; a missing duration is read from the file's header.

        Args:
            contents: bytes of the clips' files, where they are at hand.

        Raises:
            ExampleError: nothing to learn from it, or a clip over 30 s where those are rejected.
            AudioError: a header that had to be read cannot be.
        """
        options = self.options
        rendered = render(
            example,
            prompt_style=options.prompt_style,
            seed=options.prompt_seed,
            labelled_turns=options.labelled_turns,
        )
        at_hand = iter(contents or [None] * len(rendered.clips))
        trunk = tuple(
            self._with_duration(piece, next(at_hand)) if isinstance(piece, Clip) else piece for piece in rendered.trunk
        )
        rendered = dataclasses.replace(rendered, trunk=trunk)
        durations = [clip.duration_s or 0.0 for clip in rendered.clips]
        if options.long_audio == "reject" and any(num_frames(num_samples_of(d)) > MAX_FRAMES for d in durations):
            raise ExampleError(
                f'example "{example.id}": {max(durations):.2f} s of audio, and data.long_audio rejects over 30 s'
            )
        count = count_tokens(rendered, self.tokenizer)
        return Measured(sum(durations), count.audio, count.total - count.audio, rendered.task)

    def make(
        self, example: Example, source: int, number: int, contents: Sequence[bytes | None] | None = None
    ) -> Sample:
        """The sample of an example of source `source`, in pass `number` over it. Raises AudioError, ExampleError."""
        contents = contents or [None] * len(clips_of(example))
        pairs = zip(clips_of(example), contents, strict=True)
        task = example.task if isinstance(example, TaskExample) else "chat"
        augment = self.augmenter.for_example(number, example.id) if self.augmenter else (None, None)
        return materialise(
            example,
            self.tokenizer,
            self.options,
            source_id=source,
            weight=self.task_weights.get(task, 1.0),
            audio_bytes=[self._bytes(clip) if data is None else data for clip, data in pairs],
            augment_waveform=augment[0],
            augment_mel=augment[1],
        )

    def _with_duration(self, clip: Clip, data: bytes | None) -> Clip:
        if clip.duration_s is not None:
            return clip
        info = probe(clip.path, self._bytes(clip) if data is None else data)
        return dataclasses.replace(clip, duration_s=info.duration_s - clip.start_s)

    def _bytes(self, clip: Clip) -> bytes | None:
        """Bytes of the clip's file where it is no plain local one. Raises AudioError."""
        try:
            return self.remote.read_clip(clip.path, self.options.limits.max_bytes)
        except BlobError as error:
            raise AudioError(clip.path, str(error)) from error


def remote_of(data: DataConfig) -> Remote:
    """How the recipe wants remote files to be read."""
    return Remote(data.cache_dir, data.cache_max_gib, data.network_retries, data.network_timeout_s)


def maker_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase, num_mel_bins: int) -> Maker:
    """How the recipe wants examples to be made into samples."""
    augmenter = augmenter_of(data.augment, data.seed)
    limit = min(data.max_tokens_per_example or data.tokens_per_pack, data.tokens_per_pack)
    slowest = min(1.0, *data.augment.speed_factors) if data.augment.speed else 1.0
    options = SampleOptions(
        prompt_style=data.prompt_style.value,
        prompt_seed=data.prompt_seed,
        labelled_turns=data.labelled_turns.value,
        long_audio=data.long_audio.value,
        max_tokens=math.ceil(limit / slowest),
        num_mel_bins=num_mel_bins,
    )
    return Maker(tokenizer, options, remote_of(data), augmenter=augmenter)


def collator_of(data: DataConfig, num_mel_bins: int, is_preference: bool) -> Callable[[Sequence[Sample]], Batch]:
    """What lays the samples of a batch end to end."""
    if is_preference:
        return partial(pack_preference, num_mel_bins=num_mel_bins)
    return partial(pack, loss_weighting=data.loss_weighting.value, num_mel_bins=num_mel_bins)
