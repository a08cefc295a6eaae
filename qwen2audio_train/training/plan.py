"""`dry_run=true`: what a recipe would do, from its numbers and manifests, without weights and without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen2audio_train.config import DeepSpeedConfig, StageConfig
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.manifest import parse_manifest
from qwen2audio_train.data.record import ManifestError
from qwen2audio_train.data.render import Text, render
from qwen2audio_train.evaluation.table import aligned
from qwen2audio_train.layout import num_clip_tokens, num_samples_of
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.build import build_meta_model
from qwen2audio_train.model.freeze import PARTS, part_of, set_trainable
from qwen2audio_train.training.arguments import forwards_per_step, training_arguments, world_size

CHARACTERS_PER_TOKEN = 4.0
"""Estimate for text whose tokenizer is not at hand."""

BYTES = {"float32": 4, "bfloat16": 2}


def print_plan(config: StageConfig) -> None:
    """Print parameters, data, steps and checkpoint size of a stage; estimates are marked with ~."""
    # Without DeepSpeed, which would look for its ranks and cut up the model that is counted here.
    arguments = training_arguments(replace(config, deepspeed=DeepSpeedConfig()))
    print(
        f"stage {config.stage.value}, run folder {config.run_dir}, start from {config.init_from or 'the model config'}"
    )
    parameters = parameter_table(config)
    print(aligned(["part", "parameters", "trainable"], parameters, right=(1, 2)))
    head = ["source", "examples", "hours", "audio tokens", "~ text tokens", "bad lines"]
    print(aligned(head, data_table(config), right=(1, 2, 3, 4, 5)))
    forwards = forwards_per_step(config)
    budget = config.data.tokens_per_pack if config.data.samples_per_pack is None else None
    per_pack = f"{budget} tokens" if budget else f"{config.data.samples_per_pack} samples"
    print(
        f"{arguments.max_steps} steps of {config.data.packs_per_step} packs of at most {per_pack}; "
        f"{world_size()} rank(s), {forwards} forward(s) each per step"
    )
    total, trainable = (sum(int(row[column].replace(",", "")) for row in parameters) for column in (1, 2))
    saved = trainable if config.adapter.kind.value != "none" else total
    weights = saved * BYTES[config.model.dtype.value]
    optimizer = 2 * 4 * trainable
    print(f"checkpoint: weights {gib(weights)}, ~ optimizer {gib(optimizer)}; {arguments.save_total_limit} are kept")


def parameter_table(config: StageConfig) -> list[list[str]]:
    """Rows (part, parameters, trainable); an adapter's parameters count with the part that they adapt."""
    model = build_meta_model(config.model)
    set_trainable(model, config.model.freeze)
    adapted = apply_adapter(model, config.adapter)
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in adapted.named_parameters():
        counts[part_of(name)][0] += parameter.numel()
        counts[part_of(name)][1] += parameter.numel() * parameter.requires_grad
    return [[part, f"{total:,}", f"{trained:,}"] for part, (total, trained) in counts.items()]


def data_table(config: StageConfig) -> list[list[str]]:
    """Rows per source; a source that is no local manifest, or is not there yet, says so."""
    rows = []
    for kind, sources in (("", config.data.sources), (" (held out)", config.data.eval_sources)):
        for name, source in sources.items():
            files = [Path(path) for path in source.path]
            if not files or not all(path.is_file() and path.suffix == ".jsonl" for path in files):
                rows.append([name + kind, "not read: no local manifest (yet)", "", "", "", ""])
                continue
            rows.append([name + kind, *manifest_counts(files, config)])
    return rows


def manifest_counts(files: list[Path], config: StageConfig) -> list[str]:
    """Examples, hours, audio tokens, estimated text tokens and bad lines of some manifests."""
    examples: list[Example] = []
    bad = 0
    for path in files:
        for item in parse_manifest(path):
            if isinstance(item, ManifestError):
                bad += 1
            else:
                examples.append(item)
    durations = [clip.duration_s or 0.0 for example in examples for clip in clips_of(example)]
    audio = sum(num_clip_tokens(num_samples_of(duration)) for duration in durations if duration > 0)
    characters = 0
    for example in examples:
        rendered = render(example, prompt_style=config.data.prompt_style.value, seed=config.data.prompt_seed)
        pieces = (*rendered.trunk, *(piece for branch in rendered.branches for piece in branch))
        characters += sum(len(piece.text) for piece in pieces if isinstance(piece, Text))
    text = int(characters / CHARACTERS_PER_TOKEN)
    return [f"{len(examples):,}", f"{sum(durations) / 3600:.2f}", f"{audio:,}", f"{text:,}", f"{bad:,}"]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
