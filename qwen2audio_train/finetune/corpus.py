"""From whatever `audio=` names to examples of ours; columns, task and labels are guessed where they can be."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qwen2audio_train.config.data import SourceConfig, SourceFormat
from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import Example, PreferenceExample, TaskExample, UnpairedExample, clips_of
from qwen2audio_train.data.manifests.columns import columns_of, reach
from qwen2audio_train.data.manifests.conversations import is_conversation
from qwen2audio_train.data.manifests.corpus import FIRST_ROWS, Corpus, open_corpus
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.data.tools.clip_facts import Placed, examine_all
from qwen2audio_train.data.tools.convert import ConvertOptions, convert
from qwen2audio_train.finetune.split import closed_set, split

FEWEST = 10
"""Clips below which nothing can be learnt and held out."""

USUAL: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "utt_id", "utterance_id", "__key__"),
    "audio": ("audio", "audio_filepath", "audio_path", "file_name", "filename", "path", "file", "wav"),
    "duration_s": ("duration_s",),
    "start_s": ("start_s",),
    "end_s": ("end_s",),
    "language": ("language", "lang", "locale"),
    "meta.speaker": ("speaker", "speaker_id", "client_id", "spk", "meta.speaker"),
    "meta.split": ("split", "meta.split"),
}
"""Our field -> the names that corpora give its column, the likeliest first."""

SPOKEN = ("text", "sentence", "transcript", "transcription", "normalized_text", "target", "txt")
LABELS = ("label", "class", "cls", "category", "emotion", "intent", "keyword", "word", "genre", "instrument")
QUESTION = "Which of these is heard?"
"""What a label answers where no task is given; the labels follow once all of them are known."""


@dataclass(frozen=True)
class Prepared:
    """Examples on both sides, and what is to be said about them.

    Attributes:
        labels: the closed set of answers; empty where there is none.
        how: how the sides were told apart.
        left_out: what could not be used, and why.
    """

    train: list[Example]
    held_out: list[Example]
    labels: list[str]
    how: str
    left_out: list[str]


def prepare(config: FinetuneConfig, folder: Path) -> Prepared:
    """The examples of a corpus, told apart; what is made on the way lies in `folder`.

    Raises:
        ConfigError: there is no such corpus, no usable audio in it, too few clips, one class only, or a column that has
            to be named.
    """
    examples, left_out = read(config, config.audio, folder)
    labels = closed_set(examples)
    if len(examples) > 1 and len({e.target if isinstance(e, TaskExample) else e.id for e in examples}) == 1:
        raise ConfigError(f"audio={config.audio}: one answer for all {len(examples)} clips, so nothing to learn")
    contents, bad = examine_clips(examples, folder)
    left_out += bad
    examples = [example for example in examples if example.id in contents]
    if len(examples) < FEWEST:
        raise ConfigError(
            f"audio={config.audio}: {len(examples)} usable clips, expected {FEWEST} or more"
            + "".join(f"\n  {reason}" for reason in left_out[:5])
        )
    if config.held_out is None:
        train, held_out, how = split(examples, contents, config.held_out_share, config.seed)
    else:
        held_out, bad = read(config, config.held_out, folder, "held_out")
        heard, unread = examine_clips(held_out, folder, "held_out")
        known = {content for found in heard.values() for content in found}
        shared = {name for name, found in contents.items() if known & set(found)}
        train = [example for example in examples if example.id not in shared]
        held_out, how = [example for example in held_out if example.id in heard], f"held_out={config.held_out}"
        left_out += [*bad, *unread, *(f"{name}: its audio is held out" for name in sorted(shared))]
    if not train or not held_out:
        side = "train on" if not train else "hold out"
        raise ConfigError(f"audio={config.audio}: nothing to {side}; name another corpus as held_out=")
    asked = (labelled(side, labels) for side in (train, held_out))
    train, held_out = ([replace(example, source=config.name) for example in side] for side in asked)
    return Prepared(train, held_out, labels, how, left_out)


def read(config: FinetuneConfig, place: str, folder: Path, name: str = "all") -> tuple[list[Example], list[str]]:
    """All examples of a corpus, and what is wrong with the rows that are none."""
    key = "audio" if name == "all" else name
    columns, constants = fields_of(config, place, key)
    options = ConvertOptions(
        input=place,
        output=str(folder / f"{name}.jsonl"),
        columns=columns,
        constants=constants,
        format=config.format,
        split=config.split,
        skip_bad=True,
    )
    try:
        converted = convert(options)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from error
    examples = read_manifest(options.output)
    if any(isinstance(example, PreferenceExample | UnpairedExample) for example in examples):
        raise ConfigError(f"{key}={place}: holds preferences, which launch/dpo.py learns from")
    return examples, converted.errors


def fields_of(config: FinetuneConfig, place: str, key: str) -> tuple[dict[str, str], dict[str, str]]:
    """Columns and constants with which `convert` reads a corpus; neither for records of ours and conversations."""
    if os.path.isdir(place) and not any(Path(place).iterdir()):
        raise ConfigError(
            f"{key}={place}: the folder is empty; expected recordings, a folder for each class, or a table"
        )
    corpus = open_corpus(key, SourceConfig([place], format=config.format, split=config.split), Remote(), where=key)
    first = [row for _, row in islice(_rows(corpus), FIRST_ROWS)]
    rows = [row for row in first if isinstance(row, Mapping)]
    if not rows:
        raise ConfigError(f"{key}={place}: {f'no row is read: {first[0]}' if first else 'it holds no rows'}")
    columns = {column for row in rows for column in columns_of(row) if reach(row, column) not in (None, "")}
    seen = {column for column in columns if not column.startswith("__") or column == "__key__"}
    if {"audio", "task", "target"} <= seen or any(map(is_conversation, rows)):
        return dict(config.columns), {}
    if corpus.kind is SourceFormat.audiofolder:
        one_class(place, corpus, key)
    found = dict(corpus.columns) | {
        name: column for name, names in USUAL.items() for column in names[::-1] if column in seen
    }
    found = {name: column for name, column in found.items() if column in seen} | config.columns
    if "target" not in config.columns:
        found["target"] = target_column(seen, config.task, f"{key}={place}")
    if "audio" not in found:
        raise ConfigError(f"{key}={place}: which column is the audio? columns.audio=NAME of {', '.join(sorted(seen))}")
    is_label = found["target"].rpartition(".")[2].lower() not in SPOKEN
    constants = {"task": config.task or ("aqa" if is_label else "asr")}
    if constants["task"] == "aqa" and "question" not in found:
        constants["question"] = QUESTION
    return found, constants | ({"language": config.language} if config.language else {})


def target_column(seen: Collection[str], task: str | None, corpus: str) -> str:
    """The column of transcripts or labels. Raises ConfigError where there is none, or both and no task."""
    inside = [*SPOKEN, *(f"json.{name}" for name in SPOKEN)], [*LABELS, *(f"json.{name}" for name in LABELS)]
    spoken, label = (next((name for name in names if name in seen), None) for names in inside)
    chosen = spoken if task in ("asr", "s2tt") else label or spoken
    if chosen is None or (task is None and spoken and label):
        found = f"transcripts ({spoken}) and labels ({label}) are there" if chosen else f"there are {sorted(seen)}"
        raise ConfigError(f"{corpus}: what is to be learnt? Set columns.target=NAME; {found}")
    return chosen


def one_class(place: str, corpus: Corpus, key: str) -> None:
    """Raises ConfigError for a folder of recordings that a folder per class does not tell apart."""
    folders = {row["label"] for _, row in _rows(corpus) if isinstance(row, Mapping)}
    if len(folders) == 1:
        raise ConfigError(
            f"{key}={place}: one class only ({folders.pop()}); put the recordings in a folder for each class, or write "
            "their transcripts or labels into a table (metadata.csv with the columns file_name and text)"
        )


def examine_clips(
    examples: Sequence[Example], folder: Path, name: str = "all"
) -> tuple[dict[str, list[str]], list[str]]:
    """Hashes of the audio of every example that can be heard by its id, and what is wrong with the others."""
    contents: dict[str, list[str]] = {example.id: [] for example in examples}
    bad: dict[str, str] = {}
    clips = (Placed(number, example, clip) for number, example in enumerate(examples, 1) for clip in clips_of(example))
    for placed, found in examine_all(clips, folder / f"{name}.facts", os.cpu_count() or 1):
        if isinstance(found, AudioError):
            bad[placed.example.id] = f"{placed.example.id}: {found}"
        else:
            contents[placed.example.id].append(found.content)
    return {name: found for name, found in contents.items() if name not in bad}, list(bad.values())


def labelled(examples: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """The same examples; of a closed set each knows its choices, which the question names where we wrote it."""
    choices = list(map(readable, labels))
    question = f"{QUESTION.rstrip('?')}: {', '.join(choices)}?"
    found: list[Example] = []
    for example in examples:
        if labels and isinstance(example, TaskExample):
            asked = question if example.question == QUESTION else example.question
            meta = {"choices": choices, **example.meta}
            example = replace(example, target=readable(example.target), question=asked, meta=meta)
        found.append(example)
    return found


def readable(label: str) -> str:
    """A class as a word: `dog_bark` is "dog bark"."""
    return re.sub(r"[_\s]+", " ", label).strip() or label


def _rows(corpus: Corpus) -> Iterator[tuple[int, object]]:
    for shard in range(corpus.num_shards):
        for number, row, _ in corpus.rows_with_bytes(shard):
            yield number, row
