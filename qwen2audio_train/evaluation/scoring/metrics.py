"""Error rates, BLEU, accuracy, and the metrics that ask what kind of mistake it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.scoring.benchmarks import LETTERS
from qwen2audio_train.evaluation.scoring.bootstrap import Counts, Score, proportion, ratio_score, resampled_score
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER, normalise, units
from qwen2audio_train.evaluation.scoring.recipes import REFERENCE, ErrorRateRecipe, Units, counts


def edit_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str | None],
    recipe: ErrorRateRecipe = REFERENCE,
) -> tuple[list[int], list[int]]:
    """Edits and reference length per utterance, in the units of the recipe and of each language."""
    if recipe.merge_compounds:
        return counts(recipe, references, hypotheses, languages[0] if languages else None)
    aligned = _align(references, hypotheses, languages, recipe.units)
    edits = [sum(_length(chunk) for chunk in chunks if chunk.type != "equal") for _, chunks in aligned]
    return edits, [len(words) for words, _ in aligned]


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    language: str | None,
    *,
    recipe: ErrorRateRecipe = REFERENCE,
    samples: int = 1000,
    seed: int = 0,
) -> Score:
    """Word error rate, or the character error rate in languages written without spaces, over the corpus."""
    edits, lengths = edit_counts(references, hypotheses, [language] * len(references), recipe)
    metric = "cer" if language in PER_CHARACTER else "wer"
    empty = sum(not text.strip() for text in hypotheses)
    return ratio_score(metric, edits, lengths, samples=samples, seed=seed, extra={"empty_hypotheses": float(empty)})


def unseen_word_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    language: str | None,
    unseen: Sequence[Collection[str]],
) -> tuple[list[int], list[int]]:
    """Per utterance: how many of its unseen words were not recognised, and how many it has.

    `unseen` holds normalised words per utterance. Insertions belong to no reference word and are not counted, so this
    rate is not above the word error rate of these words.
    """
    aligned = _align(references, hypotheses, [language] * len(references))
    missed, present = [], []
    for (words, chunks), wanted in zip(aligned, unseen, strict=True):
        hit = [chunk.type == "equal" for chunk in chunks for _ in range(chunk.ref_end_idx - chunk.ref_start_idx)]
        hits = [ok for ok, word in zip(hit, words, strict=True) if word in wanted]
        present.append(len(hits))
        missed.append(len(hits) - sum(hits))
    return missed, present


def bleu(
    references: Sequence[str],
    hypotheses: Sequence[str],
    target_language: str | None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Score:
    """Corpus BLEU by sacrebleu, without normalisation, with the tokenizer of the published tables.

    Raises:
        MissingLibraryError: the target is Japanese, and MeCab is not installed.
    """
    tokenizer = {"zh": "zh", "yue": "zh", "ja": "ja-mecab"}.get(target_language or "", "13a")
    per_sentence = _bleu_metric(tokenizer)
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        score = per_sentence.sentence_score(hypothesis, [reference])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 10)

    def corpus(sums: Counts) -> float:
        hyp_len, ref_len, *ngrams = (int(x) for x in sums)
        return float(BLEU.compute_bleu(ngrams[:4], ngrams[4:], hyp_len, ref_len, smooth_method="exp").score)

    return resampled_score("bleu", table, corpus, samples=samples, seed=seed)


def chrf(references: Sequence[str], hypotheses: Sequence[str], *, samples: int = 1000, seed: int = 0) -> Score:
    """Corpus chrF2 (characters up to 6-grams, beta 2; Popović 2015) by sacrebleu, without normalisation."""
    metric = CHRF()
    table = np.asarray(metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=np.int64)

    def corpus(sums: Counts) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return resampled_score("chrf", table.reshape(len(references), -1), corpus, samples=samples, seed=seed)


def accuracy(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    language: str | None = None,
    exact: bool = False,
    choices: Sequence[Sequence[str]] | None = None,
    majority: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Score:
    """Share of answers that are right, beside what guessing would get.

    Args:
        exact: the string after `lstrip` must be the reference's, as the reference scripts have it; otherwise
            both are normalised first.
        choices: possible answers per utterance; absent, the references that occur.
        majority: the answer, per utterance, that a model which ignores the audio would give (the most frequent one of
            the training set, say); absent, the most frequent reference here.
    """
    right = is_right(references, hypotheses, language=language, exact=exact)
    keys = [_key(reference, language, exact) for reference in references]
    sizes = [len(set(c)) for c in choices] if choices else [len(set(keys))] * len(keys)
    if majority is None:
        majority = [Counter(keys).most_common(1)[0][0]] * len(keys) if keys else []
    constant = is_right(references, majority, language=language, exact=exact)
    extra = {
        "chance": float(np.mean([1 / size for size in sizes])) if sizes else float("nan"),
        "majority": float(np.mean(constant)) if len(constant) else float("nan"),
    }
    return proportion("accuracy", right, samples=samples, seed=seed, extra=extra)


def is_right(
    references: Sequence[str], hypotheses: Sequence[str], *, language: str | None = None, exact: bool = False
) -> list[int]:
    """1 where the answer is the reference, else 0; see `accuracy` for `exact`."""
    pairs = zip(references, hypotheses, strict=True)
    return [int(_key(wanted, language, exact) == _key(said, language, exact)) for wanted, said in pairs]


def chosen_option(hypothesis: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names by MMAU's string match; None where it names none, or two of the same words.

    An option is named when every word of it occurs, and no word that only other options have. So it agrees with the
    benchmark's own scoring on which answers are right, and tells a wrong option from no option besides.
    """
    said, words = _words(hypothesis), [_words(choice) for choice in choices]
    named = [
        choice
        for choice, own in zip(choices, words, strict=True)
        if own and own <= said and not said & set().union(*(other - own for other in words))
    ]
    return named[0] if len({frozenset(_words(choice)) for choice in named}) == 1 else None


