"""Answers of several parts: who spoke when, which sounds were heard when, when something was heard, slots and entities.

Every metric is counted per utterance as two whole numbers whose sums divide, so that intervals and comparisons follow
as for error rates. Times are `<start>text<end>` in seconds (`prompts.timestamps`); what cannot be read counts
as absent.

- `slot_f1`: 2 x right / (asked for + answered) over pairs of name and value, both normalised, with their number: the
  exact-match entity F1 of SLURP (Bastianelli et al. 2020, arXiv:2011.13205), not its SLU-F1, which gives
  credit for parts of a value.
- `event_f1`: the same over events, where one is right that has the label of the reference's, starts within 0.2 s of it,
  and ends within 0.2 s or half of its length, whichever is more (Mesaros, Heittola, Virtanen 2016, Applied Sciences
  6(6)). Every event is matched once, as many as can be.
- `span_iou`: mean over the utterances of seconds in both over seconds in either (intersection over union), whatever the
  text in the span is.
- `diarization_error_rate`: (missed + false alarm + wrong speaker) / seconds of speech, each speaker's counted, under
  the one-to-one mapping of the answer's speakers to the reference's with most seconds right (Fiscus et al. 2006, The
  Rich Transcription 2006 evaluation), without a collar, overlap included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from qwen2audio_train.data.prompts.timestamps import spans_in
from qwen2audio_train.evaluation.scoring.normalise import normalise

COLLAR_MS = 200
"""How far the start and the end of an event may be off."""

LENGTH_SHARE = 0.5
"""Or so much of its length its end."""

Count = tuple[int, int]


def slot_counts(reference: str, hypothesis: str, language: str | None = None) -> Count:
    """(2 x right, asked for + answered) of `name: value; name: value`; a part without a colon is a name alone."""
    wanted, said = (_slots(text, language) for text in (reference, hypothesis))
    return 2 * (wanted & said).total(), wanted.total() + said.total()


def event_counts(reference: str, hypothesis: str, language: str | None = None) -> Count:
    """(2 x right, asked for + answered) of events with their times."""
    wanted, said = _timed(reference, language), _timed(hypothesis, language)
    fits = [[j for j, event in enumerate(said) if _is_near(one, event)] for one in wanted]
    taken: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        """Give event i an event of the answer, moving others to other ones (Kuhn's augmenting paths)."""
        for j in fits[i]:
            if j not in seen:
                seen.add(j)
                if j not in taken or place(taken[j], seen):
                    taken[j] = i
                    return True
        return False

    right = sum(place(i, set()) for i in range(len(wanted)))
    return 2 * right, len(wanted) + len(said)


def iou_counts(reference: str, hypothesis: str, language: str | None = None) -> Count:
    """Intersection over union in thousandths, and a thousand; 1 000 where neither has a span."""
    spoken = _pieces([(start, end, side) for side, text in enumerate((reference, hypothesis))
                      for start, end, _ in _timed(text, language)])  # fmt: skip
    either = sum(ms for ms, _ in spoken)
    both = sum(ms for ms, sides in spoken if len(sides) == 2)
    return (round(1000 * both / either) if either else 1000), 1000


def diarization_counts(reference: str, hypothesis: str, language: str | None = None) -> Count:
    """(milliseconds in error, milliseconds of speech)."""
    turns = [(start, end, (side, who)) for side, text in enumerate((reference, hypothesis))
             for start, end, who in _timed(text, language)]  # fmt: skip
    error = speech = 0
    together: Counter[tuple[str, str]] = Counter()
    for ms, voices in _pieces(turns):
        ours, theirs = ([who for side, who in voices if side == wanted] for wanted in (0, 1))
        speech += ms * len(ours)
        error += ms * max(len(ours), len(theirs))
        for pair in ((a, b) for a in ours for b in theirs):
            together[pair] += ms
    return error - _best_mapping(together), speech


def _best_mapping(together: Counter[tuple[str, str]]) -> int:
    """Greatest sum of `together` over pairs (a, b) in which no a and no b occurs twice.

    Exact, over all subsets of the reference's speakers: their number is at most a dozen or so in one recording.
    """
    ours, theirs = (sorted({pair[side] for pair in together}) for side in (0, 1))

    @cache
    def best(number: int, free: frozenset[str]) -> int:
        if number == len(theirs):
            return 0
        pairs = [(a, theirs[number]) for a in free]
        return max([best(number + 1, free), *(together[p] + best(number + 1, free - {p[0]}) for p in pairs)])

    return best(0, frozenset(ours))


def _pieces(turns: Sequence[tuple[int, int, Any]]) -> list[tuple[int, frozenset[Any]]]:
    """Milliseconds between neighbouring borders of the turns, and the voices that are heard there."""
    borders = sorted({border for start, end, _ in turns for border in (start, end)})
    return [
        (stop - begin, voices)
        for begin, stop in pairwise(borders)
        if (voices := frozenset(voice for start, end, voice in turns if start <= begin and stop <= end))
    ]


def _timed(text: str, language: str | None) -> list[tuple[int, int, str]]:
    """Start and end in milliseconds, and label of every span that lasts."""
    return [
        (round(1000 * span.start_s), round(1000 * span.end_s), normalise(span.text, language))
        for span in spans_in(text)
        if span.end_s > span.start_s
    ]


def _is_near(wanted: tuple[int, int, str], said: tuple[int, int, str]) -> bool:
    margin = max(COLLAR_MS, LENGTH_SHARE * (wanted[1] - wanted[0]))
    return wanted[2] == said[2] and abs(wanted[0] - said[0]) <= COLLAR_MS and abs(wanted[1] - said[1]) <= margin


def _slots(text: str, language: str | None) -> Counter[tuple[str, str]]:
    parts = [part.partition(":") for part in text.split(";") if part.strip()]
    return Counter((normalise(name, language), normalise(value, language)) for name, _, value in parts)


COUNTS: Mapping[str, Callable[[str, str, str | None], Count]] = {
    "slot_f1": slot_counts,
    "event_f1": event_counts,
    "span_iou": iou_counts,
    "diarization_error_rate": diarization_counts,
}
"""By the metric's name: reference, answer and language -> what is counted of the utterance."""
