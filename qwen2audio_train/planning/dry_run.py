"""`dry_run=true`: what a recipe would do, from its numbers and manifests, without weights and without a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainingArguments

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.config.parts import PARTS
from qwen2audio_train.config.schema import DeepSpeedConfig, StageConfig
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_manifest
from qwen2audio_train.data.prompts.render import Text
from qwen2audio_train.data.samples.recipe import recipe_of, render_as
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.scoring.table import aligned
from qwen2audio_train.families.known import family_of
from qwen2audio_train.layout import num_samples_of
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.build import build_meta_model
from qwen2audio_train.model.freeze import part_of, set_trainable
from qwen2audio_train.training.stages.arguments import forwards_per_step, training_arguments, world_size

CHARACTERS_PER_TOKEN = 4.0
"""Estimate for text whose tokenizer is not at hand."""

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Counts:
    """What the manifests of a source hold; the text is that of the rendered examples."""

    examples: int
    audio_s: float
    audio_tokens: int
    prompt_characters: int
    label_characters: int
    bad_lines: int

    def row(self) -> list[str]:
        text = int((self.prompt_characters + self.label_characters) / CHARACTERS_PER_TOKEN)
        hours = f"{self.audio_s / 3600:.2f}"
        return [f"{self.examples:,}", hours, f"{self.audio_tokens:,}", f"{text:,}", f"{self.bad_lines:,}"]


@dataclass(frozen=True)
class Plan:
    """What a recipe would do, by its numbers and manifests.

    Attributes:
        parameters: per part, adapters left out.
        trained: of these the ones that are trained; `adapter`: parameters of adapters, all of which are.
        counts: per training source, None for one that is no local manifest, or is not there yet.
    """

    config: StageConfig
    arguments: TrainingArguments
    ranks: int
    parameters: dict[str, int]
    trained: dict[str, int]
    adapter: dict[str, int]
    counts: dict[str, Counts | None]
    eval_counts: dict[str, Counts | None]


def make_plan(config: StageConfig, ranks: int | None = None) -> Plan:
    """Read what a recipe says and what its manifests hold; without weights and without a network."""
    # Without DeepSpeed, which would look for its ranks and cut up the model that is counted here.
    arguments = training_arguments(replace(config, deepspeed=DeepSpeedConfig()))
    return Plan(
        config,
        arguments,
        ranks or world_size(),
        *parameter_counts(config),
        counts_of(config.data.sources, config),
        counts_of(config.data.eval_sources, config),
    )


def print_plan(config: StageConfig, ranks: int | None = None) -> Plan:
    """Print parameters, data, steps and checkpoint size of a stage; estimates are marked with ~."""
    plan = make_plan(config, ranks)
    arguments = plan.arguments
    print(
        f"stage {config.stage.value}, run folder {config.run_dir}, start from {config.init_from or 'the model config'}"
    )
    print(aligned(["part", "parameters", "trainable"], parameter_table(plan), right=(1, 2)))
    head = ["source", "examples", "hours", "audio tokens", "~ text tokens", "bad lines"]
    print(aligned(head, data_table(plan), right=(1, 2, 3, 4, 5)))
    forwards = forwards_per_step(config, plan.ranks)
    budget = config.data.tokens_per_pack if config.data.samples_per_pack is None else None
    per_pack = f"{budget} tokens" if budget else f"{config.data.samples_per_pack} samples"
    print(
        f"{arguments.max_steps} steps of {config.data.packs_per_step} packs of at most {per_pack}; "
        f"{plan.ranks} rank(s), {forwards} forward(s) each per step"
    )
    learned = sum(plan.trained.values()) + sum(plan.adapter.values())
    saved = learned if config.adapter.kind.value != "none" else sum(plan.parameters.values())
    weights = saved * BYTES[config.model.dtype.value]
    print(
        f"checkpoint: weights {gib(weights)}, ~ optimizer {gib(2 * 4 * learned)}; {arguments.save_total_limit} are kept"
    )
    return plan


def parameter_counts(config: StageConfig) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Parameters, trained parameters and adapter parameters of each part."""
    model = build_meta_model(config.model)
    set_trainable(model, config.model.freeze)
    own = {id(parameter) for parameter in model.parameters()}
    adapted = apply_adapter(model, config.adapter)
    total, trained, adapter = (dict.fromkeys(PARTS, 0) for _ in range(3))
    for name, parameter in adapted.named_parameters():
        part, size = part_of(name, model.family), parameter.numel()
        if id(parameter) not in own:
            adapter[part] += size
            continue
        total[part] += size
        trained[part] += size * parameter.requires_grad
    return total, trained, adapter


def parameter_table(plan: Plan) -> list[list[str]]:
    """Rows (part, parameters, trainable); an adapter's parameters count with the part that they adapt."""
    rows = ((part, plan.parameters[part], plan.trained[part], plan.adapter[part]) for part in PARTS)
    return [[part, f"{total + adapter:,}", f"{trained + adapter:,}"] for part, total, trained, adapter in rows]


def data_table(plan: Plan) -> list[list[str]]:
    """Rows per source; a source that is no local manifest, or is not there yet, says so."""
    rows = []
    for kind, counts in (("", plan.counts), (" (held out)", plan.eval_counts)):
        for name, found in counts.items():
            missing = ["not read: no local manifest (yet)", "", "", "", ""]
            rows.append([name + kind, *(found.row() if found else missing)])
    return rows


def counts_of(sources: dict[str, SourceConfig], config: StageConfig) -> dict[str, Counts | None]:
    """What each source holds, None for one that cannot be read here."""
    found: dict[str, Counts | None] = {}
    for name, source in sources.items():
        files = [Path(path) for path in source.path]
        local = bool(files) and all(path.is_file() and path.suffix == ".jsonl" for path in files)
        found[name] = manifest_counts(files, config) if local else None
    return found


def manifest_counts(files: list[Path], config: StageConfig) -> Counts:
    """Examples, audio, characters and bad lines of some manifests."""
    examples: list[Example] = []
    bad = 0
    for path in files:
        for item in parse_manifest(path):
            if isinstance(item, ManifestError):
                bad += 1
            else:
                examples.append(item)
    durations = [clip.duration_s or 0.0 for example in examples for clip in clips_of(example)]
    family = family_of(config.model.family)
    audio = sum(family.num_clip_tokens(num_samples_of(duration)) for duration in durations if duration > 0)
    characters = {True: 0, False: 0}
    samples = recipe_of(config.data, config.model.num_mel_bins, family.name)
    for example in examples:
        try:
            rendered = render_as(samples, example)
        except ExampleError:
            bad += 1
            continue
        pieces = (*rendered.trunk, *(piece for branch in rendered.branches for piece in branch))
        for piece in pieces:
            if isinstance(piece, Text):
                characters[piece.is_label] += len(piece.text)
    return Counts(len(examples), sum(durations), audio, characters[False], characters[True], bad)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
