"""Look through whole manifests before a run: every line, every clip, and what the sets share that they should not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from qwen2audio_train.config.bounds import processors
from qwen2audio_train.config.data import DataConfig, SampleRecipe, SourceConfig
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import (
    ChatExample,
    Example,
    PreferenceExample,
    TaskExample,
    clips_of,
    task_of,
)
from qwen2audio_train.data.manifests.cache import Manifest, find_manifests
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.samples.maker import Maker, maker_of
from qwen2audio_train.data.storage.files import text_hash
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.data.tools.clip_facts import ClipFacts, Placed, examine_all
from qwen2audio_train.data.tools.sources import OWN_ID, examples_of
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import NUM_MEL_BINS

ERROR, WARNING = "error", "warning"
SILENCE_DBFS = -60.0
"""A clip whose loudest sample is below this is called silent."""
CLIPPED_SHARE = 1e-3
"""A clip with a larger share of samples at full scale is called clipped."""
FASTEST_SPEECH = 40.0
"""Characters per second; a transcript beyond this does not belong to its clip."""
SLOWEST_SPEECH = 0.5
"""The same from below, for clips of `SHORTEST_TOLD_S` and more: Chinese has some 4 characters per second."""
SHORTEST_TOLD_S = 5.0
EMPTY_CELLS = frozenset(("nan", "none", "null", "n/a", "#n/a", "<na>", "undefined"))
"""How programs write a cell without a value; `null` is also a word."""
LONGEST_EMPTY = 12


@dataclass
class CheckOptions:
    """The keys of `launch/data.py check`.

    Attributes:
        manifests: manifests to look through: files, globs, folders, URLs, corpora that say themselves what they are.
        sources: the same in full, as in a recipe's `data.sources`, for every other form.
        against: held-out manifests (they are looked through as well); audio of the others in them is an error.
        decode: open every clip; without it only the lines are checked.
        max_duration_drift_s: longest difference between a manifest's duration and the audio.
        max_answer_characters: a longer answer is told.
        tokenizer: folder or hub id; with it examples of more than `max_tokens` are errors, as training leaves them out.
        family: that of the model.
        max_tokens: `data.max_tokens_per_example` of the recipe, or its `data.tokens_per_pack`.
        num_workers: clips that are decoded at a time.
        max_shown: findings of a kind that are printed for a manifest.
        report: JSON file for all findings.
        cache_dir: where a run that is broken off has noted what it had found.
    """

    manifests: list[str] = field(default_factory=list)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    decode: bool = True
    max_duration_drift_s: float = 0.1
    max_answer_characters: int = 1000
    tokenizer: str | None = None
    family: str = DEFAULT.name
    max_tokens: int = 8192
    num_workers: int = processors()
    max_shown: int = 5
    report: str | None = None
    cache_dir: str = "data_cache"


@dataclass(frozen=True)
class Finding:
    """Something about one example: how bad, which kind, where, and what exactly."""

    severity: str
    kind: str
    file: str
    line: int
    example: str
    detail: str


@dataclass
class Checked:
    """What was found in one manifest: some 400 bytes of memory per example (its id, the hash of its audio)."""

    path: str
    num_examples: int = 0
    seconds: float = 0.0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    answer_characters: Counter[int] = field(default_factory=Counter)
    contents: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return sum(finding.severity == ERROR for finding in self.findings)

    def add(self, severity: str, kind: str, place: tuple[str, int], example: str, detail: str) -> None:
        self.findings.append(Finding(severity, kind, *place, example, detail))


def check(options: CheckOptions) -> list[Checked]:
    """Look through all manifests; those of `against` come last, and what they share with the others is an error.

    A check that is broken off and asked for again goes on with the first clip that it had not opened.
    """
    tokenizer = options.tokenizer and AutoTokenizer.from_pretrained(options.tokenizer)
    data = DataConfig(cache_dir=options.cache_dir)
    maker = maker_of(data, tokenizer, NUM_MEL_BINS, family=options.family) if tokenizer else None
    remote = Remote(options.cache_dir)

    def looked_through(named: Mapping[str, SourceConfig], key: str) -> list[Checked]:
        opened = {name: find_manifests(name, source, remote, where=key) for name, source in named.items()}
        return [check_source(name, manifests, options, maker) for name, manifests in opened.items()]

    held_out = looked_through({path: SourceConfig([path]) for path in options.against}, "against")
    checked = looked_through({path: SourceConfig([path]) for path in options.manifests}, "manifests")
    checked += looked_through(options.sources, "sources")
    for one in checked:
        for other in held_out:
            one.findings += shared_audio(one, other)
    for one in [*held_out, *checked]:
        _notes(one.path, options).unlink(missing_ok=True)
    return checked + held_out


def check_source(
    name: str, manifests: Sequence[Manifest], options: CheckOptions, maker: Maker | None = None
) -> Checked:
    """Every line of a source's manifests and, with `decode`, every clip."""
    result = Checked(name)
    clips = _clips(manifests, result, options, maker)
    recipe = SampleRecipe(cache_dir=options.cache_dir)
    if options.decode:
        for placed, found in examine_all(clips, _notes(name, options), options.num_workers, recipe):
            _judge(result, placed, found, options)
    else:
        for placed in clips:
            result.seconds += placed.clip.duration_s or 0.0
    order = {manifest.place: number for number, manifest in enumerate(manifests)}
    result.findings.sort(key=lambda finding: (order[finding.file], finding.line))
    return result


