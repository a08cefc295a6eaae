"""No path cuts a clip at 30 s in silence: what is learnt from, asked, scored, rewarded or compared hears all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig, LongAudio, SampleRecipe, SourceConfig
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.manifest import parse_record
from qwen2audio_train.data.samples.sample import materialise
from qwen2audio_train.data.tools.show import ShowOptions, show
from qwen2audio_train.errors import ExampleError, UserError
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.export import heard_whole, stock_texts
from qwen2audio_train.pairs.questions import questions_of
from tests.runs import encoder_recipe, train

SECONDS = 62.3
FRAMES = [3000, 3000, 230]
"""Two windows of 30 s and the rest; 750 + 750 + 57 audio tokens."""
TOKENS = 750 + 750 + 57

ASKED = [{"role": "user", "content": [{"type": "audio", "audio": "long.wav"}, {"type": "text", "text": "What?"}]}]
LINES: dict[str, dict[str, Any]] = {
    "task": {"audio": "long.wav", "task": "asr", "target": "so much"},
    "chat": {"messages": [*ASKED, {"role": "assistant", "content": "Much."}]},
    "preference": {"prompt": ASKED, "chosen": "Much.", "rejected": "Little."},
    "unpaired": {"prompt": ASKED, "completion": "Much.", "label": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that is silent up to its last second, and a line of every form about it."""
    place = tmp_path_factory.mktemp("long")
    wave = np.zeros(round(SECONDS * 16_000), np.float32)
    wave[-16_000:] = 0.3 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(place / "long.wav", wave, 16_000)
    for form, line in LINES.items():
        (place / f"{form}.jsonl").write_text(json.dumps({"id": form, **line}) + "\n")
    return place


def example(folder: Path, form: str) -> Example:
    return parse_record({"id": form, **LINES[form]}, str(folder / "m.jsonl"), 1)


@pytest.mark.parametrize("for_generation", [False, True], ids=["learnt", "asked"])
@pytest.mark.parametrize("form", LINES)
def test_every_form_is_heard_to_its_end(
    form: str, for_generation: bool, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    one = example(folder, form)
    sample = materialise(one, tokenizer, for_generation=for_generation)
    assert list(sample.clip_frames) == FRAMES
    assert len(sample.audio_slot) == TOKENS
    silent, _, last = (mel[:, :frames] for mel, frames in zip(sample.mels, FRAMES, strict=True))
    assert silent.std() < 1e-6 < 0.1 < last.std()
    with pytest.raises(ExampleError, match=r"62\.30 s long and an encoder window takes 30 s"):
        materialise(one, tokenizer, SampleRecipe(long_audio=LongAudio.reject), for_generation=for_generation)


@pytest.mark.parametrize(("form", "asked"), [("task", False), ("chat", False), ("preference", False), ("chat", True)])
def test_batches_of_training_and_of_reinforcement_hold_all_of_it(
    form: str, asked: bool, folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = {"a": SourceConfig([str(folder / f"{form}.jsonl")])}
    data = DataConfig(source, tokens_per_pack=4096, packs_per_step=1, num_workers=0, cache_dir=str(tmp_path))
    batch: Any = next(iter(build_batches(data, tokenizer, for_generation=asked)))
    if asked:  # prompts are handed on one by one
        assert [list(sample.clip_frames) for sample in batch["prompts"]] == [FRAMES]
    else:
        assert batch["clip_frames"].tolist() == FRAMES
        assert len(batch["audio_slot"]) == TOKENS


def test_evaluation_and_pairs_ask_about_all_of_it(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [example(folder, form) for form in LINES]
    questions = [question.as_example() for question in questions_of(examples)]
    for asked in (examples, questions):
        prompts = LazySamples(asked, tokenizer, SampleRecipe(), for_generation=True)
        assert prompts.num_long == len(asked)
        assert [list(prompts[i].clip_frames) for i in range(len(asked))] == [FRAMES] * len(asked)
        assert prompts.lengths == [len(prompts[i].input_ids) for i in range(len(asked))]
    assert "1557 tokens in 3 windows" in show(ShowOptions(manifest=str(folder / "task.jsonl")))


def test_the_stock_processor_which_cuts_is_not_asked(folder: Path) -> None:
    long = example(folder, "task")
    assert clips_of(long)[0].duration_s is None
    assert list(heard_whole([long], SampleRecipe())) == []
    with pytest.raises(ExampleError, match="hears the first 30 s of a clip alone"):
        stock_texts("nowhere", [long])


def test_a_random_tower_says_that_it_takes_one_window(folder: Path, tmp_path: Path) -> None:
    line = {"id": "long", **LINES["task"], "audio": str(folder / "long.wav")}
    (tmp_path / "speech.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"1 examples with 3 encoder windows.*set data.long_audio=reject"):
        train(encoder_recipe(tmp_path, tmp_path / "run", "data.tokens_per_pack=4096"))
