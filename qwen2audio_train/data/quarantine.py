"""Bad examples: what was wrong with each, and when there are too many of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen2audio_train.errors import UserError


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
        return BadExample(example, type(error).__name__, str(error) or repr(error), source, line)


class Quarantine:
    """Counts good and bad examples, keeps the list of the bad ones in a JSONL file, and stops at the limit.

    Args:
        path: the list, one object per line, appended to; None keeps none.
        max_bad: most bad examples; None = no such bound.
        max_share: most bad examples as a share of those seen, judged from `judge_from` examples on.
    """

    def __init__(self, path: Path | None, max_bad: int | None, max_share: float, judge_from: int = 1000):
        self.path, self.max_bad, self.max_share, self.judge_from = path, max_bad, max_share, judge_from
        self.num_seen = 0
        self.num_bad = 0
        self.per_source: dict[str, int] = {}
        self._last: list[BadExample] = []

    def add(self, seen: int, bad: list[BadExample]) -> None:
        """Count `seen` more examples, of which `bad` could not be used. Raises TooManyBadExamples at the limit."""
        self.num_seen += seen
        self.num_bad += len(bad)
        for item in bad:
            self.per_source[item.source] = self.per_source.get(item.source, 0) + 1
        if not bad:
            return
        self._last = (self._last + bad)[-5:]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in bad)
        self._check()

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


def merge_lists(paths: list[Path], into: Path) -> int:
    """Put the ranks' lists of bad examples together, without repetitions; returns how many there are."""
    lines = dict.fromkeys(line for path in paths if path.exists() for line in path.read_text("utf-8").splitlines())
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)
