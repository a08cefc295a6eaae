"""Chat and preference lines: voice chat, written questions about clips, commands inside sound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qwen2audio_train.selfmade.draw import balanced, generator
from qwen2audio_train.selfmade.grammar import load_yaml
from qwen2audio_train.selfmade.pieces import SPOKEN, Piece
from qwen2audio_train.selfmade.tasks import (
    QUESTION_KINDS,
    SENTENCES,
    Line,
    Pools,
    candidates,
    written_question,
)
from qwen2audio_train.selfmade.utterances import FACTS, OPEN

TWO_CLIPS = ("which_sound", "which_gender", "same_language")
NOBODY_ASKED, NOBODY_ANSWER = "What does the speaker say?", "nothing was said."
PLAIN_ASKED = "Write a sentence."
Turn = tuple[tuple[Piece, ...], str, str]
"""Clips of a user turn, its written question ("" in voice chat) and the answer."""


def _messages(turns: Sequence[Turn], durations: Any, *, answered: bool) -> list[dict[str, Any]]:
    """Turns as messages; the last answer is left out unless `answered`."""
    messages: list[dict[str, Any]] = []
    for clips, question, answer in turns:
        parts: list[dict[str, Any]] = [
            {"type": "audio", "audio": clip.file, "duration_s": durations[clip.id]} for clip in clips
        ]
        if question:
            parts.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
    return messages if answered else messages[:-1]


def _chat_line(name: str, source: str, mode: str, kind: str, turns: Sequence[Turn], durations: object) -> Line:
    clips = [clip for turn in turns for clip in turn[0]]
    return {
        "id": name,
        "messages": _messages(turns, durations, answered=True),
        "source": source,
        "mode": mode,
        "meta": {"kind": kind, "turns": len(turns), "clips": len(clips), "said": [clip.text for clip in clips]},
    }


def spoken_questions(pools: Pools) -> list[Piece]:
    """Clips that ask a question or give a command, without other sound."""
    return [piece for piece in pools.pieces["speech"] if piece.answer and piece.origin not in SENTENCES]


def _one_clip(kind: str, count: int, pools: Pools, rng: np.random.Generator) -> list[Turn]:
    """Turns about one clip each, every answer as often as the others."""
    chosen = balanced(candidates(kind, pools), lambda c: c[1], count, rng)
    return [((piece,), written_question(kind, rng), answer) for piece, answer in chosen]


def _two_clips(kind: str, count: int, pools: Pools, rng: np.random.Generator) -> list[Turn]:
    """Turns about two clips each; both answers equally often."""
    answers = load_yaml("dialogues")["analysis"][kind]["answer"]
    if kind == "which_sound":
        pool, value = list(pools.pieces["sound"]), lambda piece: piece.label
    elif kind == "which_gender":
        pool, value = pools.speech(), lambda piece: {"male": "man", "female": "woman"}[piece.gender]
    else:
        pool, value = pools.speech(), lambda piece: piece.language
    groups: dict[str, list[Piece]] = {}
    for piece in pool:
        groups.setdefault(value(piece), []).append(piece)
    turns: list[Turn] = []
    for i in range(count):
        same = kind == "same_language" and i % 2 == 0
        one, two = rng.choice(sorted(groups), 2, replace=False)
        names = (one, one) if same else (one, two)
        clips = tuple(groups[name][rng.integers(len(groups[name]))] for name in names)
        answer = ("yes" if same else "no") if kind == "same_language" else ("first" if i % 2 == 0 else "second")
        turns.append((clips, written_question(kind, rng, x=names[i % 2]), answers[answer]))
    return turns


def _two_turns(count: int, pools: Pools, rng: np.random.Generator) -> list[list[Turn]]:
    """A question about a clip, then a second one about the same clip, without hearing it again."""
    turns = [turn for kind in FACTS for turn in _one_clip(kind, count, pools, rng)]
    answers = load_yaml("dialogues")["analysis"]["gender"]["answer"]
    dialogues = []
    for index in rng.permutation(len(turns))[:count]:
        clips, question, answer = turns[index]
        first: Turn = (clips, written_question("gender", rng), answers[clips[0].gender])
        dialogues.append([first, ((), question, answer)])
    return dialogues


def chat_lines(pools: Pools, voice_chat: int, analysis: int, commands: bool, seed: int, split: str) -> list[Line]:
    """SFT lines: `voice_chat` and `analysis` many (a tenth of each in several turns), and all commands inside sound."""
    rng, durations, lines = generator(seed, "chat", split), pools.durations, []
    train = split == "train"
    # held out, every kind of question comes as often as the others
    asked = balanced(spoken_questions(pools), lambda piece: "" if train else piece.origin, 2 * voice_chat, rng)
    for i in range(voice_chat):
        turns: list[Turn] = [((asked[i],), "", asked[i].answer)]
        if i % 10 == 0:
            before = asked[voice_chat + i]
            turns.insert(0, ((before,), "", before.answer))
        lines.append(_chat_line(f"voice_chat/{i:05d}", "voice_chat", "voice_chat", asked[i].origin, turns, durations))
    one_clip, weight = (*QUESTION_KINDS, "transcript"), 2 if train else 1  # to compare is harder to learn
    each = -(-analysis // (len(one_clip) + weight * len(TWO_CLIPS) + 1))
    found = [(kind, [turn]) for kind in one_clip for turn in _one_clip(kind, each, pools, rng)]
    found += [(kind, [turn]) for kind in TWO_CLIPS for turn in _two_clips(kind, weight * each, pools, rng)]
    found += [("two_turns", turns) for turns in _two_turns(each, pools, rng)]
    for i, index in enumerate(rng.permutation(len(found))[:analysis]):
        kind, turns = found[index]
        lines.append(_chat_line(f"analysis/{i:05d}", "analysis", "analysis", kind, turns, durations))
    return lines + (command_lines(pools) if commands else [])


def quiet_lines(pools: Pools) -> list[Line]:
    """Clips in which nobody speaks, in turn as voice chat and with the written question what is said."""
    lines = []
    for i, piece in enumerate(pools.pieces["quiet"]):
        mode, question = ("voice_chat", "") if i // 2 % 2 else ("analysis", NOBODY_ASKED)
        turns: list[Turn] = [((piece,), question, NOBODY_ANSWER)]
        line = _chat_line(f"quiet/{i:05d}", "quiet", mode, piece.label, turns, pools.durations)
        line["meta"] |= {"no_speech": True}
        lines.append(line)
    return lines


def text_lines(pools: Pools) -> list[Line]:
    """What the language model knew before it heard anything, without audio: its own answers, and plain sentences."""
    lines: list[Line] = []
    for piece in pools.pieces["speech"]:
        if SPOKEN in piece.facts:
            asked = piece.origin == OPEN
            source, prompt = ("text_chat", piece.facts[SPOKEN]) if asked else ("plain_text", PLAIN_ASKED)
            turns: list[Turn] = [((), prompt, piece.answer if asked else piece.facts[SPOKEN])]
            lines.append(_chat_line(f"{source}/{piece.id}", source, "analysis", source, turns, pools.durations))
    return lines


def command_lines(pools: Pools) -> list[Line]:
    """Spoken commands inside other sound, as voice chat."""
    return [
        _chat_line(
            piece.id.split("/", 1)[1],
            "command",
            "voice_chat",
            piece.origin,
            [((piece,), "", piece.answer)],
            pools.durations,
        )
        for piece in pools.pieces["command"]
    ]


def _by_answer(pool: Sequence[tuple[Piece, str]]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece, answer in pool:
        groups.setdefault(answer, []).append(piece)
    return groups


def _alike(answers: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of answers that hardly differ in length."""
    names = sorted(answers)
    return [
        (one, two)
        for one in names
        for two in names
        if one != two and len(one.split()) == len(two.split()) and abs(len(one) - len(two)) <= 3
    ]


