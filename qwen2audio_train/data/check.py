"""Look through whole manifests before a run: every line, every clip, and what the sets share that they should not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen2audio_train.data.audio import AudioError, AudioLimits, load_audio
from qwen2audio_train.data.examples import ChatExample, Clip, Example, TaskExample, clips_of
from qwen2audio_train.data.manifest import parse_line
from qwen2audio_train.data.record import ManifestError
from qwen2audio_train.layout import SAMPLING_RATE

ERROR, WARNING = "error", "warning"
SILENCE_DBFS = -60.0
"""A clip whose loudest sample is below this is called silent."""
CLIPPED_SHARE = 1e-3
"""A clip with a larger share of samples at full scale is called clipped."""
FASTEST_SPEECH = 40.0
"""Characters per second; a transcript beyond this does not belong to its clip."""


@dataclass
class CheckOptions:
    """The keys of `launch/data.py check`.

    Attributes:
        manifests: manifests to look through.
        against: held-out manifests (they are looked through as well); audio of `manifests` in them is an error.
        decode: open every clip; without it only the lines are checked.
        max_duration_drift_s: longest difference between a manifest's duration and the audio.
        num_workers: clips that are decoded at a time.
        max_shown: findings of a kind that are printed for a manifest.
        report: JSON file for all findings.
    """

    manifests: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    decode: bool = True
    max_duration_drift_s: float = 0.1
    num_workers: int = 4
    max_shown: int = 5
    report: str | None = None


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
    """What was found in one manifest."""

    path: str
    num_examples: int = 0
    seconds: float = 0.0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    target_characters: list[int] = field(default_factory=list)
    contents: dict[str, tuple[int, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return sum(finding.severity == ERROR for finding in self.findings)


@dataclass(frozen=True)
class ClipFacts:
    """What decoding tells about a clip; `content` is a hash of its samples at 16 bits, the same for lossless copies."""

    duration_s: float
    peak_dbfs: float
    clipped_share: float
    content: str


def check(options: CheckOptions) -> list[Checked]:
    """Look through all manifests; those of `against` come last, and what they share with the others is an error."""
    checked = [check_manifest(path, options) for path in options.manifests]
    held_out = [check_manifest(path, options) for path in options.against]
    for one in checked:
        for other in held_out:
            one.findings += shared_audio(one, other)
    return checked + held_out


def check_manifest(path: str, options: CheckOptions) -> Checked:
    """Every line of a manifest and, with `decode`, every clip."""
    result = Checked(path)
    placed = list(_read(path, result))
    for _, example in placed:
        result.num_examples += 1
        if isinstance(example, TaskExample):
            result.tasks[example.task] += 1
            result.languages[example.language or "unknown"] += 1
            result.target_characters.append(len(example.target))
        else:
            result.tasks["chat" if isinstance(example, ChatExample) else "preference"] += 1
        result.seconds += sum(clip.duration_s or 0.0 for clip in clips_of(example))
    if options.decode:
        clips = [(line, example, clip) for line, example in placed for clip in clips_of(example)]
        with ThreadPoolExecutor(max(1, options.num_workers)) as pool:
            facts = pool.map(examine, [clip for _, _, clip in clips])
            for (line, example, clip), found in zip(clips, facts, strict=True):
                result.findings += _judge(result, line, example, clip, found, options)
    return result


def examine(clip: Clip) -> ClipFacts | AudioError:
    """Decode a clip and measure it; an error is returned, not raised."""
    try:
        waveform = load_audio(clip, limits=AudioLimits(max_duration_s=float("inf")))
    except AudioError as error:
        return error
    level = np.abs(waveform)
    content = hashlib.blake2b(np.round(waveform * 32_767).astype("<i4").tobytes(), digest_size=16).hexdigest()
    return ClipFacts(
        duration_s=len(waveform) / SAMPLING_RATE,
        peak_dbfs=float(20 * np.log10(max(level.max(), 1e-10))),
        clipped_share=float((level >= 0.999).mean()),
        content=content,
    )


def shared_audio(one: Checked, other: Checked) -> list[Finding]:
    """Clips of `one` whose very samples are also in `other`, which is held out."""
    findings = []
    for content in one.contents.keys() & other.contents.keys():
        (line, example), (other_line, other_example) = one.contents[content], other.contents[content]
        where = f'the same audio as "{other_example}" ({other.path}:{other_line}), which is held out'
        findings.append(Finding(ERROR, "contamination", one.path, line, example, where))
    return sorted(findings, key=lambda finding: finding.line)


def _read(path: str, result: Checked) -> Iterable[tuple[int, Example]]:
    first: dict[str, int] = {}
    with Path(path).open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                example = parse_line(raw, path, number)
            except ManifestError as error:
                detail = f'field "{error.field}": expected {error.expected}, found {error.found}'
                result.findings.append(Finding(ERROR, "bad line", path, number, "", detail))
                continue
            if first.setdefault(example.id, number) != number:
                detail = f"the id stands in line {first[example.id]} already"
                result.findings.append(Finding(ERROR, "duplicate id", path, number, example.id, detail))
            yield number, example
    if not first and not result.findings:
        result.findings.append(Finding(ERROR, "bad line", path, 1, "", "the manifest is empty"))


def _judge(
    result: Checked, line: int, example: Example, clip: Clip, found: ClipFacts | AudioError, options: CheckOptions
) -> Iterable[Finding]:
    """What is wrong with one clip; its samples are remembered in `result`."""

    def finding(severity: str, kind: str, detail: str) -> Finding:
        return Finding(severity, kind, result.path, line, example.id, detail)

    if isinstance(found, AudioError):
        yield finding(ERROR, "audio", str(found))
        return
    if clip.duration_s is None:
        result.seconds += found.duration_s
    elif abs(found.duration_s - clip.duration_s) > options.max_duration_drift_s:
        detail = f"{clip.path} is {found.duration_s:.3f} s long, duration_s says {clip.duration_s:.3f}"
        yield finding(ERROR, "duration", detail)
    if found.peak_dbfs < SILENCE_DBFS:
        yield finding(WARNING, "silence", f"{clip.path} is never louder than {found.peak_dbfs:.0f} dBFS")
    elif found.clipped_share > CLIPPED_SHARE:
        yield finding(WARNING, "clipping", f"{found.clipped_share:.1%} of {clip.path} is at full scale")
    if isinstance(example, TaskExample) and example.task == "asr":
        rate = len(example.target) / found.duration_s
        if rate > FASTEST_SPEECH:
            yield finding(WARNING, "text length", f"{len(example.target)} characters in {found.duration_s:.2f} s")
    first = result.contents.setdefault(found.content, (line, example.id))
    if first[0] != line:
        yield finding(WARNING, "duplicate audio", f'{clip.path}: the same samples as "{first[1]}" (line {first[0]})')


def summary(checked: Sequence[Checked], max_shown: int) -> str:
    """The report as text: a paragraph per manifest, then its findings by kind."""
    return "\n".join(line for one in checked for line in _paragraph(one, max_shown))


def _paragraph(one: Checked, max_shown: int) -> Iterable[str]:
    counts = ", ".join(f"{task} {number}" for task, number in one.tasks.most_common())
    yield f"{one.path}: {one.num_examples} examples, {one.seconds / 3600:.2f} h ({counts or 'nothing'})"
    if one.languages:
        yield "  languages: " + ", ".join(f"{name} {number}" for name, number in one.languages.most_common())
    if one.target_characters:
        low, middle, high = np.percentile(one.target_characters, [0, 50, 100]).astype(int)
        yield f"  targets: {low} to {high} characters, half of them up to {middle}"
    by_kind: dict[tuple[str, str], list[Finding]] = {}
    for finding in one.findings:
        by_kind.setdefault((finding.severity, finding.kind), []).append(finding)
    for (severity, kind), findings in sorted(by_kind.items()):
        yield f"  {severity}: {kind}, {len(findings)} x"
        for finding in findings[:max_shown]:
            name = f' "{finding.example}"' if finding.example else ""
            yield f"    line {finding.line}{name}: {finding.detail}"
        if len(findings) > max_shown:
            yield f"    and {len(findings) - max_shown} more"
    if not one.findings:
        yield "  nothing to complain about"
