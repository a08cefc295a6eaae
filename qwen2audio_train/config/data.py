"""The data part of a recipe: what `data:` may say. Plain dataclasses, a schema for OmegaConf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import NUM_MEL_BINS

MAX_SEED = 2**32 - 1
"""The largest that numpy's generators take."""


class SourceFormat(StrEnum):
    """How a source is stored; `auto` looks at the path."""

    auto = "auto"
    manifest = "manifest"
    webdataset = "webdataset"
    huggingface = "huggingface"
    kaldi = "kaldi"
    lhotse = "lhotse"
    audiofolder = "audiofolder"


class Order(StrEnum):
    """Order of a source's examples: shuffled, the shorter the earlier in its first pass, or as they stand."""

    shuffled = "shuffled"
    short_first = "short_first"
    sequential = "sequential"


class PromptStyle(StrEnum):
    natural = "natural"
    hierarchical_tags = "hierarchical_tags"


class Timestamps(StrEnum):
    """How times are written in answers: as text (`<0.32>`), or as tokens of their own (`<|0.32|>`, up to 30 s)."""

    text = "text"
    tokens = "tokens"


class LossWeighting(StrEnum):
    """What counts the same in the loss: every labelled token, every sample, or every task."""

    token = "token"
    sample = "sample"
    task = "task"


class LabelledTurns(StrEnum):
    all = "all"
    last = "last"


class LongAudio(Enum):
    """A clip over 30 s: refused (it goes to the quarantine list), or split into several encoder windows."""

    reject = "reject"
    split = "split"


class OnChangedData(StrEnum):
    """A saved state meets other data: refused, or every unchanged source completes its pass in another order."""

    refuse = "refuse"
    go_on = "go_on"


@dataclass
class SourceConfig:
    """One corpus of the mixture.

    Attributes:
        path: manifests, shards (braces and globs expand), folders or a hub data set's name, one after the other.
        format: how it is stored; `auto` looks at the path.
        weight: probability of drawing an example from here, relative to its siblings; unset for all: by their sizes.
        group: group of the mixture that the source belongs to, nested by slashes: `speech/asr`.
        epochs: most passes over the source in the whole run; then it is left out, the others keep their proportions.
        max_examples: only the first so many examples.
        columns: our field -> the source's column, for example {target: sentence, language: locale}.
        constants: fields that are the same for every example of the source, for example {task: asr, language: en}.
        split: split of a hub data set.
        subset: configuration of a hub data set, for example the language.
        revision: commit or tag of a hub data set; unset pins nothing.
        streaming: read front to back without an index, for what is too large or too far to index.
    """

    path: list[str] = field(default_factory=list)
    format: SourceFormat = SourceFormat.auto
    weight: float | None = at_least(0, None)
    group: str = ""
    epochs: float | None = at_least(0, None)
    max_examples: int | None = at_least(1, None)
    columns: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False


@dataclass
class GroupConfig:
    """A group of sources that shares one weight; its sources divide it among themselves.

    Attributes:
        weight: probability of drawing from the group, relative to its siblings; unset for all siblings: by their
            numbers of examples.
        temperature: flattens the weights inside the group: p ~ weight ** (1 / temperature).
    """

    weight: float | None = at_least(0, None)
    temperature: float = at_least(0.01, 1.0)


