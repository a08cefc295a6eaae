"""What preference optimisation does to what a fine-tuned model writes: pairs, DPO on them, and held-out scores.

    python benchmarks/preference_effect.py demo runs/demo/sft                # the self-made corpus, after `make demo`
    python benchmarks/preference_effect.py recordings runs/recordings/sft    # recordings, see docs/recordings.md
    python benchmarks/preference_effect.py demo runs/demo/sft --quick        # one seed, one way, few of everything

For every seed, `launch/pairs.py` makes pairs from training questions (`sampled`: answers of the model itself, best
against worst; `no_speech`: silence and noise against speech, by rule), `launch/dpo.py` trains on them from the
fine-tuned checkpoint (`+sft`: with the likelihood of the chosen answers added to the loss), and the result answers
held-out questions greedily:

    error rate      of transcripts, words (characters where they are not spaced), edits over length
    accuracy        of answers to questions about the audio
    words on ...    share of clips of silence, of white noise and of recorded sounds without speech on which a request
                    for a transcript gets words (neither nothing nor that there is no speech)
    missed speech   share of clips with speech that are said to have none

Beside every figure: its difference from the fine-tuned model, meaned over seeds, with two 95 % intervals: of the
held-out clips (paired bootstrap, seeds added up per clip) and of the seeds (t, which is wide for three).

The last line is JSON. Everything is written below `--out`; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from record import save

from qwen2audio_train.data.examples import ChatExample, Clip, Example, Message
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.scoring import metrics
from qwen2audio_train.evaluation.scoring.bootstrap import paired_difference
from qwen2audio_train.evaluation.scoring.items import item_of
from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.pairs.rules import NO_SPEECH
from qwen2audio_train.training.stages.policy import load_for_inference

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arm:
    """Which pairs, and what of `recipes/dpo.yaml` is not as it stands there."""

    pairs: tuple[str, ...]
    steps: int = 20
    learning_rate: float = 1e-4
    changes: tuple[str, ...] = ()


WITH_SFT = ("trainer.loss_type=[sigmoid,sft]", "trainer.loss_weights=[1.0,1.0]")
ARMS = {
    "sampled": Arm(("sampled",)),
    "no_speech": Arm(("no_speech",)),
    "no_speech+sft": Arm(("no_speech",), 40, 5e-4, WITH_SFT),
    "both+sft": Arm(("sampled", "no_speech"), 40, 5e-4, WITH_SFT),
}
MAX_NEW_TOKENS = 64
METRICS = ("error rate", "accuracy", "words on silence", "words on noise", "words on sounds", "missed speech")
SAMPLING = ("score=error_rate", f"max_new_tokens={MAX_NEW_TOKENS}", "num_threads=1")
DPO: tuple[str, ...] = ("data=none", "data.tokens_per_pack=1000", "data.packs_per_step=1", "data.samples_per_pack=16")
DPO += ("data.num_workers=0", "tracker=off", "num_threads=1")
TRANSCRIBE = ("Write down what is said.", "Which words are spoken?", "What does the speaker say?")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t over so many seeds."""

Counts = dict[str, tuple[list[int], list[int]]]
"""Numerators and denominators of each metric, one per clip."""


@dataclass(frozen=True)
class Corpus:
    """Questions to make pairs from, held-out ones, and recordings without speech."""

    train: list[Any]
    held_out: list[Any]
    sounds: list[Clip]


def demo() -> Corpus:
    """The self-made corpus: transcripts are asked for in the words of its dialogues."""
    folder = ROOT / "data_cache/selfmade/demo"
    parts = {
        split: [_transcript(e, i) for i, e in enumerate(read_manifest(folder / name)) if _is(e, "asr", "en")]
        for split, name in (("train", "pretrain.asr_en.train.jsonl"), ("dev", "pretrain.dev.jsonl"))
    }
    dev: list[Any] = read_manifest(folder / "pretrain.dev.jsonl")
    sounds = [e.clip for e in dev if getattr(e, "task", "") in ("sec", "asc")]
    answers = {split: read_manifest(folder / f"sft.{split}.jsonl") for split in ("train", "dev")}
    train = _spread(parts["train"], 80) + _spread([e for e in answers["train"] if _asked_once(e)], 40)
    return Corpus(train, _spread(parts["dev"], 80) + _spread(answers["dev"], 40), sounds)


def recordings() -> Corpus:
    """Recordings of up to 5 s as conversations: mostly labels, as so small a model hardly transcribes real speech."""
    folder = ROOT / "data_cache/recordings"
    chats: list[list[Any]] = [read_manifest(folder / f"chat.{split}.jsonl") for split in ("train", "dev")]
    train, held_out = ([e for e in split if e.messages[0].content[0].duration_s <= 5.0] for split in chats)
    sounds = [e.messages[0].content[0] for e in held_out if e.meta.get("task") in ("sec", "mnc", "mic")]
    questions, asked = (
        _spread([e for e in examples if e.meta.get("task") == "asr"], transcripts)
        + _spread([e for e in examples if e.meta.get("task") not in ("asr", "mc")], labels)
        for examples, transcripts, labels in ((train, 40, 60), (held_out, 30, 120))
    )
    return Corpus(questions, asked, sounds)