def preference_lines(pools: Pools, couples: int, seed: int, split: str) -> list[Line]:
    """Pairs that only the audio decides: two prompts that read the same swap their answers.

    Every couple gives two lines, (audio 1: answer 1 over answer 2) and (audio 2: answer 2 over answer 1), so that over
    the corpus each answer is chosen as often as it is rejected, whatever the words of the prompt.
    """
    rng, lines = generator(seed, "pairs", split), []
    asked: dict[str, list[tuple[Piece, str]]] = {}
    for piece in [*spoken_questions(pools), *pools.pieces["command"]]:
        inside = "inside_" if piece.kind == "command" else ""
        asked.setdefault(inside + piece.origin, []).append((piece, piece.answer))
    choices = [("voice_chat", kind, pool) for kind, pool in asked.items()]
    choices += [("analysis", kind, candidates(kind, pools)) for kind in QUESTION_KINDS]
    grouped = [(mode, kind, _by_answer(pool)) for mode, kind, pool in choices]
    usable = [(mode, kind, groups, alike) for mode, kind, groups in grouped if (alike := _alike(groups))]
    for i in range(couples):
        mode, kind, groups, alike = usable[i % len(usable)]
        answers = alike[rng.integers(len(alike))]
        one, two = ((groups[answer][rng.integers(len(groups[answer]))], answer) for answer in answers)
        question = written_question(kind, rng) if mode == "analysis" else ""
        for number, ((piece, chosen), (_, rejected)) in enumerate(((one, two), (two, one))):
            turns: list[Turn] = [((piece,), question, chosen)]
            lines.append(
                {
                    "id": f"pair/{i:05d}/{number}",
                    "prompt": _messages(turns, pools.durations, answered=False),
                    "chosen": chosen,
                    "rejected": rejected,
                    "source": "dpo",
                    "meta": {"kind": kind, "mode": mode},
                }
            )
    return lines
