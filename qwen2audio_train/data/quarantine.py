"""Bad examples: whose fault an error is, what was wrong with each, and when there are too many of them."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from qwen2audio_train.errors import ExampleError, UserError, writable

PLACE = re.compile(r"^.*?:\d+: ")
"""Where in which file, at the start of an error."""


class TooManyBadExamples(UserError):
    """More examples than the limit allows could not be used."""


@dataclass(frozen=True)
class BadExample:
    """One example that was left out: its id (or its place), its source, and why; `line` where it is known."""

    example: str
    kind: str
    reason: str
    source: str = ""
    line: int = 0

    @staticmethod
    def of(error: BaseException, example: str, source: str = "", line: int = 0) -> BadExample:
        reason = writable(str(error) or repr(error))
        return BadExample(writable(example), type(error).__name__, reason, source, line)


@dataclass
class Suspect:
    """The example that is worked on: its place, and its id as soon as that is known."""

    example: str


@contextmanager
def costing_one_example(bad: list[BadExample], example: str, source: str = "", line: int = 0) -> Iterator[Suspect]:
    """Work on one example. An error that speaks of it (`ExampleError`, or `OSError` on its bytes) goes to `bad`.

    Any other error is a fault of the program, which would cost example after example in silence: it goes on, with the
    example's id as a note at the end of its traceback.
    """
    suspect = Suspect(example)
    try:
        yield suspect
    except (ExampleError, OSError) as error:
        bad.append(BadExample.of(error, suspect.example, source, line))
    except Exception as error:
        error.add_note(f'raised while example "{suspect.example}" of source "{source}" was worked on')
        raise


class Quarantine:
    """Counts good and bad examples, keeps the list of the bad ones in a JSONL file, and stops at the limit.

    Args:
        path: the list, one object per line, appended to; None keeps none.
        max_bad: most bad examples; None = no such bound.
        max_share: most bad examples as a share of those seen, judged from `judge_from` examples on: of fewer, a single
            one would be more than the usual share of 0.01.
        shown: say on the screen how many are lost and why, at the first and each time their number has doubled.
    """

    def __init__(
        self, path: Path | None, max_bad: int | None, max_share: float, *, judge_from: int = 100, shown: bool = False
    ):
        self.path, self.max_bad, self.max_share, self.judge_from = path, max_bad, max_share, judge_from
        self.num_seen = 0
        self.num_bad = 0
        self._kinds: Counter[str] = Counter()
        self._last: list[BadExample] = []
        self._say_at = 1.0 if shown else float("inf")

    def add(self, seen: int, bad: list[BadExample]) -> None:
        """Count `seen` more examples, of which `bad` could not be used. Raises TooManyBadExamples at the limit."""
        self.num_seen += seen
        self.num_bad += len(bad)
        if not bad:
            return
        self._kinds.update(item.kind for item in bad)
        self._last = (self._last + bad)[-5:]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in bad)
        if self.num_bad >= self._say_at:
            self._say_at = 2.0 * self.num_bad
            tqdm.write(self._so_far(), file=sys.stderr)
        self._check()

    def _so_far(self) -> str:
        kind, count = self._kinds.most_common(1)[0]
        last = self._last[-1]
        listed = f"; the list is {self.path}" if self.path is not None else ""
        return (
            f"data: {self.num_bad} of {self.num_seen} examples could not be used so far, {count} of them for {kind}; "
            f"the last: {last.example}: {last.reason}{listed}"
        )

    def _check(self) -> None:
        over_share = self.num_seen >= self.judge_from and self.num_bad > self.max_share * self.num_seen
        over_count = self.max_bad is not None and self.num_bad > self.max_bad
        if not (over_share or over_count):
            return
        limit = f"max_bad_examples={self.max_bad}" if over_count else f"max_bad_share={self.max_share:g}"
        listed = f"; all are listed in {self.path}" if self.path is not None else ""
        last = "".join(f"\n  {item.example}: {item.kind}: {item.reason}" for item in self._last)
        raise TooManyBadExamples(
            f"{self.num_bad} of {self.num_seen} examples could not be used, more than data.{limit} allows{listed}. "
            f"Mend or remove them (launch/data.py check finds them all), or raise the limit. The last ones:{last}"
        )


def count_reasons(reasons: Iterable[str], most: int = 3) -> str:
    """The commonest of some reasons with their numbers, in words; places (file:line:) are left out."""
    counts = Counter(PLACE.sub("", reason) for reason in reasons).most_common()
    shown = "; ".join(f"{count} x {reason}" for reason, count in counts[:most])
    rest = sum(count for _, count in counts[most:])
    return f"{shown}; and {rest} for other reasons" if rest else shown