@dataclass
class AugmentConfig:
    """Changes to the audio in training; every probability is per clip, 0 switches it off.

    Attributes:
        spec_augment: probability of SpecAugment with the bounds below (defaults: LibriSpeech Basic of
            arXiv:1904.08779).
        time_warp: most frames by which SpecAugment shifts a point in time (W of the paper); 0 leaves warping out.
        freq_mask_bins: widest frequency mask in mel bins (F).
        num_freq_masks: frequency masks of a clip (m_F).
        time_mask_frames: longest time mask in frames of 10 ms (T).
        num_time_masks: time masks of a clip (m_T).
        time_mask_share: longest time mask as a share of the clip (p of the paper).
        speed: probability that a clip is played at another speed, with its pitch.
        speed_factors: speeds to draw from, 0.5 to 2.
        gain: probability that a clip is made louder or softer.
        gain_db: lowest and highest gain in decibel.
        noise: probability that noise from `noise_path` is added.
        noise_path: audio files, or manifests (.jsonl) whose lines have an `audio`.
        noise_snr_db: lowest and highest ratio of signal to noise in decibel.
        reverb: probability that a clip is given the reverberation of a room.
        reverb_rt60_s: shortest and longest reverberation time in seconds.
    """

    spec_augment: float = at_least(0, 0.0, 1)
    time_warp: int = at_least(0, 80)
    freq_mask_bins: int = at_least(0, 27)
    num_freq_masks: int = at_least(0, 1)
    time_mask_frames: int = at_least(0, 100)
    num_time_masks: int = at_least(0, 1)
    time_mask_share: float = at_least(0, 1.0, 1)
    speed: float = at_least(0, 0.0, 1)
    speed_factors: list[float] = field(default_factory=lambda: [0.9, 1.1], metadata={"least": 0.1, "most": 10})
    gain: float = at_least(0, 0.0, 1)
    gain_db: list[float] = field(default_factory=lambda: [-6.0, 6.0])
    noise: float = at_least(0, 0.0, 1)
    noise_path: list[str] = field(default_factory=list)
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    reverb: float = at_least(0, 0.0, 1)
    reverb_rt60_s: list[float] = field(default_factory=lambda: [0.1, 0.6], metadata={"least": 0.01})

    def changing(self) -> list[str]:
        """Names of the changes that are switched on: a clip is then another one in every epoch."""
        return [name for name in ("spec_augment", "speed", "gain", "noise", "reverb") if getattr(self, name)]


@dataclass
class SelfmadeConfig:
    """The synthesised corpus, made in `folder` before anything is read (an empty variant makes nothing).

    Attributes:
        variant: which corpus, `small`, `demo` or `full`; empty makes none.
        folder: where it is written, and found again.
        seed: of everything that is drawn for it.
    """

    variant: str = ""
    folder: str = "data_cache/selfmade/${.variant}"
    seed: int = at_least(0, 0, MAX_SEED)


