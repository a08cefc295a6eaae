"""Named, versioned ways of counting recognition errors, so that a rate says which of them it is.

`reference` is what the scripts of the published model do, quirks included, and the one that published figures belong
beside. `strict` forgives nothing: case, punctuation and spelling count. `open_asr` is the chain of the Open ASR
leaderboard: Whisper's English normaliser alone, and compounds that are written apart or together count as one
(`kaldialign`, the extra `evaluation`); that alone moves a word error rate by some 0.35 points.

A version is raised whenever a change can move a number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER, open_asr, strip_tags, units

Units = Callable[[str, str | None], list[str]]


@dataclass(frozen=True)
class ErrorRateRecipe:
    """How an error rate is made.

    Attributes:
        units: (text, language) -> the words or characters that are compared.
        merge_compounds: adjacent words may be joined to match one word of the other side.
        extra: module that it needs, beyond what is always installed.
    """

    name: str
    version: int
    units: Units
    merge_compounds: bool = False
    extra: str | None = None

    @property
    def stamp(self) -> str:
        """`reference/2`."""
        return f"{self.name}/{self.version}"

    @property
    def installed(self) -> bool:
        return self.extra is None or find_spec(self.extra) is not None


def strict_units(text: str, language: str | None) -> list[str]:
    """Words (in Chinese, Cantonese and Japanese characters) as they are written, Unicode composed, tags taken off."""
    words = unicodedata.normalize("NFC", strip_tags(text)).split()
    return list("".join(words)) if language in PER_CHARACTER else words


def open_asr_units(text: str, language: str | None) -> list[str]:
    """Words (or characters) by the leaderboard's chain."""
    words = open_asr(text, language).split()
    return list("".join(words)) if language in PER_CHARACTER else words


REFERENCE = ErrorRateRecipe("reference", 2, units)  # 2: Chinese by the rules of the published scripts
BESIDE = (
    ErrorRateRecipe("strict", 1, strict_units),
    ErrorRateRecipe("open_asr", 1, open_asr_units, merge_compounds=True, extra="kaldialign"),
)
"""Recipes whose figures stand beside the reference's."""


def counts(
    recipe: ErrorRateRecipe, references: Sequence[str], hypotheses: Sequence[str], language: str | None
) -> tuple[list[int], list[int]]:
    """Edits and reference length per utterance. Only for `merge_compounds`; the others are counted by jiwer."""
    import kaldialign  # an extra

    found = [
        kaldialign.edit_distance(
            recipe.units(reference, language), recipe.units(hypothesis, language), merge_compounds=True
        )
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return [int(one["total"]) for one in found], [int(one["ref_len"]) for one in found]
