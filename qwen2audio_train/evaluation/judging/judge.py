"""Judged answers, AIR-Bench style: two answers beside each other, scored 1 to 10, in both orders.

The judge reads a description of the audio in words, the question, and two answers: the reference's and the model's. It
is asked twice, with the answers swapped, and an item's score is the mean of the two. What was refused, could not be
parsed or was not asked is counted by name; it is neither dropped nor scored in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.judging.client import Client, CostCapError, JudgeError, client_of
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks
from qwen2audio_train.evaluation.scoring.bootstrap import Score, mean_score
from qwen2audio_train.evaluation.scoring.table import aligned, interval_text, value_text

Outcome = Literal["scored", "refused", "unparsed", "failed", "not_asked"]

TEMPLATE = """You compare two answers to a question about a recording. You cannot hear it; this describes it in full:
[Audio]
{description}
[Question]
{question}
[Answer 1]
{first}
[Answer 2]
{second}
[Task]
Rate how helpful, relevant, accurate and complete each answer is, from 1 to 10; higher is better. Reply with one line
that holds the score of answer 1 and the score of answer 2, separated by a space, and nothing else."""
"""Asks for what AIR-Bench's own prompt asks for. Scores depend on the wording and on the judge: to compare with
published figures, pass that prompt and use that judge."""

STAMP = "judge/1"
"""Name and version of the protocol: both orders, and how a reply is read."""

FIELDS = ("description", "question", "first", "second")
"""What a template has to hold, in braces."""

_TWO_SCORES = re.compile(r"^\W*(\d+(?:\.\d+)?)\s*[\s,;/|]\s*(\d+(?:\.\d+)?)\W*$", re.MULTILINE)
_REFUSING = re.compile(r"\b(sorry|cannot|can't|can not|unable|won't)\b", re.IGNORECASE)


@dataclass
class JudgeOptions:
    """The keys of `launch/evaluate.py judge`.

    Attributes:
        evaluation: folder of an evaluation whose examples have a `description` of their audio in `meta`.
        judge: the endpoint: base_url and model, and the other fields of `client.Endpoint` (prices, max_cost, ...).
        template: text file with {description}, {question}, {first} and {second}; unset, the project's own.
        workers: requests under way at once.
        seed: of the intervals.
    """

    evaluation: str = ""
    judge: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    workers: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """One item to be judged."""

    id: str
    description: str
    question: str
    reference: str
    answer: str
    source: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of one item; the scores are means over both orders, and `lead` is what standing first is worth."""

    id: str
    outcome: Outcome
    answer_score: float | None = None
    reference_score: float | None = None
    lead: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Judgement:
    """Scores of the items that were scored, and how many were not, by reason.

    `cost` is what the judge's cache has cost so far, in all runs; `scoring` names protocol, prompt and judge.

    `answer.extra` and `outcomes` always say how many of how many; `lead` is the mean gain of the answer named first.
    """

    answer: Score
    reference: Score
    lead: float
    outcomes: dict[Outcome, int]
    verdicts: tuple[Verdict, ...]
    cost: float
    scoring: str = ""


def read_items(folder: str | Path) -> list[Judged]:
    """Items of an evaluation's texts.jsonl: examples with a reference and a `description` of their audio in `meta`.

    Raises:
        ValueError: no example has a description.
    """
    path = Path(folder) / "texts.jsonl"
    records = list(json_lines(path))
    items = [
        Judged(r["id"], r["meta"]["description"], r["question"] or "", r["reference"], r["text"], r.get("source", ""))
        for r in records
        if r["reference"] and r["meta"].get("description")
    ]
    if not items:
        raise UserError(f"{path}: no example has a reference and a `description` in its meta; a judge needs both")
    return items


def judge_answers(
    client: Client, items: Sequence[Judged], *, template: str = TEMPLATE, workers: int = 8, seed: int = 0
) -> Judgement:
    """Have every item scored in both orders. Run again, only what is not in the cache is asked.

    Args:
        template: with {description}, {question}, {first} and {second}; unset, the project's own.
    """
    with ThreadPoolExecutor(workers) as pool:
        judged = pool.map(lambda item: _verdict(client, item, template), items)
        verdicts = tuple(tqdm(judged, total=len(items), desc="judge", disable=None))
    scored = [verdict for verdict in verdicts if verdict.outcome == "scored"]
    outcomes = dict(Counter(verdict.outcome for verdict in verdicts))
    answer = mean_score("judge", [v.answer_score or 0.0 for v in scored], seed=seed)
    answer.extra.update(asked_for=float(len(items)), left_out=float(len(items) - len(scored)))
    return Judgement(
        answer=answer,
        reference=mean_score("judge", [v.reference_score or 0.0 for v in scored], seed=seed),
        lead=sum(v.lead or 0.0 for v in scored) / len(scored) if scored else float("nan"),
        outcomes=outcomes,
        verdicts=verdicts,
        cost=client.spent,
        scoring=f"{STAMP} prompt {digest(template)} by {client.endpoint.model}",
    )


