"""Models of other families, and stock Qwen2-Audio, by transformers' own classes: the rows that ours stand beside.

One example at a time, so that no padding moves an answer; under torchrun every rank takes its share. Answers are kept
as they come, as our own path keeps them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.backends.answers import HeldOutOptions, held_out, scored
from qwen2audio_train.evaluation.backends.families import FAMILIES, Asked
from qwen2audio_train.evaluation.decoding.kept import KeptAnswers, weights_key
from qwen2audio_train.evaluation.decoding.ranks import gather, rank_and_world
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation
from qwen2audio_train.evaluation.scoring.items import Item, item_of
from qwen2audio_train.layout import SAMPLING_RATE

PROMPT_TOKENS = 4
"""Of Whisper's decoder: start, language, task, no timestamps."""


@dataclass
class TransformersOptions(HeldOutOptions):
    """The keys of `launch/evaluate.py transformers`.

    Attributes:
        manifests, output_dir, max_new_tokens, bootstrap_samples, seed: as of every backend.
        model: hub id or folder of a model of one of `families.FAMILIES`.
        dtype: of the weights; unset, as they were saved.
        num_beams: of a beam search; 1 is greedy.
    """

    model: str = ""
    dtype: str = "auto"
    num_beams: int = 1


@dataclass(frozen=True)
class Stock:
    """A model with its processor, and how its family is asked."""

    model: Any
    processor: Any
    asked: Asked

    @torch.inference_mode()
    def answer(self, example: Example, item: Item, settings: Mapping[str, Any]) -> str:
        """The answer to one example.

        Args:
            settings: of `generate`.

        Raises:
            ExampleError: a clip cannot be read or would be cut, or the family cannot be asked this.
        """
        waveforms = [load_clip(clip, SampleRecipe()) for clip in clips_of(example)]
        if self.asked.cuts:
            self._check_lengths(example, waveforms)
        inputs, own = self.asked.ask(self.processor, example, item, waveforms)
        ids = self.model.generate(**inputs.to(self.model.device, self.model.dtype), **settings, **own)[0]
        prompt = inputs.get("input_ids")
        answer = ids if prompt is None else ids[prompt.size(1) :]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.asked.answer(text)

    def _check_lengths(self, example: Example, waveforms: Sequence[np.ndarray]) -> None:
        most = self.processor.feature_extractor.n_samples
        if longest := max((len(waveform) for waveform in waveforms if len(waveform) > most), default=0):
            raise ExampleError(
                f'example "{example.id}": a clip of {longest / SAMPLING_RATE:.1f} s, of which the stock processor '
                f"hears the first {most / SAMPLING_RATE:g} s"
            )


def load_stock(name: str, dtype: str = "auto") -> Stock:
    """The model of a hub id or folder, on this rank's device.

    Raises:
        ConfigError: no model's name, or a family that is not known here.
    """
    if not name:
        raise ConfigError("model: no value was given; set model=... to a hub id or a folder")
    try:
        family = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={name}: transformers cannot read it ({str(error).splitlines()[0]})") from error
    if family not in FAMILIES:
        raise ConfigError(f"model={name}: of the family {family}; {nearest(family, list(FAMILIES))}")
    asked = FAMILIES[family]
    transformers.logging.set_verbosity_error()  # it would say for every answer that max_new_tokens is given
    model: Any = getattr(transformers, asked.model_class).from_pretrained(name, dtype=dtype)
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return Stock(model.eval().to(device), audio_processor(name, asked), asked)


def audio_processor(name: str, asked: Asked) -> Any:
    """The processor of a family without what it takes pictures and films by, which would need torchvision."""
    stock = getattr(transformers, asked.processor_class)
    # An omni processor insists on an image processor by its class alone, and uses it for images alone.
    audio_alone = type(asked.processor_class, (stock,), {"check_argument_for_proper_class": lambda *given: None})
    parts: dict[str, Any] = {"feature_extractor": AutoFeatureExtractor, "tokenizer": AutoTokenizer}
    processor = audio_alone(**{part: loader.from_pretrained(name) for part, loader in parts.items()})
    saved, _ = stock.get_processor_dict(name)
    processor.chat_template = saved.get("chat_template") or processor.tokenizer.chat_template
    return processor


def evaluate_transformers(options: TransformersOptions) -> Evaluation:
    """Have a model answer every example that its family can be asked, and score its answers.

    Raises:
        ConfigError: a model or a family that is not known.
    """
    examples = held_out(options)
    stock = load_stock(options.model, options.dtype)
    examples, notes = _asked_for(examples, stock.asked)
    most = getattr(stock.model.config, "max_target_positions", None)  # Whisper's decoder
    if most is not None and options.max_new_tokens > most - PROMPT_TOKENS:
        raise ConfigError(
            f"max_new_tokens={options.max_new_tokens}: this model's decoder has {most} positions, of which "
            f"{PROMPT_TOKENS} are its prompt's; give up to {most - PROMPT_TOKENS}"
        )
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "num_beams": options.num_beams}
    version = importlib.metadata.version("transformers")
    deciding = {**settings, "asked": stock.asked.stamp, "transformers": version, "weights": weights_key(stock.model)}
    texts, failed = _answers(stock, examples, settings, KeptAnswers(options.output_dir, examples, deciding))
    shown: dict[str, Any] = {"backend": "transformers", "model": options.model, "transformers": version}
    shown |= {"dtype": str(stock.model.dtype).removeprefix("torch."), "num_beams": options.num_beams}
    return scored(options, examples, texts, failed, notes=notes, settings=shown, asked=stock.asked.stamp)


def _asked_for(examples: Sequence[Example], asked: Asked) -> tuple[list[Example], list[str]]:
    """The examples of the family's tasks, and a note on the others."""
    if asked.tasks is None:
        return list(examples), []
    kept = [example for example in examples if _item(example).task in asked.tasks]
    if len(kept) == len(examples):
        return kept, []
    if not kept:
        raise ConfigError(
            f"manifests: none of the examples is of a task that this family does: {', '.join(asked.tasks)}"
        )
    others = sorted({_item(example).task for example in examples} - set(asked.tasks))
    count = len(examples) - len(kept)
    return kept, [f"{count} of {len(examples)} examples were not asked: this family does not do {', '.join(others)}"]


def _item(example: Example) -> Item:
    item = item_of(example)
    assert item is not None, "held_out lets no preference through"
    return item


def _answers(
    stock: Stock, examples: Sequence[Example], settings: Mapping[str, Any], kept: KeptAnswers
) -> tuple[list[str | None], dict[int, str]]:
    """The answers of all ranks in the order of the examples, and why there is none."""
    rank, world = rank_and_world()
    found = {place: texts[0] for place, texts in kept.known.items()}
    failed: dict[int, str] = {}
    left = [place for place in range(len(examples)) if place not in found][rank::world]
    for place in tqdm(left, desc="transformers", disable=None if rank == 0 else True):
        try:
            found[place] = stock.answer(examples[place], _item(examples[place]), settings)
        except ExampleError as error:
            failed[place] = str(error)
            continue
        kept.add({place: [found[place]]})
    found, failed = gather(found), gather(failed)
    return [found.get(place) for place in range(len(examples))], failed