def shared_audio(one: Checked, other: Checked) -> list[Finding]:
    """Clips of `one` whose very samples are also in `other`, which is held out."""
    findings = []
    for content in one.contents.keys() & other.contents.keys():
        (file, line, example), (other_file, other_line, held_out) = one.contents[content], other.contents[content]
        where = f'the same audio as "{held_out}" ({other_file}:{other_line}), which is held out'
        findings.append(Finding(ERROR, "contamination", file, line, example, where))
    return sorted(findings, key=lambda finding: (finding.file, finding.line))


def _notes(name: str, options: CheckOptions) -> Path:
    return Path(options.cache_dir) / "check" / f"{text_hash(os.path.abspath(name))}.jsonl"


def _clips(
    manifests: Sequence[Manifest], result: Checked, options: CheckOptions, maker: Maker | None
) -> Iterator[Placed]:
    """Every clip of the examples, which are counted and looked at on the way."""
    for place, example in _read(manifests, result):
        result.num_examples += 1
        result.tasks[task_of(example)] += 1
        if isinstance(example, TaskExample):
            result.languages[example.language or "unknown"] += 1
        for answer in answers_of(example):
            result.answer_characters[len(answer)] += 1
            if len(answer) > options.max_answer_characters:
                detail = f"{len(answer)} characters, beyond max_answer_characters={options.max_answer_characters}"
                result.add(WARNING, "long answer", place, example.id, detail)
            elif len(answer) < LONGEST_EMPTY and answer.strip().lower() in EMPTY_CELLS:
                detail = f'"{answer}": the word, or the cell of a table that was empty?'
                result.add(WARNING, "empty cell", place, example.id, detail)
        _measure(result, place, example, options, maker)
        yield from (Placed(place[1], example, clip, place[0]) for clip in clips_of(example))


def _read(manifests: Sequence[Manifest], result: Checked) -> Iterable[tuple[tuple[str, int], Example]]:
    """The examples and where they stand; bad lines and ids that repeat are told on the way."""
    for manifest, number, found in tqdm(examples_of(manifests), desc=result.path, unit="", disable=None):
        place = (manifest.place, number)
        if not isinstance(found, ManifestError):
            yield place, found
        elif found.expected == OWN_ID:
            result.add(ERROR, "duplicate id", place, "", f"the id stands there before: {found.found}")
        else:
            at = f'field "{found.field}": ' if found.field else ""
            result.add(ERROR, "bad line", place, "", f"{at}expected {found.expected}, found {found.found}")


def answers_of(example: Example) -> tuple[str, ...]:
    """The texts that are learnt from an example."""
    if isinstance(example, TaskExample):
        return (example.target,)
    if isinstance(example, ChatExample):
        spoken = [message for message in example.messages if message.role == "assistant"]
        return tuple("".join(part for part in message.content if isinstance(part, str)) for message in spoken)
    if isinstance(example, PreferenceExample):
        return (example.chosen, *example.rejected)
    return (example.completion,)


