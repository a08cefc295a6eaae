"""The other side of scoring_agreement.py: scores by installed packages alone. Reads JSON, writes JSON."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import editdistance
import jiwer
import kaldialign
from sacrebleu import corpus_bleu
from sklearn.metrics import accuracy_score
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

PACKAGES = (
    "jiwer",
    "sacrebleu",
    "scikit-learn",
    "whisper-normalizer",
    "kaldialign",
    "lmms-eval",
    "editdistance",
    "zhconv",
)
CHARACTERS = {"zh", "yue", "ja"}
BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab"}


def lmms_tasks() -> tuple[Any, Any, Any]:
    """lmms-eval's LibriSpeech and MMAU and what its ASR tasks share, without their __init__, which needs torch."""
    spec: Any = find_spec("lmms_eval")
    root = Path(spec.submodule_search_locations[0])
    for package, folder in (("lmms_eval", root), ("lmms_eval.tasks", root / "tasks")):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    sys.modules["lmms_eval.tasks._task_utils.file_utils"] = types.ModuleType("file_utils")  # writes submissions
    vars(sys.modules["lmms_eval.tasks._task_utils.file_utils"])["generate_submission_file"] = None
    asr, shared, mmau = (
        import_module(f"lmms_eval.tasks.{name}") for name in ("librispeech.utils", "asr_wer_utils", "mmau.utils")
    )
    return asr, shared, mmau


def words(asr: Any, shared: Any, text: str, language: str) -> list[str]:
    """lmms-eval's chain for one text, as in its compute_wer; Japanese by the character, which it leaves in words."""
    plain = shared._normalize(
        asr.remove_sp(text, language),
        language,
        yue_languages={"yue"},
        english_languages={"en"},
        chinese_languages={"zh"},
        yue_converter=shared.zhconv_convert,
        english_normalizer=asr.english_normalizer,
        chinese_normalizer=asr.chinese_normalizer,
        basic_normalizer=asr.basic_normalizer,
    )
    tokenizer = shared.EvaluationTokenizer("none", lowercase=True, punctuation_removal=True)
    found = tokenizer.tokenize(plain).split()
    return list("".join(found)) if language in CHARACTERS else found


def strict(shared: Any, text: str, language: str) -> list[str]:
    """Words as they are written."""
    found = shared.remove_sp(text, language).split()
    return list("".join(found)) if language in CHARACTERS else found


def leaderboard(shared: Any, text: str, language: str) -> list[str]:
    """Whisper's normaliser alone."""
    chain = EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()
    found = chain(shared.remove_sp(text, language)).split()
    return list("".join(found)) if language in CHARACTERS else found


def edits(reference: list[str], hypothesis: list[str]) -> list[int]:
    """Edits by editdistance, which jiwer has to confirm, and the length of the reference."""
    found = editdistance.eval(reference, hypothesis)
    if reference:
        output = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        assert found == output.substitutions + output.deletions + output.insertions, (reference, hypothesis)
    return [found, len(reference)]


def merged(reference: list[str], hypothesis: list[str]) -> list[int]:
    found = kaldialign.edit_distance(reference, hypothesis, merge_compounds=True)
    return [int(found["total"]), int(found["ref_len"])]


def letters(mmau: Any, text: str) -> list[str]:
    """The letters that MMAU's parser reads from an answer, by 20 seeds: several where it guesses at random."""
    found = set()
    for seed in range(20):
        random.seed(seed)
        found.add(mmau.parse_multi_choice_response(text, list("ABCD")))
    return sorted(found)


def bleus(groups: list[Any]) -> Iterator[float]:
    for language, references, hypotheses in groups:
        yield corpus_bleu(hypotheses, [references], tokenize=BLEU_TOKENIZERS.get(language, "13a")).score


def main() -> None:
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        asr, shared, mmau = lmms_tasks()
        both = [[words(asr, shared, text, language) for text in texts] for language, *texts in asked["pairs"]]
        written = [[strict(shared, text, language) for text in texts] for language, *texts in asked["pairs"]]
        joined = [[leaderboard(shared, text, language) for text in texts] for language, *texts in asked["pairs"]]
        found = {
            "words": both,
            "reference": [edits(*texts) for texts in both],
            "strict": [edits(*texts) for texts in written],
            "open_asr": [merged(*texts) for texts in joined],
            "bleu": list(bleus(asked["groups"])),
            "exact": [
                # The scripts leave a blank before a reference, which no answer can then match; both sides lose it here.
                float(accuracy_score([text.lstrip() for text in references], [text.lstrip() for text in hypotheses]))
                for _, references, hypotheses in asked["groups"]
            ],
            "letters": [letters(mmau, text) for text in asked["answers"]],
            "versions": {name: version(name) for name in PACKAGES},
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
