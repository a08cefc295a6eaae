"""Held-out evaluation: decode, score per source, task and language, and say what the numbers mean.

result = evaluate(model, tokenizer, examples, options, train_examples=train)
print(table(result.rows))
save(result, folder)            # metrics.json, table.txt, texts.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import LongAudio, SampleRecipe
from qwen2audio_train.data.examples import Example, PreferenceExample, TaskExample, UnpairedExample, clips_of
from qwen2audio_train.data.samples.recipe import plain as plain_recipe
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import GREEDY, Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.kept import KeptAnswers, weights_key
from qwen2audio_train.evaluation.decoding.lazy_samples import Audio, LazySamples
from qwen2audio_train.evaluation.scoring import captions
from qwen2audio_train.evaluation.scoring.asked import asked_by
from qwen2audio_train.evaluation.scoring.items import Item, Seen, item_of
from qwen2audio_train.evaluation.scoring.likelihood import held_out_loss, score_labels
from qwen2audio_train.evaluation.scoring.normalise import caveats as language_caveats
from qwen2audio_train.evaluation.scoring.options import option_rows
from qwen2audio_train.evaluation.scoring.score import Row, check_libraries, score_texts
from qwen2audio_train.evaluation.scoring.table import NAMES, aligned, extra_text, interval_text, value_text
from qwen2audio_train.model.packed import unwrap


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: scores, sources in their order.
        loss: per source, mean teacher-forced loss per label, token accuracy, and number of labels.
        texts: per example what was asked for and what was decoded.
        failed: ids of the examples that are in no score, with the reason.
        caveats: what keeps the numbers from being exactly comparable with others'.
        settings: how it was asked and decoded.
    """

    rows: tuple[Row, ...]
    loss: dict[str, dict[str, float]]
    texts: tuple[dict[str, Any], ...]
    failed: dict[str, str]
    caveats: tuple[str, ...]
    settings: dict[str, Any]
    wall_s: float


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: SampleRecipe,
    *,
    decoding: Decoding = GREEDY,
    train_examples: Iterable[Example] = (),
    audio: Audio = "own",
    label_likelihood: bool = False,
    keep_in: str | Path | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Decode every example greedily and score it; on several ranks each does its share and all get the result.

    Args:
        examples: task and chat examples (preferences are for `score_pairs`). A chat is answered at its last turn,
            with the earlier turns as they are written.
        train_examples: they tell which words were never seen and which answer a deaf model would give.
        audio: "silence" or "swapped" ask what is left without the right audio.
        label_likelihood: score closed sets also by which of their answers is the likeliest.
        keep_in: folder where answers are written down as they come; what an earlier run with the same weights wrote
            there is not decoded again.

    Raises:
        ValueError: a preference among the examples.
        MissingLibraryError: a score would need a library that is not installed.
    """
    started = time.perf_counter()
    if any(isinstance(example, PreferenceExample | UnpairedExample) for example in examples):
        raise UserError("preference examples have no single right answer: score them with score_pairs")
    prompts = LazySamples(examples, tokenizer, recipe, for_generation=True, audio=audio, seed=seed)
    items = [item for item in map(item_of, prompts.examples) if item is not None]
    check_libraries(items)
    settings = {**dataclasses.asdict(decoding), "audio": audio, "sample": plain_recipe(recipe)}
    kept = None if keep_in is None else KeptAnswers(keep_in, prompts.examples, _deciding(model, settings))
    texts = generate_texts(model, tokenizer, prompts, decoding, prompts.lengths, kept)
    learnable = [e for e, item in zip(prompts.examples, items, strict=True) if item.reference is not None]
    whole = LazySamples(learnable, tokenizer, recipe, for_generation=False)
    loss = held_out_loss(learnable, score_labels(model, whole, decoding.tokens_per_batch))
    found = evaluation_of(
        prompts.examples,
        texts,
        prompts.failed,
        train_examples=train_examples,
        caveats=_long_audio(prompts),
        recipe=recipe,
        settings={**settings, "seed": seed, "dtype": str(unwrap(model).dtype).removeprefix("torch.")},
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    rows = found.rows
    if label_likelihood:
        asked = list(zip(items, prompts.examples, strict=True))
        drawn = {"samples": bootstrap_samples, "seed": seed, "tokens_per_batch": decoding.tokens_per_batch}
        likeliest = option_rows(model, tokenizer, asked, recipe, audio=audio, **drawn)
        rows = (*rows, *_stamped(likeliest, items, prompts.examples, recipe, ""))
    return dataclasses.replace(found, rows=rows, loss=loss, wall_s=time.perf_counter() - started)


def evaluation_of(
    examples: Sequence[Example],
    texts: Sequence[str | None],
    failed: Mapping[int, str],
    *,
    train_examples: Iterable[Example] = (),
    caveats: Sequence[str] = (),
    recipe: SampleRecipe = SampleRecipe(),
    asked: str = "",
    settings: Mapping[str, Any],
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score texts that are there, whoever wrote them.

    Args:
        texts: the answer to every example; None where there is none, for the reason in `failed` by place.
        recipe: how the examples were made into prompts.
        asked: stamp of how examples of the task form were asked, where that is not as the recipe says.
    """
    items = [item for item in map(item_of, examples) if item is not None]
    answered = [one for one in zip(items, texts, examples, strict=True) if one[1] is not None]
    decoded = [(item, text or "") for item, text, _ in answered]
    rows = score_texts(decoded, Seen.of(train_examples), bootstrap_samples=bootstrap_samples, seed=seed)
    return Evaluation(
        rows=tuple(_stamped(rows, items, examples, recipe, asked)),
        loss={},
        texts=tuple(_text_record(item, text or "", example) for item, text, example in answered),
        failed={examples[place].id: reason for place, reason in sorted(failed.items())},
        caveats=(
            *language_caveats(item.language for item in items if item.metric == "error_rate"),
            *([captions.NO_SPICE] if _has_captions(items) and not captions.has_spice() else []),
            *caveats,
        ),
        settings=dict(settings),
        wall_s=0.0,
    )


