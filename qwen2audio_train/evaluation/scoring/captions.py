"""Caption metrics of the COCO evaluation server (arXiv:1504.00325) by pycocoevalcap, which the published scripts use.

CIDEr-D (the library calls it CIDEr), ROUGE-L and BLEU-4; METEOR where there is Java. SPICE (arXiv:1607.08822) and
SPIDEr, its mean with CIDEr-D, need the jars of a parser beside the library's, which it would download: without them
their rows have no value, and a note says why. Captions are tokenised by the Stanford tokenizer that comes with the
library, a Java program; without Java they are put into lower case and split at what is neither a letter, a digit, an
apostrophe nor a hyphen, and the stamp says so.

n captions, each with one or more references.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.scoring.bootstrap import Score, mean_score

JAVA = "java"
PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What SPICE needs in the folder spice/lib of pycocoevalcap."""

NO_SPICE = (
    f"SPICE and SPIDEr were not computed: they need Java, and {' and '.join(PARSER)} "
    "(nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip) in the folder spice/lib of pycocoevalcap"
)
NAN = float("nan")
Tokenised = dict[int, list[str]]


def stamp() -> str:
    """Name and version of the chain that this machine has: `coco/1`, or without Java `coco_plain/1`."""
    return "coco/1" if shutil.which(JAVA) else "coco_plain/1"


def caption_scores(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, samples: int = 1000, seed: int = 0
) -> list[Score]:
    """CIDEr-D first, then ROUGE-L, BLEU-4, SPICE, SPIDEr and, where there is Java, METEOR.

    SPICE and SPIDEr are NaN where they cannot be computed. The intervals are those of means over captions, given the
    document frequencies of all references; BLEU-4 is the corpus's and has none.

    Raises:
        MissingLibraryError: pycocoevalcap is not installed.
    """
    wanted, said = _tokenised(references), _tokenised([[text] for text in hypotheses])
    _, cider = _library("cider.cider").Cider().compute_score(wanted, said)
    _, rouge = _library("rouge.rouge").Rouge().compute_score(wanted, said)
    bleu, _ = _library("bleu.bleu").Bleu(4).compute_score(wanted, said, verbose=0)
    found = [
        mean_score("cider_d", cider, samples=samples, seed=seed),
        mean_score("rouge_l", rouge, samples=samples, seed=seed),
        Score("bleu_4", float(bleu[3]), NAN, NAN, len(hypotheses)),
    ]
    if has_spice():
        spice = _spice(wanted, said)
        found += [
            mean_score(name, values, samples=samples, seed=seed)
            for name, values in (("spice", spice), ("spider", (spice + np.asarray(cider)) / 2))
        ]
    else:
        found += [Score(name, NAN, NAN, NAN, len(hypotheses)) for name in ("spice", "spider")]
    if shutil.which(JAVA):
        found.append(mean_score("meteor", _meteor(wanted, said), samples=samples, seed=seed))
    return found


def has_spice() -> bool:
    """Whether SPICE can be computed here."""
    found = find_spec("pycocoevalcap")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    return bool(shutil.which(JAVA)) and any(
        all(Path(folder, "spice", "lib", jar).is_file() for jar in PARSER) for folder in folders
    )


def _spice(wanted: Tokenised, said: Tokenised) -> np.ndarray:
    """F-score of every caption's scene graph, (n,)."""
    _, found = _library("spice.spice").Spice().compute_score(wanted, said)
    return np.array([one["All"]["f"] for one in found])


def _library(name: str) -> Any:
    """A module of pycocoevalcap."""
    try:
        return import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError:
        raise MissingLibraryError(
            "captions are scored by the library pycocoevalcap, which is not installed: "
            "pip install 'qwen2audio-train[evaluation]'"
        ) from None


def _tokenised(texts: Sequence[Sequence[str]]) -> Tokenised:
    lines = [" ".join(text.split()) for group in texts for text in group]
    words = iter(_stanford(lines) if shutil.which(JAVA) else map(_plain, lines))
    return {index: [next(words) for _ in group] for index, group in enumerate(texts)}


def _plain(line: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", line.lower()))


def _stanford(lines: Sequence[str]) -> list[str]:
    """Every line by the Stanford tokenizer, without the punctuation that the COCO server leaves out."""
    module = _library("tokenizer.ptbtokenizer")
    jar = Path(module.__file__).with_name(module.STANFORD_CORENLP_3_4_1_JAR)
    command = [JAVA, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, check=True, encoding="utf-8")
    found = done.stdout.split("\n")[: len(lines)]
    return [" ".join(word for word in line.split() if word not in module.PUNCTUATIONS) for line in found]


def _meteor(wanted: Tokenised, said: Tokenised) -> np.ndarray:
    scorer = _library("meteor.meteor").Meteor()
    try:
        return np.asarray(scorer.compute_score(wanted, said)[1])
    finally:
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            pipe.close()
