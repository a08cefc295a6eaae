"""What every stage does around its trainer: the run folder, the data's preparation, processor, model, resume."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from transformers.integrations import deepspeed as zero

from qwen2audio_train.config.schema import (
    AdapterKind,
    ConfigError,
    DataConfig,
    Dtype,
    ModelConfig,
    ModelKind,
    Stage,
    StageConfig,
)
from qwen2audio_train.data.examples import PREFERENCE_TASKS, Example, TaskExample
from qwen2audio_train.data.loading.build import Loader, build_batches, eval_batches
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.manifests.cache import find_manifests, good_examples
from qwen2audio_train.data.prompts.pools import tag_tokens
from qwen2audio_train.data.prompts.render import Text, render
from qwen2audio_train.data.prompts.tokenizer import as_qwen2_audio, save_processor, train_tokenizer
from qwen2audio_train.data.samples.maker import remote_of
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter, check_same_adapter, load_adapter, merge_adapter
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.encoder_cache import encoder_cache_of
from qwen2audio_train.model.freeze import set_trainable
from qwen2audio_train.model.packed import PackedQwen2Audio, unwrap
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.trainers.packed import PackedSeams, RunFiles

SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate")


def process() -> PartialState:
    """This rank among those that torchrun started; on a machine without a GPU they talk over gloo."""
    return PartialState(cpu=not torch.cuda.is_available())


def open_run(config: StageConfig) -> None:
    """Seed everything, and make the run folder this process's own (rank 0).

    Raises:
        ConfigError: the folder cannot be written to, or another process is training in it.
    """
    warnings_only()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if process().is_main_process:
        folders.hold(Path(config.run_dir))


def as_yaml(config: Any) -> str:
    """A checked config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def make_selfmade(data: DataConfig) -> None:
    """Synthesise the self-made corpus, if the recipe wants it: once, on rank 0, while the other ranks wait."""
    if not data.selfmade.variant:
        return
    from qwen2audio_train.selfmade import build

    chosen = data.selfmade
    with process().main_process_first(), tqdm(desc=f"making {chosen.folder}", unit=" clips", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        build(Path(chosen.folder), variant=chosen.variant, seed=chosen.seed, progress=show)


def build_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the weights that the stage starts from, or of the parts that its model is made of.

    A tiny model's is fitted on the training text of the stage.
    """
    if config.init_from is not None:
        return load_tokenizer("init_from", base_of(folders.weights_folder(config.init_from)))
    if config.model.kind is ModelKind.released:
        return load_tokenizer("model.path", config.model.path)
    if config.model.kind is ModelKind.assembled:
        return as_qwen2_audio(load_tokenizer("model.language_model", config.model.language_model))
    examples = list(training_examples(config.data))
    tags = tag_tokens(languages_of(examples), config.data.prompt_style.value)
    return train_tokenizer(texts_of(examples, config.data), config.model.vocab_size, tags)


def load_tokenizer(key: str, path: str | None) -> Any:
    """The tokenizer of a folder or hub id that the recipe's `key` names. Raises ConfigError when there is none."""
    if path is None:
        raise ConfigError(f"{key}: no value was given; set {key}=... to a folder or hub id")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={path}: no tokenizer could be loaded from there ({reason})") from error


def languages_of(examples: Iterable[Example]) -> list[str]:
    """Languages that are heard in task examples; each has a tag among the tokens."""
    return sorted({e.language for e in examples if isinstance(e, TaskExample) and e.language})


def training_examples(data: DataConfig) -> Iterator[Example]:
    """The good lines of the training manifests; bad ones are the loader's to count."""
    for name, source in data.sources.items():
        yield from good_examples(find_manifests(name, source, remote_of(data), data.num_workers))


def texts_of(examples: Iterable[Example], data: DataConfig) -> Iterator[str]:
    """What is written and asked in the examples, without the special tokens."""
    for example in examples:
        rendered = render(example, prompt_style=data.prompt_style.value, seed=data.prompt_seed)
        for piece in (*rendered.trunk, *(piece for branch in rendered.branches for piece in branch)):
            if isinstance(piece, Text):
                yield from filter(None, SPECIAL_TOKEN.split(piece.text))


def base_of(weights: str) -> str:
    """Folder or hub id of the full model: the weights themselves, or what an adapter was trained on."""
    adapter_config = Path(weights) / "adapter_config.json"
    if not adapter_config.is_file():
        return weights
    base = json.loads(adapter_config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter_config}: names no base model (base_model_name_or_path)")
    return folders.weights_folder(str(base))


@contextmanager
def kept_whole() -> Iterator[None]:
    """Hide ZeRO-3 from transformers, which would cut a new model up while its random weights are drawn: they would not
    be those of other runs, and whoever looks at shapes would find none."""
    hidden = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = hidden


def build_policy(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of a stage with its frozen parts, adapter and activation checkpointing: build -> freeze -> adapter.

    Weights that lie in an adapter are merged into their base, unless this stage trains an adapter too and goes on
    with that one.
    """
    start = folders.weights_folder(config.init_from) if config.init_from else None
    base = base_of(start) if start else None
    random_weights = base is None and config.model.kind is not ModelKind.released
    with kept_whole() if random_weights else nullcontext():
        quantize = config.adapter.kind is AdapterKind.qlora
        model = build_model(_resolved(config.model), base, tokenizer=tokenizer, quantize=quantize)
    set_trainable(model, config.model.freeze)
    adapted: Any
    if start is not None and base != start:
        trains_adapter = config.adapter.kind is not AdapterKind.none
        if trains_adapter:
            check_same_adapter(config.adapter, start)
        adapted = load_adapter(model, start, trainable=trains_adapter)
        if not trains_adapter:
            adapted = merge_adapter(adapted)
            set_trainable(adapted, config.model.freeze)
    else:
        adapted = apply_adapter(model, config.adapter, autocast_adapter_dtype=config.deepspeed.stage != 3)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigError("model.freeze: every part is frozen and there is no adapter, so there is nothing to train")
    set_activation_checkpointing(
        adapted, config.model.activation_checkpointing, config.model.activation_checkpointing_policy
    )
    inner = unwrap(adapted).model
    inner.encoder_cache = encoder_cache_of(config, inner.audio_tower, process().num_processes)
    if config.model.compile:
        compile_blocks(adapted)
    return adapted


def load_for_inference(
    checkpoint: str, *, num_threads: int = 0, dtype: Dtype = Dtype.float32, merge: bool = True
) -> tuple[Any, PreTrainedTokenizerBase, str | None]:
    """Model and tokenizer of a checkpoint on this rank's device, and the base that an unmerged adapter lies on.

    Raises:
        ConfigError: the checkpoint is not there.
    """
    warnings_only()
    if num_threads:
        torch.set_num_threads(num_threads)
    folder = folders.weights_folder(checkpoint)
    base = base_of(folder)
    model: Any = PackedQwen2Audio.from_pretrained(base, dtype=getattr(torch, dtype.value))
    if base != folder:
        model = load_adapter(model, folder, trainable=False)
        if merge:
            model = merge_adapter(model)
    unmerged = base if base != folder and not merge else None
    return model.to(process().device).eval(), AutoTokenizer.from_pretrained(folder), unmerged


def _resolved(model: ModelConfig) -> ModelConfig:
    """With the folder of weights that a run folder in `audio_encoder` stands for."""
    if model.kind is not ModelKind.tiny or model.audio_encoder is None:
        return model
    return replace(model, audio_encoder=folders.weights_folder(model.audio_encoder))


def compile_blocks(model: Any) -> None:
    """Compile every encoder and decoder layer in place; equal layers share their code."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen2AudioEncoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"):
            module.compile(dynamic=True)


def training_batches(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Loader:
    """This rank's training batches.

    Raises:
        ConfigError: the sources hold examples of another stage.
    """
    state = process()
    loader = build_batches(
        config.data,
        tokenizer,
        rank=state.process_index,
        world_size=state.num_processes,
        num_mel_bins=config.model.num_mel_bins,
        bad_examples_path=Path(config.run_dir) / f"bad_examples.rank{state.process_index}.jsonl",
    )
    indexes = loader.planner.indexes if isinstance(loader, PackLoader) else ()
    for name, index in zip(loader.source_names, indexes, strict=False):
        if (not PREFERENCE_TASKS.isdisjoint(index.task_counts)) != (config.stage is Stage.dpo):
            found = ", ".join(sorted(index.task_counts))
            expected = "preferences" if config.stage is Stage.dpo else "task or chat examples"
            raise ConfigError(f"data.sources.{name}: holds {found}, the stage {config.stage} learns from {expected}")
    return loader


def held_out(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[], Loader] | None:
    """A maker of this rank's held-out batches, tried once, so that what is wrong with them shows before training."""
    if not config.data.eval_sources:
        return None
    try:
        held_out_batches(config, tokenizer)
    except (FileNotFoundError, ConfigError) as error:
        raise ConfigError(str(error).replace("data.sources", "data.eval_sources")) from error
    return partial(held_out_batches, config, tokenizer)


def held_out_batches(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> Loader:
    """This rank's held-out batches, anew at each call."""
    state = process()
    return eval_batches(
        config.data,
        tokenizer,
        rank=state.process_index,
        world_size=state.num_processes,
        num_mel_bins=config.model.num_mel_bins,
    )


def run_files(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> RunFiles:
    """What every checkpoint says about where it comes from."""
    text = as_yaml(config)
    lineage = {
        "stage": config.stage.value,
        "init_from": config.init_from,
        "base": base_hash(config),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    return RunFiles(text, lineage, partial(save_processor, tokenizer, num_mel_bins=config.model.num_mel_bins))


def base_hash(config: StageConfig) -> dict[str, str] | None:
    """Checksums of the local weights that a stage starts from, on rank 0; None for a hub id or random weights."""
    if config.init_from is None or not process().is_main_process:
        return None
    folder = Path(folders.weights_folder(config.init_from))
    return {file.name: folders.checksum(file) for file in sorted(folder.glob("*.safetensors"))} or None


def fit(trainer: PackedSeams, config: StageConfig) -> None:
    """Train from the newest complete checkpoint, or from the start, and leave a checkpoint of the last step behind."""
    trainer.remove_callback(PrinterCallback)
    point = folders.resume_point(config.resume, Path(config.run_dir))
    if point is not None:
        done = folders.step_of(point) >= trainer.args.max_steps
        if trainer.args.should_save:
            print(f"{point} is of the last step: nothing to do" if done else f"resuming from {point}")
        if done:
            return
    trainer.train(resume_from_checkpoint=str(point) if point else None)
    trainer.save_final_checkpoint()


def warnings_only() -> None:
    """Libraries speak up when something is wrong, and from rank 0 alone."""
    level = transformers.logging.WARNING if process().is_main_process else transformers.logging.ERROR
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()


def settings(config: StageConfig) -> dict[str, Any]:
    """The config as plain values, for the tracker."""
    return json.loads(json.dumps(asdict(config), default=lambda value: value.value))