def chosen_letter(hypothesis: str, count: int = 4) -> str | None:
    """The option, one of the first `count` letters, that an answer such as `B`, `(B) rain` or `I think it is B` names.

    None where it names none, or several without beginning with one: `B or C`.
    """
    letters = LETTERS[:count]
    first = re.match(rf"\W*([{letters}])(?:\W*$|[.):,])", hypothesis)
    named = {first[1]} if first else set(re.findall(rf"\b([{letters}])\b(?!')", hypothesis))
    return named.pop() if len(named) == 1 else None


def wrote_words(references: Sequence[str], hypotheses: Sequence[str], language: str | None) -> list[int]:
    """1 where the answer to a recording without speech has words: it is neither empty nor what was to be said."""
    return [
        int(normalise(said, language) not in ("", normalise(wanted, language)))
        for wanted, said in zip(references, hypotheses, strict=True)
    ]


def confused(hypothesis: str, own: str, other: str, language: str | None) -> bool:
    """Whether `hypothesis` is nearer (in word error rate) to what the other mode would have said than to `own`."""
    edits, lengths = edit_counts([own, other], [hypothesis] * 2, [language] * 2)
    rates = [edit / max(1, length) for edit, length in zip(edits, lengths, strict=True)]
    return rates[1] < rates[0]


def _key(text: str, language: str | None, exact: bool) -> str:
    return text.lstrip() if exact else normalise(text, language)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def _align(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str | None], units: Units = units
) -> list[tuple[list[str], list[jiwer.AlignmentChunk]]]:
    """Per utterance the reference's units and how the hypothesis follows them."""
    if not references:
        return []
    reference, hypothesis = (
        [" ".join(units(text, language)) for text, language in zip(texts, languages, strict=True)]
        for texts in (references, hypotheses)
    )
    output = jiwer.process_words(reference, hypothesis)
    return list(zip(output.references, output.alignments, strict=True))


def _length(chunk: jiwer.AlignmentChunk) -> int:
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def _bleu_metric(tokenizer: str) -> BLEU:
    try:
        return BLEU(tokenize=tokenizer, effective_order=True)
    except RuntimeError as error:
        raise MissingLibraryError(f"sacrebleu cannot tokenise with {tokenizer}: pip install 'sacrebleu[ja]'") from error
