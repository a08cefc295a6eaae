"""One example as the model sees it: the text with its labels marked, the clips, and a picture of the spectrogram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.data import LabelledTurns, PromptStyle, SampleRecipe, Timestamps
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import PAIRED, Clip, Example
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.prompts.render import Piece, Rendered, render
from qwen2audio_train.data.prompts.tokenize import text_encoder, tokenize
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.data.tools.sources import examples_of, open_manifests
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import SAMPLING_RATE, num_frames, window_samples

IDS_COMPARED = 10_000
"""So many ids are looked through for the one that a misspelt one is nearest to."""

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


@dataclass
class ShowOptions:
    """The keys of `launch/data.py show`.

    Attributes:
        manifest: where the example is: a manifest, or a corpus that says itself what it is.
        example: its id, or its number counted from 0.
        prompt_style: `natural` or `hierarchical_tags`, as in the recipe.
        prompt_seed: that of the recipe.
        timestamps: `text` or `tokens`, as in the recipe.
        labelled_turns: `all` or `last`, as in the recipe.
        for_generation: show the prompt as it is answered, without the answer.
        tokenizer: folder or hub id; with it every token is listed.
        image: PNG file for the spectrogram of the clips (needs matplotlib).
        num_mel_bins: that of the model.
        family: that of the model.
        cache_dir: that of the recipe.
    """

    manifest: str = "???"
    example: str = "0"
    prompt_style: PromptStyle = PromptStyle.natural
    prompt_seed: int = 0
    timestamps: Timestamps = Timestamps.text
    labelled_turns: LabelledTurns = LabelledTurns.all
    for_generation: bool = False
    tokenizer: str | None = None
    image: str | None = None
    num_mel_bins: int = 128
    family: str = DEFAULT.name
    cache_dir: str = "data_cache"


def show(options: ShowOptions, colour: bool = False) -> str:
    """Describe an example. Labels are green, or stand in [[...]] without colour.

    Raises:
        ConfigError: there is no such example.
        AudioError: a clip cannot be read.
    """
    example = find_example(options.manifest, options.example, options.cache_dir)
    rendered = render(
        example,
        prompt_style=options.prompt_style,
        seed=options.prompt_seed,
        labelled_turns=options.labelled_turns,
        timestamps=options.timestamps,
        for_generation=options.for_generation,
        family=family_of(options.family),
    )
    waveforms = [load_clip(clip, SampleRecipe()) for clip in rendered.clips]
    parts = [f"{rendered.id}  (source {rendered.source}, task {rendered.task})"]
    parts += [
        _clip_line(clip, waveform, rendered.family) for clip, waveform in zip(rendered.clips, waveforms, strict=True)
    ]
    parts += ["", marked_text(rendered, [len(waveform) for waveform in waveforms], colour)]
    if options.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        parts += ["", token_table(rendered, [len(waveform) for waveform in waveforms], tokenizer, colour)]
    if options.image is not None:
        save_picture(_spectrograms(waveforms, options.num_mel_bins), options.image)
        parts += ["", f"spectrogram: {options.image}"]
    return "\n".join(parts)


def find_example(manifest: str, name: str, cache_dir: str) -> Example:
    """The example of that id or, failing that, number (bad lines do not count). Raises ConfigError."""
    number = int(name) if name.isdecimal() else None
    numbered: Example | None = None
    count = 0
    ids: list[str] = []
    for _, _, item in examples_of(open_manifests(manifest, cache_dir, "manifest")):
        if isinstance(item, ManifestError):
            continue
        if item.id == name:
            return item
        if count == number:
            numbered = item
        count += 1
        if len(ids) < IDS_COMPARED:
            ids.append(item.id)
    if numbered is not None:
        return numbered
    if number is not None:
        raise ConfigError(f"example={name}: the manifest has {count} examples, counted from 0")
    raise ConfigError(f"example={name}: no such id; {nearest(name, ids)}")


def marked_text(rendered: Rendered, num_samples: Sequence[int], colour: bool = False) -> str:
    """The text with labels marked and a clip's placeholders counted; a preference's answers on lines of their own."""
    lengths, family = iter(num_samples), rendered.family

    def shown(piece: Piece) -> str:
        if isinstance(piece, Clip):
            return _dim(f"{family.audio_token} x {family.num_clip_tokens(next(lengths))}", colour)
        return _label(piece.text, colour) if piece.is_label else piece.text

    text = "".join(map(shown, rendered.trunk)).replace("" if colour else "]][[", "")
    answers = ["".join(map(shown, branch)).replace("]][[", "") for branch in rendered.branches]
    names = _answer_names(rendered)
    return "\n".join([text, *(f"{name}: {answer}" for name, answer in zip(names, answers, strict=True))])


def _answer_names(rendered: Rendered) -> list[str]:
    """What the answers of a preference are called."""
    names = ["chosen" if rendered.task == PAIRED else rendered.task, *["rejected"] * len(rendered.branches)]
    return names[: len(rendered.branches)]


def token_table(
    rendered: Rendered, num_samples: Sequence[int], tokenizer: PreTrainedTokenizerBase, colour: bool = False
) -> str:
    """Every token on a line: position, id, text, and whether it is learnt; a run of placeholders is one line."""
    tokens = tokenize(rendered, tokenizer, num_samples)
    audio_id = text_encoder(tokenizer).audio_token_id(rendered.family)
    lines = []
    for position, (token, is_label) in enumerate(zip(tokens.input_ids.tolist(), tokens.label_mask, strict=True)):
        if token == audio_id and position and tokens.input_ids[position - 1] == audio_id:
            continue
        run = int(np.argmin(np.append(tokens.input_ids[position:] == audio_id, False)))
        text = f"{rendered.family.audio_token} x {run}" if run else repr(tokenizer.decode([token]))
        line = f"{position:6d} {token:7d} {text}"
        lines.append(_label(line, colour) if is_label else line)
    for name, branch in zip(_answer_names(rendered), tokens.branches, strict=True):
        lines.append(name)
        lines += [_label(f"{'':6} {token:7d} {tokenizer.decode([token])!r}", colour) for token in branch.tolist()]
    return "\n".join(lines)


def save_picture(mels: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Spectrograms with their titles below each other, time in seconds, as a PNG. Raises ConfigError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("image: drawing needs matplotlib; pip install 'qwen2audio-train[demo]'") from error
    figure = Figure(figsize=(10, 2.5 * len(mels)), layout="constrained")
    for axes, (title, mel) in zip(figure.subplots(len(mels), squeeze=False)[:, 0], mels.items(), strict=True):
        image = axes.imshow(mel, origin="lower", aspect="auto", extent=(0, mel.shape[1] / 100, 0, mel.shape[0]))
        axes.set(title=title, xlabel="seconds", ylabel="mel band")
        figure.colorbar(image, ax=axes)
    figure.savefig(path)


def _spectrograms(waveforms: Sequence[np.ndarray], num_mel_bins: int) -> dict[str, np.ndarray]:
    """The log-mel of every encoder window under the number of its clip and, where a clip has several, its own."""
    mels = {}
    for number, waveform in enumerate(waveforms, start=1):
        windows = _windows(waveform)
        for place, window in enumerate(windows, start=1):
            mel, frames = log_mel(window, num_mel_bins)
            title = f"Audio {number}" + (f", window {place} of {len(windows)}" if len(windows) > 1 else "")
            mels[title] = mel[:, :frames]
    return mels


def _windows(waveform: np.ndarray) -> list[np.ndarray]:
    return np.split(waveform, np.cumsum(window_samples(len(waveform)))[:-1])


def _clip_line(clip: Clip, waveform: np.ndarray, family: Family) -> str:
    seconds, frames = len(waveform) / SAMPLING_RATE, num_frames(len(waveform))
    said = "" if clip.duration_s is None else f", manifest {clip.duration_s:g} s"
    part = "" if clip.start_s == 0 and clip.end_s is None else f" from {clip.start_s:g} s"
    part += "" if clip.channel is None else f" channel {clip.channel}"
    windows = len(window_samples(len(waveform)))
    tokens = f"{family.num_clip_tokens(len(waveform))} tokens" + (f" in {windows} windows" if windows > 1 else "")
    return f"{clip.path}{part}: {seconds:.3f} s{said}, {frames} frames, {tokens}"


def _label(text: str, colour: bool) -> str:
    return f"{GREEN}{text}{PLAIN}" if colour else f"[[{text}]]"


def _dim(text: str, colour: bool) -> str:
    return f"{DIM}{text}{PLAIN}" if colour else text