def _stamped(
    rows: Sequence[Row], items: Sequence[Item], examples: Sequence[Example], recipe: SampleRecipe, asked: str
) -> Iterator[Row]:
    """The rows with how their items were asked; what one of a source and task was asked, all were."""
    first = {(item.source, item.task): example for item, example in zip(items, examples, strict=True)}
    for row in rows:
        example = first[row.source, row.task]
        is_task = isinstance(example, TaskExample)
        yield dataclasses.replace(row, prompt=asked if asked and is_task else asked_by(example, recipe))


def _has_captions(items: Sequence[Item]) -> bool:
    return any(item.metric == "captions" for item in items)


def _deciding(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides an answer beside the example: not the size of the batches, nor what only sampling reads."""
    idle = {"tokens_per_batch"} | (set() if settings["temperature"] else {"top_p", "seed"})
    return {name: value for name, value in settings.items() if name not in idle} | {"weights": weights_key(model)}


def _long_audio(prompts: LazySamples) -> list[str]:
    if not prompts.num_long:
        return []
    found = f"{prompts.num_long} of {len(prompts)} examples hold a clip over 30 s"
    if prompts.recipe.long_audio is LongAudio.reject:
        return [f"{found}; they were left out (sample.long_audio=reject)"]
    return [
        f"{found}; all of it was heard, window by window, where the stock processor hears the first 30 s alone "
        "(sample.long_audio=reject leaves them out)"
    ]


def _text_record(item: Item, text: str, example: Example) -> dict[str, Any]:
    """All fields of the item, so that it can be scored again, what was decoded, and what was heard."""
    heard = [dataclasses.asdict(clip) for clip in clips_of(example)]
    return {**dataclasses.asdict(item), "text": text, "clips": heard}


def save(result: Evaluation, folder: str | Path) -> None:
    """Write metrics.json, table.txt and texts.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {name: value for name, value in dataclasses.asdict(result).items() if name != "texts"}
    (folder / "metrics.json").write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n")
    lines = [table(result.rows), *(f"note: {caveat}" for caveat in result.caveats)]
    lines += [f"left out: {name}: {reason}" for name, reason in result.failed.items()]
    (folder / "table.txt").write_text("\n".join(lines) + "\n")
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in result.texts)


def plain(value: Any) -> Any:
    """`value` as JSON has it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Row]) -> str:
    """The scores as aligned columns, parts of a source indented below it."""
    cells = []
    for row in rows:
        score = row.score
        published = ", ".join(f"{who} {value_text(score.metric, value)}" for who, value in row.published.items())
        cells.append(
            [
                f"  {row.kind}" if row.kind else row.source,
                row.task,
                row.language or "",
                NAMES.get(score.metric, score.metric),
                value_text(score.metric, score.value),
                interval_text(score.metric, score.low, score.high),
                str(score.n),
                extra_text(score),
                published,
                row.scoring,
                row.prompt,
            ]
        )
    header = [
        "source",
        "task",
        "lang",
        "metric",
        "value",
        "95 %",
        "n",
        "beside it",
        "published",
        "scored by",
        "asked by",
    ]
    return aligned(header, cells, right=(4, 6))
