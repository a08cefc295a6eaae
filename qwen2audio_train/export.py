"""A result that plain transformers and peft load, and the proof: the stock classes decode it to the same texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from torch import nn
from transformers import AutoProcessor, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Clip, Example, clips_of, with_clips
from qwen2audio_train.data.prompts.render import rendered_text
from qwen2audio_train.data.samples.maker import is_long, with_duration
from qwen2audio_train.data.samples.recipe import render_as, save_inputs
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.decoding.generate import GREEDY, Decoding, generate_texts, stop_ids
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import MAX_SAMPLES, SAMPLING_RATE
from qwen2audio_train.model.adapters import load_adapter, merge_outside_language_model, without_adapter

WINDOW_S = MAX_SAMPLES / SAMPLING_RATE
"""What the stock processor hears of a clip: 30 s."""


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe,
    folder: str | Path,
    *,
    base: str | None = None,
) -> Path:
    """Write what `from_pretrained` reads: weights, processor with chat template, generation config; and the recipe.

    Args:
        model: a full model (merge its adapter first), or one with an adapter, of which the adapter alone is written.
        base: for an adapter, the hub id or folder of the weights that it belongs to.

    Raises:
        ValueError: an adapter without a base.
    """
    folder = Path(folder)
    saved: Any = model
    if hasattr(model, "peft_config"):
        if base is None:
            raise ValueError("an adapter belongs to the weights that it was trained on: give their hub id or folder")
        for config in saved.peft_config.values():
            config.base_model_name_or_path = base
    saved.save_pretrained(folder)
    if (folder / CONFIG_NAME).is_file():
        _say_tied(saved, folder / CONFIG_NAME)
    save_inputs(tokenizer, recipe, folder)
    generation_config(tokenizer, family_of(recipe.family)).save_pretrained(folder)
    return folder


def export_adapter(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: SampleRecipe, folder: str | Path, base: str
) -> str:
    """Write an adapter that a server takes: on the language model alone.

    What it has on the audio tower and the projector is added to the base, which is then written to `base/` below the
    folder. Changes `model`. Returns the hub id or folder of the weights that the adapter belongs to.
    """
    folder = Path(folder)
    changed = merge_outside_language_model(model)
    if not changed:
        export(model, tokenizer, recipe, folder, base=base)
        return base
    own = str(folder / "base")
    model.config.save_pretrained(own)  # PEFT looks for it when the adapter is written
    export(model, tokenizer, recipe, folder, base=own)
    export(without_adapter(model), tokenizer, recipe, own)
    return own


def _say_tied(model: Any, path: Path) -> None:
    """Write on both levels of the config whether embeddings and head are one tensor.

    transformers leaves out what is the default, and that is not the same in all versions and servers.
    """
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    config = json.loads(path.read_text(encoding="utf-8"))
    for level in (config, config["text_config"]):
        level["tie_word_embeddings"] = tied
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_config(tokenizer: PreTrainedTokenizerBase, family: Family = DEFAULT) -> GenerationConfig:
    """Greedy decoding that ends at the end of a turn or of a text, as our own path has it."""
    chat_end, text_end = stop_ids(tokenizer, family)
    return GenerationConfig(
        do_sample=False, eos_token_id=[chat_end, text_end], pad_token_id=text_end, bos_token_id=text_end
    )


def heard_whole(examples: Iterable[Example], recipe: SampleRecipe) -> Iterator[Example]:
    """Those whose clips the stock processor hears to their end: it hears the first 30 s of a clip, and says nothing."""
    for example in examples:
        if not any(is_long(with_duration(clip, recipe).duration_s or 0.0) for clip in clips_of(example)):
            yield example


def as_heard(example: Example, recipe: SampleRecipe) -> Example:
    """The example with its clips cut to what the stock processor hears of them, their first 30 s."""
    clips = [with_duration(clip, recipe) for clip in clips_of(example)]
    cut = [
        replace(clip, end_s=clip.start_s + WINDOW_S, duration_s=WINDOW_S) if is_long(clip.duration_s or 0.0) else clip
        for clip in clips
    ]
    return with_clips(example, tuple(cut))


def repeated(example: Example, recipe: SampleRecipe, seconds: float, folder: Path) -> Example:
    """The example with each of its clips played again and again for so many seconds, from files in `folder`."""
    clips = []
    for number, clip in enumerate(clips_of(example)):
        path = folder / f"{number}.wav"
        soundfile.write(path, np.resize(load_clip(clip, recipe), round(seconds * SAMPLING_RATE)), SAMPLING_RATE)
        clips.append(Clip(str(path), seconds))
    return replace(with_clips(example, tuple(clips)), id=f"{example.id}, repeated to {seconds:g} s")


@torch.no_grad()
def stock_texts(
    folder: str | Path,
    examples: Sequence[Example],
    recipe: SampleRecipe = SampleRecipe(),
    *,
    base: str | None = None,
    decoding: Decoding = GREEDY,
    cut: bool = False,
) -> list[str]:
    """Greedy answers of an exported model by the stock classes alone, one example at a time.

    They end where the generation config beside the weights says.

    Args:
        base: for an exported adapter, the weights that it goes on.
        cut: let the stock processor hear the first 30 s of longer clips.

    Raises:
        ExampleError: a clip over 30 s, of which the stock processor would hear the first 30 s.
    """
    if not cut and len(list(heard_whole(examples, recipe))) < len(examples):
        raise ExampleError("the stock processor hears the first 30 s of a clip alone: leave longer ones out")
    processor = AutoProcessor.from_pretrained(folder)
    family = family_of(recipe.family)
    stock: Any = getattr(transformers, family.model_class)
    model: Any = stock.from_pretrained(base or folder)
    if base is not None:
        model = load_adapter(model, str(folder), trainable=False)
    model.eval()
    greedy = {"do_sample": False, "max_new_tokens": decoding.max_new_tokens, "min_new_tokens": decoding.min_new_tokens}
    texts = []
    for example in examples:
        rendered = render_as(recipe, example, for_generation=True)
        waveforms = [load_clip(clip, recipe) for clip in rendered.clips]
        inputs = processor(
            text=rendered_text(rendered),
            audio=waveforms or None,
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            **family.processor_options,
        )
        ids = model.generate(**inputs, **greedy)
        answer = ids[0, inputs["input_ids"].size(1) :]
        texts.append(processor.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def check_export(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe,
    examples: Sequence[Example],
    *,
    base: str | None = None,
    decoding: Decoding = GREEDY,
) -> list[tuple[str, str | None, str]]:
    """Examples that the exported model and our own path answer differently: (id, ours, the stock classes').

    Of a clip over 30 s both hear the first 30 s, which is all that the stock processor takes. In float32 there are
    none; in bfloat16 a few are, since the sums are rounded in another order.
    """
    prompts = LazySamples([as_heard(e, recipe) for e in examples], tokenizer, recipe, for_generation=True)
    ours = generate_texts(model, tokenizer, prompts, decoding, prompts.lengths)
    theirs = stock_texts(folder, examples, recipe, base=base, decoding=decoding, cut=True)
    return [
        (example.id, mine, stock) for example, mine, stock in zip(examples, ours, theirs, strict=True) if mine != stock
    ]