def _is(example: Any, task: str, language: str) -> bool:
    return (example.task, example.language) == (task, language)


def _asked_once(example: Any) -> bool:
    return len(example.messages) == 2 and example.meta.get("kind") != "transcript"


def _transcript(example: Any, number: int) -> ChatExample:
    asked = Message("user", (example.clip, TRANSCRIBE[number % len(TRANSCRIBE)]))
    meta = {"task": "asr", "language": example.language}
    return ChatExample(example.id, (asked, Message("assistant", (f"{example.target}.",))), "asr", meta=meta)


def _spread(examples: Sequence[Any], count: int) -> list[Any]:
    """`count` examples, evenly from all of them."""
    return [examples[place * len(examples) // min(count, len(examples))] for place in range(min(count, len(examples)))]


def without_speech(corpus: Corpus, folder: Path, count: int) -> dict[str, list[ChatExample]]:
    """Requests for a transcript of silence, noise (at levels of 0.0001 to 0.03) and sounds."""
    asr = [e for e in corpus.held_out if e.meta.get("task") == "asr"]
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[ChatExample]] = {"silence": [], "noise": [], "sounds": []}
    for number, example in enumerate(_spread(asr, count)):
        level = 10 ** rng.uniform(-4, -1.5)
        (clip,) = [part for part in example.messages[0].content if isinstance(part, Clip)]
        length = round((clip.duration_s or 0.0) * SAMPLING_RATE)
        for kind, scale in (("silence", 0.0), ("noise", level)):
            path = folder / f"{kind}.{number:03d}.flac"
            soundfile.write(path, (scale * rng.standard_normal(length)).astype(np.float32), SAMPLING_RATE)
            made[kind].append(_asked_about(Clip(str(path), length / SAMPLING_RATE), example, f"{kind}/{number}"))
    made["sounds"] = [
        _asked_about(clip, asr[i % len(asr)], f"sounds/{i}") for i, clip in enumerate(_spread(corpus.sounds, count))
    ]
    return made


def _asked_about(clip: Clip, example: ChatExample, name: str) -> ChatExample:
    """The example's request for a transcript about another clip."""
    asked, _ = example.messages
    content = tuple(clip if isinstance(part, Clip) else part for part in asked.content)
    messages = (replace(asked, content=content), Message("assistant", (NO_SPEECH,)))
    meta = {**example.meta, "no_speech": True}
    return replace(example, id=name, messages=messages, source=name.split("/")[0], meta=meta)


def counts_of(checkpoint: Path, examples: Sequence[Example], path: Path) -> Counts:
    """What a checkpoint answers, counted per clip; the texts are kept at `path`."""
    if not path.is_file():
        path.write_text(json.dumps(texts_of(checkpoint, examples), ensure_ascii=False, indent=0), encoding="utf-8")
    texts = json.loads(path.read_text(encoding="utf-8"))
    counts: Counts = {name: ([], []) for name in METRICS}
    for item in filter(None, map(item_of, examples)):
        said, wanted = texts[item.id], item.reference or ""
        name, top, bottom = _counted(item, said, wanted)
        for metric, a, b in [(name, top, bottom), *_missed(item, said)]:
            counts[metric][0].append(a)
            counts[metric][1].append(b)
    return counts


def texts_of(checkpoint: Path, examples: Sequence[Example]) -> dict[str, str]:
    """Greedy answers by id; an example that cannot be asked has an empty one."""
    loaded = load_for_inference(str(checkpoint), num_threads=1)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = LazySamples(examples, tokenizer, loaded.samples, for_generation=True)
    texts = generate_texts(model, tokenizer, prompts, Decoding(max_new_tokens=MAX_NEW_TOKENS), prompts.lengths)
    return {example.id: text or "" for example, text in zip(examples, texts, strict=True)}


def _counted(item: Any, said: str, wanted: str) -> tuple[str, int, int]:
    if item.metric == "hallucination":
        return f"words on {item.source}", metrics.wrote_words([wanted], [said], None)[0], 1
    if item.metric == "error_rate":
        (edits,), (length,) = metrics.edit_counts([wanted], [said], [item.language])
        return "error rate", edits, length
    return "accuracy", metrics.is_right([wanted], [said])[0], 1


def _missed(item: Any, said: str) -> list[tuple[str, int, int]]:
    return [("missed speech", metrics.is_right([NO_SPEECH], [said])[0], 1)] if item.metric == "error_rate" else []


def make_pairs(out: Path, seed: int, checkpoint: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Pairs of this seed by `launch/pairs.py`, where they are not there already."""
    made = {kind: out / f"{kind}.{seed}.jsonl" for kind in ("sampled", "no_speech")}
    train = f"manifests=[{out / 'train.jsonl'}]"
    if not made["sampled"].is_file():
        output = (f"output={made['sampled']}", f"seed={seed}", f"num_answers={options.answers}")
        run("pairs", "sample", f"checkpoint={checkpoint}", train, *output, *SAMPLING)
    if not made["no_speech"].is_file():
        speech = f"manifests=[{out / 'speech.jsonl'}]"
        run("pairs", "rules", speech, f"output={made['no_speech']}", f"seed={seed}", "rules=[no_speech]")
    return made


def train_arm(folder: Path, arm: Arm, made: dict[str, Path], seed: int, checkpoint: Path, steps: int) -> Path:
    """DPO by `launch/dpo.py`; its checkpoint."""
    done = folder / f"checkpoint-{steps}"
    if not done.is_dir():
        pairs = ",".join(str(made[kind]) for kind in arm.pairs)
        run(
            "dpo",
            *(f"data.sources={{pairs: {{path: [{pairs}]}}}}", f"init_from={checkpoint}", f"run_dir={folder}"),
            *(f"seed={seed}", f"trainer.max_steps={steps}", f"trainer.save_steps={steps}"),
            *(f"trainer.learning_rate={arm.learning_rate}", *DPO, *arm.changes),
        )
    return done


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, f"launch/{script}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    for line in done.stdout.splitlines():
        if "pairs" in line or "chosen answer" in line:
            print(line, flush=True)


def compared(before: Counts, after: list[Counts]) -> dict[str, dict[str, Any]]:
    """Each metric before, after (mean over seeds) and its difference with both intervals."""
    table = {}
    for name in METRICS:
        (top, bottom), seeds = before[name], [counts[name] for counts in after]
        if not bottom:
            continue
        values = np.array([sum(a) / sum(b) for a, b in seeds])
        summed = tuple(np.sum([counts[part] for counts in seeds], axis=0).tolist() for part in (0, 1))
        clips = paired_difference((top, bottom), summed)
        old = sum(top) / sum(bottom)
        half = T_975[len(values)] * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        table[name] = {
            "n": len(bottom), "before": old, "after": float(values.mean()), "seeds": values.tolist(),
            "difference": float(values.mean()) - old, "clips_95": [clips.low, clips.high],
            "seeds_95": [float(values.mean() - old - half), float(values.mean() - old + half)],
        }  # fmt: skip
    return table


def show(arm: str, table: dict[str, dict[str, Any]]) -> None:
    for name, row in table.items():
        low, high = row["clips_95"]
        print(
            f"{arm:13} {name:16} n {row['n']:4}  {row['before']:6.1%} -> {row['after']:6.1%}  "
            f"{100 * row['difference']:+5.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]  seeds "
            + " ".join(f"{value:.1%}" for value in row["seeds"]),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=["demo", "recordings"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--limit", type=int, default=0, help="so many training and held-out questions")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--save", metavar="NAME", help="keep the figures in benchmarks/results/NAME.json")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.limit, options.answers, options.arms = 1, 40, 3, ["no_speech+sft"]
    folder = f"{options.corpus}.quick" if options.quick else options.corpus
    out = (options.out or ROOT / "runs/preference_effect" / folder).absolute()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoint.absolute()
    corpus = {"demo": demo, "recordings": recordings}[options.corpus]()
    corpus = replace(corpus, train=_spread(corpus.train, options.limit or 10**6))
    silent = without_speech(corpus, out / "audio", 8 if options.limit else 15)
    examples = [*_spread(corpus.held_out, options.limit or 10**6), *(e for part in silent.values() for e in part)]
    write(corpus.train, out / "train.jsonl")
    write([e for e in corpus.train if e.meta.get("task") == "asr"], out / "speech.jsonl")
    before = counts_of(checkpoint, examples, out / "before.json")
    found: dict[str, list[Counts]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        made = make_pairs(out, seed, checkpoint, options)
        for name in options.arms:
            steps = 5 if options.quick else ARMS[name].steps
            trained = train_arm(out / f"{name}.{seed}", ARMS[name], made, seed, checkpoint, steps)
            found[name].append(counts_of(trained, examples, out / f"{name}.{seed}.json"))
            show(name, compared(before, found[name]))
    result = {name: compared(before, counts) for name, counts in found.items()}
    settings = {"seeds": options.seeds, "answers": options.answers, "limit": options.limit}
    arms = {name: asdict(ARMS[name]) for name in options.arms}
    figures = {"corpus": options.corpus, "effect": rounded(result), "settings": settings, "arms": arms}
    if options.save:
        save(options.save, figures)
    print(json.dumps(figures))


def write(examples: Sequence[Example], path: Path) -> None:
    lines = (json.dumps(to_record(example, path.parent), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