def _measure(
    result: Checked, place: tuple[str, int], example: Example, options: CheckOptions, maker: Maker | None
) -> None:
    """Whether there is something to learn and, with a tokenizer, whether it fits."""
    try:
        if maker is None:
            render(example)
            return
        found = maker.measure(example)
    except AudioError:
        return  # told by whoever opens the clip
    except ExampleError as error:
        result.add(WARNING, "nothing to learn", place, example.id, str(error))
    else:
        tokens = found.audio_tokens + found.text_tokens
        if tokens > options.max_tokens:
            detail = f"{tokens} tokens ({found.audio_tokens} of them audio), beyond max_tokens={options.max_tokens}"
            result.add(ERROR, "too long", place, example.id, detail)


def _judge(result: Checked, placed: Placed, found: ClipFacts | AudioError, options: CheckOptions) -> None:
    """What is wrong with one clip; its samples are remembered in `result`."""
    line, example, clip, file = placed

    def tell(severity: str, kind: str, detail: str) -> None:
        result.add(severity, kind, (file, line), example.id, detail)

    if isinstance(found, AudioError):
        result.seconds += clip.duration_s or 0.0
        tell(ERROR, "audio", str(found))
        return
    result.seconds += found.duration_s if clip.duration_s is None else clip.duration_s
    if clip.duration_s is not None and abs(found.duration_s - clip.duration_s) > options.max_duration_drift_s:
        detail = f"{clip.path} is {found.duration_s:.3f} s long, duration_s says {clip.duration_s:.3f}"
        tell(ERROR, "duration", detail)
    if found.peak_dbfs < SILENCE_DBFS:
        tell(WARNING, "silence", f"{clip.path} is never louder than {found.peak_dbfs:.0f} dBFS")
    elif found.clipped_share > CLIPPED_SHARE:
        tell(WARNING, "clipping", f"{found.clipped_share:.1%} of {clip.path} is at full scale")
    if isinstance(example, TaskExample) and example.task == "asr":
        rate = len(example.target) / found.duration_s
        is_slow = rate < SLOWEST_SPEECH and found.duration_s >= SHORTEST_TOLD_S
        if rate > FASTEST_SPEECH or is_slow:
            tell(WARNING, "text length", f"{len(example.target)} characters in {found.duration_s:.2f} s")
    first = result.contents.setdefault(found.content, (file, line, example.id))
    if first[:2] != (file, line):
        there = f"line {first[1]}" if first[0] == file else f"{first[0]}:{first[1]}"
        tell(WARNING, "duplicate audio", f'{clip.path}: the same samples as "{first[2]}" ({there})')


def summary(checked: Sequence[Checked], max_shown: int) -> str:
    """The report as text: a paragraph per manifest, then its findings by kind."""
    return "\n".join(line for one in checked for line in _paragraph(one, max_shown))


def _paragraph(one: Checked, max_shown: int) -> Iterable[str]:
    counts = ", ".join(f"{task} {number}" for task, number in one.tasks.most_common())
    yield f"{one.path}: {one.num_examples} examples, {one.seconds / 3600:.2f} h ({counts or 'nothing'})"
    if one.languages:
        yield "  languages: " + ", ".join(f"{name} {number}" for name, number in one.languages.most_common())
    if lengths := sorted(one.answer_characters.elements()):
        middle = lengths[(len(lengths) - 1) // 2]
        yield f"  answers: {lengths[0]} to {lengths[-1]} characters, half of them up to {middle}"
    by_kind: dict[tuple[str, str], list[Finding]] = {}
    for finding in one.findings:
        by_kind.setdefault((finding.severity, finding.kind), []).append(finding)
    for (severity, kind), findings in sorted(by_kind.items()):
        yield f"  {severity}: {kind}, {len(findings)} x"
        for finding in findings[:max_shown]:
            name = f' "{finding.example}"' if finding.example else ""
            place = f"line {finding.line}" if finding.file == one.path else f"{finding.file}:{finding.line}"
            yield f"    {place}{name}: {finding.detail}"
        if len(findings) > max_shown:
            yield f"    and {len(findings) - max_shown} more"
    if not one.findings:
        yield "  nothing to complain about"