def judge_evaluation(options: JudgeOptions) -> dict[str, Judgement]:
    """Judge an evaluation source by source, and write `judged.json` into its folder.

    Raises:
        ConfigError: no evaluation, an endpoint that is not described, a template without one of its fields.
    """
    if not options.evaluation:
        raise ConfigError("evaluation: no value was given; set evaluation=... to the output_dir of an evaluation")
    client = client_of(options.judge, f"{options.evaluation}/judge_cache")
    template = TEMPLATE if options.template is None else _template(Path(options.template))
    sources: dict[str, list[Judged]] = {}
    for item in read_items(options.evaluation):
        sources.setdefault(item.source, []).append(item)
    judged = {
        source: judge_answers(client, items, template=template, workers=options.workers, seed=options.seed)
        for source, items in sources.items()
    }
    made_by = {"model": client.endpoint.model, "template_sha256": digest(template), "protocol": STAMP}
    found = {source: asdict(judgement) for source, judgement in judged.items()}
    report = json.dumps({"judge": made_by, "sources": found}, indent=1, ensure_ascii=False)
    Path(options.evaluation, "judged.json").write_text(report + "\n", encoding="utf-8")
    return judged


def digest(template: str) -> str:
    """First digits of the SHA-256 of a template."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def judgement_table(judged: Mapping[str, Judgement]) -> str:
    """Mean scores by source beside the published ones, what became of every item, and what it cost."""
    rows = []
    for source, judgement in judged.items():
        score, known = judgement.answer, benchmarks().get(source)
        published = ", ".join(f"{who} {value}" for who, value in known.published.items()) if known else ""
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(judgement.outcomes.items()))
        value, interval = value_text("judge", score.value), interval_text("judge", score.low, score.high)
        reference = value_text("judge", judgement.reference.value)
        scored = f"{score.n} of {len(judgement.verdicts)}"
        cells = [source, value, interval, scored, reference, f"{judgement.lead:+.2f}", outcomes, published]
        rows.append([*cells, judgement.scoring])
    header = ["source", "judge's score", "95 %", "n", "reference's", "standing first", "outcomes", "published"]
    cost = max((judgement.cost for judgement in judged.values()), default=0.0)
    return f"{aligned([*header, 'scored by'], rows, right=(1, 3, 4, 5))}\ncost so far, in all runs: {cost:.4f}"


def _template(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if lost := [name for name in FIELDS if f"{{{name}}}" not in text]:
        expected = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ConfigError(f"template={path}: has no {{{lost[0]}}}; expected {expected}")
    return text


def parse_scores(text: str) -> tuple[float, float] | None:
    """The two scores of a reply, or None where there is no line of exactly two numbers from 1 to 10."""
    found = [(float(first), float(second)) for first, second in _TWO_SCORES.findall(text.strip())]
    if len(found) != 1 or not all(1 <= score <= 10 for score in found[0]):
        return None
    return found[0]


def _verdict(client: Client, item: Judged, template: str) -> Verdict:
    pairs = []
    for first, second in ((item.reference, item.answer), (item.answer, item.reference)):
        prompt = template.format(description=item.description, question=item.question, first=first, second=second)
        try:
            reply = client.complete([{"role": "user", "content": prompt}])
        except CostCapError as error:
            return Verdict(item.id, "not_asked", detail=str(error))
        except JudgeError as error:
            return Verdict(item.id, "failed", detail=str(error))
        scores = None if reply.refusal else parse_scores(reply.text)
        if scores is None:
            refused = reply.refusal or not reply.text.strip() or _REFUSING.search(reply.text)
            return Verdict(item.id, "refused" if refused else "unparsed", detail=reply.text[:200])
        pairs.append(scores)
    (reference_1, answer_2), (answer_1, reference_2) = pairs
    return Verdict(
        item.id,
        "scored",
        answer_score=(answer_1 + answer_2) / 2,
        reference_score=(reference_1 + reference_2) / 2,
        lead=(reference_1 - reference_2 + answer_1 - answer_2) / 2,
    )
