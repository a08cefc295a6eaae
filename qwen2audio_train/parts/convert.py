"""Files of a part -> a plain transformers folder, in float32."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.parts.ctranslate2 import ModelFileError, read_variables, whisper_config, whisper_state


def convert_whisper(files: Path, folder: Path) -> None:
    """`model.bin` and `tokenizer.json` of a CTranslate2 Whisper model -> `folder`.

    Raises:
        ModelFileError: the weights are cut short, damaged or no Whisper model's.
    """
    variables = read_variables(files / "model.bin")
    try:
        model = WhisperForConditionalGeneration(config := whisper_config(variables))
        model.load_state_dict(whisper_state(variables))
    except (KeyError, RuntimeError) as error:
        raise ModelFileError(f"{files / 'model.bin'}: no Whisper model ({error})") from error
    if spoken := _languages_and_tasks(files / "tokenizer.json"):
        # Without the mark of having been derived from the model's config, which `from_pretrained` would do again.
        told = {**model.generation_config.to_dict(), "_from_model_config": False, **spoken}
        model.generation_config = GenerationConfig.from_dict(told)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    shutil.copyfile(files / "tokenizer.json", folder / "tokenizer.json")


def _languages_and_tasks(tokenizer: Path) -> dict[str, Any]:
    """What a published Whisper's `generation_config.json` has beside transformers' defaults, read off its tokens."""
    tokens = {token["content"]: token["id"] for token in json.loads(tokenizer.read_text()).get("added_tokens", ())}
    spoken = [code for code in TO_LANGUAGE_CODE.values() if f"<|{code}|>" in tokens]
    if not spoken:
        return {}
    return {
        "lang_to_id": {f"<|{code}|>": tokens[f"<|{code}|>"] for code in spoken},
        "task_to_id": {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "is_multilingual": True,
        "max_initial_timestamp_index": 50,  # 1 s, as published
    }


def convert_gguf(files: Path, folder: Path) -> None:
    """`model.gguf`, a causal language model and its tokenizer -> `folder`, its weights no longer quantised.

    Raises:
        MissingLibraryError: the package gguf is not installed.
        ModelFileError: transformers cannot read the file.
    """
    if find_spec("gguf") is None:
        raise MissingLibraryError('reading a GGUF file needs the package gguf: pip install "qwen2audio-train[parts]"')
    try:
        read = AutoModelForCausalLM.from_pretrained(files, gguf_file="model.gguf", dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(files, gguf_file="model.gguf")
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{files / 'model.gguf'}: transformers cannot read it ({error})") from error
    # transformers refuses to save what it calls quantised, although it has made floating-point weights of it.
    own = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config).from_dict(own))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep_files(files: Path, folder: Path) -> None:
    """The files as they are."""
    shutil.copytree(files, folder, dirs_exist_ok=True)


CONVERTERS = {"ctranslate2": convert_whisper, "gguf": convert_gguf, "files": keep_files}
