"""docs/benchmarks.md, from benchmarks.yaml: what is measured how, and with which published number it can be compared.

python -m qwen2audio_train.evaluation.reporting.benchmarks_page > docs/benchmarks.md
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.prompts.render import Text, render
from qwen2audio_train.evaluation.scoring.benchmarks import Benchmark, Metric, benchmarks
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER
from qwen2audio_train.evaluation.scoring.score import STAMPS
from qwen2audio_train.evaluation.scoring.table import NAMES

HOW: dict[Metric, str] = {
    "error_rate": "edits over reference length, corpus-level, after the normaliser of the language (normalise.py)",
    "bleu": "corpus BLEU by sacrebleu, no normalisation; tokenizer zh, ja-mecab or 13a by target language",
    "accuracy": "normalised answer equal to the normalised label",
    "exact_accuracy": "answer equal to the label, blanks before it aside",
    "choice": "the answer names every word of one option and no word that only others have (MMAU's match)",
    "letter": "the one letter that the answer names; none or several are wrong and counted",
    "judge": "mean of a judge's scores in both orders (launch/evaluate.py judge)",
    "hallucination": "share of recordings without speech that are answered with words",
    "captions": "CIDEr-D against all captions of a clip, by pycocoevalcap; ROUGE-L, BLEU-4, METEOR, SPICE, SPIDEr too",
    "map": "mean average precision over the classes, named classes as 1, others as 0",
    "slot_f1": "F1 over pairs of name and value, both normalised, over the corpus (SLURP's entity F1)",
    "event_f1": "F1 over events with the right label, start within 0.2 s, end within 0.2 s or half of the length",
    "span_iou": "mean over the recordings of seconds in both over seconds in either",
    "diarization_error_rate": "missed, false and wrongly attributed seconds of speech over those there are; no collar",
    "timestamps": "AAS: shifts of start and end added, in ms, over the words that both texts have",
}

UNCHECKED = "roughly: their normaliser and prompt were not compared with ours"

WHO = {
    "paper": ("Qwen2-Audio technical report, arXiv:2407.10759", "yes: same chain and prompt"),
    "converted": ("README of QwenLM/Qwen2-Audio, for the converted checkpoint", "yes: same chain, prompt and weights"),
    "qwen_audio": ("Qwen-Audio report, arXiv:2311.07919", "same chain; asked by its own tags, another model"),
    "lmms_eval_base": (
        "the base model by lmms-eval",
        "same chain (see scoring_agreement.py); prompt of its own",
    ),
    "ultraeval_audio_base": ("the base model by UltraEval-Audio", UNCHECKED),
    "ultraeval_audio_instruct": ("the instruct model by UltraEval-Audio", UNCHECKED),
    "kimi_evalkit_base": ("the base model by Kimi-Audio-Evalkit", UNCHECKED),
    "touchnet_base": ("the base model by TouchNet", UNCHECKED),
    "touchnet_finetuned": ("the base model fine-tuned by TouchNet", UNCHECKED),
    "random_forest": ("Piczak 2015, random forest", "mean of five folds"),
    "cnn": ("Piczak 2015, convolutional network", "mean of five folds"),
    "people": ("Piczak 2015, people", "mean of five folds"),
    "declared": ("the instruct model on the benchmark's board", "same match; their prompt was not compared"),
    "remeasured": ("the instruct model by others", "same match; their prompts were not compared"),
    "qwen2_audio_instruct": ("the instruct model, by the source in the note", UNCHECKED),
    "r1_aqa": ("the instruct model after GRPO, R1-AQA's own figure", UNCHECKED),
    "west_grpo": ("the instruct model after GRPO, wenet-e2e/west issue 117", UNCHECKED),
    "qwen2_audio": ("the instruct model on VoiceBench's board", "no: overall score of 0 to 100"),
    "blsp": ("BLSP, by AIR-Bench", "same protocol where prompt and judge are"),
    "pandagpt": ("PandaGPT, by AIR-Bench", "same protocol where prompt and judge are"),
    "gemini_1_5_pro": ("Gemini 1.5 Pro, in the Qwen2-Audio report", "same protocol where prompt and judge are"),
}

HEAD = """# Benchmarks

An example whose `source` is a name of this page is scored by its rules, and `launch/evaluate.py` prints published
figures beside it. The page is made by `make docs-keys` from `evaluation/scoring/benchmarks.yaml`. Every number bears
the stamp of its scoring and `NAME/VERSION` of its prompt. None of the published figures was reproduced here.
"""


def page() -> str:
    """The page in Markdown."""
    named = benchmarks().values()
    used = {who for benchmark in named for who in benchmark.published}
    return "\n".join(
        [
            HEAD,
            "## How it is measured\n",
            *_table(("metric", "scoring", "what it is"), ((m, STAMPS.get(m, ""), HOW[m]) for m in HOW)),
            "\n## Whose figures, and whether ours can be compared with them\n",
            *_table(("figure", "of", "comparable"), ((who, *WHO[who]) for who in WHO if who in used)),
            "\n## One by one\n",
            *_table(("benchmark", "card", "metric", "asked", "published", "note"), map(_row, named)),
            "",
        ]
    )


def _row(benchmark: Benchmark) -> tuple[str, ...]:
    metric = "CER" if benchmark.metric == "error_rate" and benchmark.language in PER_CHARACTER else benchmark.metric
    published = ", ".join(f"{who} {value:g}" for who, value in benchmark.published.items())
    for name, figures in benchmark.also.items():
        published += "".join(f", {NAMES.get(name, name)} of {who} {value:g}" for who, value in figures.items())
    card = f"[{benchmark.card}](../data_manifests/cards/{benchmark.card}.yaml)" if benchmark.card else ""
    return benchmark.stamp, card, metric, f"`{asked(benchmark)}`", published, benchmark.note


def asked(benchmark: Benchmark) -> str:
    """The prompt in one line, without the markup around it; `...` where it has none."""
    if benchmark.style == "chat":
        return " / ".join(filter(None, benchmark.prompt.splitlines())) or "..."
    example = benchmark.example("1", Clip("a.wav", 1.0), "", question="{question}")
    texts = [piece.text for piece in render(example, for_generation=True).trunk if isinstance(piece, Text)]
    return "".join(texts[2:])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [header, ("---",) * len(header), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


if __name__ == "__main__":
    print(page(), end="")