@dataclass
class DataConfig:
    """Everything that decides which examples a step holds, and how they are laid out.

    Attributes:
        sources: the corpora of the mixture, by names of your choice.
        eval_sources: held-out corpora, read in full at every evaluation.
        groups: weight and temperature of the groups that sources name.
        temperature: flattens the weights on the top level: p ~ weight ** (1 / temperature).
        order: `shuffled`, `short_first` (the shorter the earlier in the first pass) or `sequential` (as they stand).
        seed: of the order of examples and of augmentation.
        tokens_per_pack: most audio + text tokens of a pack (a slot of the step).
        samples_per_pack: so many samples in every pack, not a token budget: for preference pairs, as TRL averages per
            pack.
        packs_per_step: packs of one optimiser step, over all ranks, whatever their number.
        packs_per_forward: packs of a rank that are merged into one forward.
        share_prefixes: compute once what the samples of a pack begin with alike (a system turn, a clip with several
            questions); the loss stays the same to rounding. Packs are planned as if nothing were shared.
        window_examples: examples that best-fit packing looks ahead over; packs never reach across a window.
        max_tokens_per_example: longer examples are left out and counted; unset = `tokens_per_pack`.
        prompt_style: `natural`: a question in words, drawn from the task's pool; `hierarchical_tags`: the tags of
            Qwen-Audio.
        prompt_seed: of the choice among the prompts of a pool.
        prompt_per_pass: choose the prompt of a task example anew in every pass over its source. Packs are planned with
            the longest prompt that it may get.
        timestamps: times in answers as `text` (`<0.32>`), or as `tokens` of their own (`<|0.32|>`, up to 30 s).
        prompts_per_task: only the first so many prompts of every pool; unset = all.
        loss_weighting: what counts the same in the loss: every labelled `token`, every `sample`, or every `task`.
        labelled_turns: turns of the assistant that are learned: `all` of a conversation, or the `last`.
        long_audio: a clip over 30 s: `reject` puts it on the list of bad examples, `split` gives it several encoder
            windows.
        num_workers: processes of each rank that make samples; 0 makes them in the training process.
        prefetch_factor: batches that every worker keeps ready.
        max_bad_examples: bad examples after which the run stops; unset = only the share counts.
        max_bad_share: share of bad examples (of those seen, from 100 on) beyond which the run stops.
        network_retries: times that a failed download is tried again.
        network_timeout_s: seconds without an answer after which a download has failed.
        decode_timeout_s: seconds after which a decoder is given up on; its clip is a bad example, and the run goes on.
            `null` decodes without a deadline, in the worker itself.
        cache_dir: indexes and copies of remote shards.
        cache_max_gib: bound of the shard copies; the least recently used go first.
        on_changed_data: a saved state meets other data: `refuse`, or `go_on`: every unchanged source completes its pass
            in another order.
        augment: changes to the audio in training.
        selfmade: the synthesised corpus.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    eval_sources: dict[str, SourceConfig] = field(default_factory=dict)
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    temperature: float = at_least(0.01, 1.0)
    order: Order = Order.shuffled
    seed: int = at_least(0, 0, MAX_SEED)
    tokens_per_pack: int = at_least(1, 8192)
    samples_per_pack: int | None = at_least(1, None)
    packs_per_step: int = at_least(1, 8)
    packs_per_forward: int = at_least(1, 1)
    share_prefixes: bool = True
    window_examples: int = at_least(1, 2048)
    max_tokens_per_example: int | None = at_least(1, None)
    prompt_style: PromptStyle = PromptStyle.natural
    prompt_seed: int = at_least(0, 0, MAX_SEED)
    prompt_per_pass: bool = False
    timestamps: Timestamps = Timestamps.text
    prompts_per_task: int | None = at_least(1, None)
    loss_weighting: LossWeighting = LossWeighting.token
    labelled_turns: LabelledTurns = LabelledTurns.all
    long_audio: LongAudio = LongAudio.split
    num_workers: int = at_least(0, 2)
    prefetch_factor: int = at_least(1, 4)
    max_bad_examples: int | None = at_least(0, None)
    max_bad_share: float = at_least(0, 0.01, 1)
    network_retries: int = at_least(0, 5)
    network_timeout_s: float = at_least(0, 30.0)
    decode_timeout_s: float | None = at_least(0.1, 120.0)
    cache_dir: str = "data_cache"
    cache_max_gib: float = at_least(0, 64.0)
    on_changed_data: OnChangedData = OnChangedData.refuse
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    selfmade: SelfmadeConfig = field(default_factory=SelfmadeConfig)


@dataclass(frozen=True)
class SampleRecipe:
    """All that decides how an example becomes a sample, under the names of `data:`.

    It is made from the config once (`samples.recipe.recipe_of`), saved beside the weights, and handed to whoever makes
    samples of that model: training, probes, evaluation, pairs and export. The defaults serve weights saved without it.

    Attributes:
        family, num_mel_bins: of the model; `model.family` names it.
    """

    prompt_style: PromptStyle = DataConfig.prompt_style
    prompt_seed: int = DataConfig.prompt_seed
    timestamps: Timestamps = DataConfig.timestamps
    prompts_per_task: int | None = DataConfig.prompts_per_task
    labelled_turns: LabelledTurns = DataConfig.labelled_turns
    long_audio: LongAudio = DataConfig.long_audio
    num_mel_bins: int = NUM_MEL_BINS
    family: str = DEFAULT.name
    cache_dir: str = DataConfig.cache_dir
    cache_max_gib: float = DataConfig.cache_max_gib
    network_retries: int = DataConfig.network_retries
    network_timeout_s: float = DataConfig.network_timeout_s
    decode_timeout_s: float | None = DataConfig.decode_timeout_s
