"""What a recipe would need and give on named GPUs: memory, time, throughput and cost, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from transformers import PreTrainedConfig

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.preference import Objective, Reference
from qwen2audio_train.config.schema import CheckpointingPolicy, ConfigError, Stage, StageConfig
from qwen2audio_train.evaluation.scoring.table import aligned
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.model.build import architecture_config
from qwen2audio_train.model.flops import PEAK_BF16_FLOPS, Load, forward_flops, training_flops
from qwen2audio_train.planning.cost import (
    MEMORY_BYTES,
    Throughput,
    repeated,
    sample_load,
    throughput,
    traffic_bytes,
)
from qwen2audio_train.planning.dry_run import CHARACTERS_PER_TOKEN, Counts, Plan, gib
from qwen2audio_train.planning.layers import PRECISIONS, LowRank
from qwen2audio_train.planning.memory import Memory, Sharding, Trained, optimizer_bytes, step_memory
from qwen2audio_train.training.stages.arguments import forwards_per_step, sums_in_float32

FALLBACK = {"clip_s": 10.0, "prompt_tokens": 30.0, "label_tokens": 40.0}
"""A sample where neither the command line nor a manifest says: ten seconds of speech and their transcript."""


class PlanMode(StrEnum):
    forecast = "forecast"
    find_batch = "find_batch"


@dataclass
class PlanOptions:
    """What launch/plan.py takes besides the keys of a stage.

    Attributes:
        mode: `forecast` computes; `find_batch` tries packs of growing size on this machine's device.
        gpu: kind of GPU.
        gpus: how many, a rank on each.
        gpu_hour_price: of one GPU, in any currency.
        utilisation: share of the data sheet's peak that all operations, repeated ones too, are assumed to reach.
        clip_s, prompt_tokens, label_tokens: of a typical sample (in DPO the labels of one answer);
            unset, the means of the manifests.
        limit_gib: memory that a trial may take beyond what the process held before; unset, all that a GPU has.
    """

    mode: PlanMode = PlanMode.forecast
    gpu: str = field(default="H100", metadata={"choices": tuple(PEAK_BF16_FLOPS)})
    gpus: int = at_least(1, 1)
    gpu_hour_price: float = at_least(0, 0.0)
    utilisation: float = at_least(0.01, 0.4, 1)
    clip_s: float | None = at_least(0, None)
    prompt_tokens: float | None = at_least(0, None)
    label_tokens: float | None = at_least(0, None)
    limit_gib: float | None = at_least(0, None)


@dataclass(frozen=True)
class Typical:
    """A typical sample, and where its numbers come from."""

    clip_s: float
    prompt_tokens: int
    label_tokens: int
    answers: int
    origin: str
    family: Family = DEFAULT

    @property
    def load(self) -> Load:
        return sample_load(self.clip_s, self.label_tokens, self.prompt_tokens, self.answers, self.family)


@dataclass(frozen=True)
class Forecast:
    """Figures of one optimiser step; `load`, `memory` and `speed` are of one forward and backward on each GPU."""

    samples: int
    load: Load
    memory: Memory
    speed: Throughput
    forwards: int
    useful_share: float
    traffic: float


def typical_sample(plan: Plan, options: PlanOptions) -> Typical:
    """From the command line, else from the manifests that can be read, else the fallback."""
    data, stage = plan.config.data, plan.config.stage
    answers = 2 if stage is Stage.dpo and plan.config.preference.objective is Objective.dpo else 1
    read = {name: counts for name, counts in plan.counts.items() if counts is not None and counts.examples}
    weights = {name: data.sources[name].weight for name in read}
    measured = mean_sample((counts, weights[name] or 0.0) for name, counts in read.items()) if read else {}
    if measured:
        measured["label_tokens"] /= answers
    found, origins = {}, []
    for name, fallback in FALLBACK.items():
        given = getattr(options, name)
        value, origin = (given, "given") if given is not None else (fallback, "assumed")
        if given is None and measured:
            value, origin = measured[name], "mean of the manifests"
        found[name] = value
        origins.append(f"{name} {value:.4g} ({origin})")
    prompt, label = max(round(found["prompt_tokens"]), 1), max(round(found["label_tokens"]), 1)
    family = family_of(plan.config.model.family)
    return Typical(found["clip_s"], prompt, label, answers, ", ".join(origins), family)


def mean_sample(sources: Iterable[tuple[Counts, float]]) -> dict[str, float]:
    """Means over sources as they are mixed: by their weights, or by their sizes where none has one."""
    rows = list(sources)
    weighted = any(weight for _, weight in rows)
    shares = [weight if weighted else counts.examples for counts, weight in rows]

    def mean(*totals: float) -> float:
        per_example = (total / counts.examples for total, (counts, _) in zip(totals, rows, strict=True))
        return sum(share * value for share, value in zip(shares, per_example, strict=True)) / sum(shares)

    return {
        "clip_s": mean(*(counts.audio_s for counts, _ in rows)),
        "prompt_tokens": mean(*(counts.prompt_characters for counts, _ in rows)) / CHARACTERS_PER_TOKEN,
        "label_tokens": mean(*(counts.label_characters for counts, _ in rows)) / CHARACTERS_PER_TOKEN,
    }


def precision_of(config: StageConfig) -> str:
    """The key of `PRECISIONS` that a recipe trains in; DeepSpeed casts weights where Trainer would cast inputs."""
    if config.model.dtype.value == "bfloat16":
        return "bfloat16"
    if not config.trainer.get("bf16", False):
        return "float32"
    return "autocast" if config.deepspeed.stage is None else "bfloat16"


def low_rank_of(config: StageConfig) -> LowRank:
    """How a recipe's adapters compute: in float32 also beside a model in bfloat16, unless something casts them.

    DeepSpeed casts their weights once, autocast what they read at every forward.
    """
    mixed, autocast = bool(config.trainer.get("bf16", False)), config.deepspeed.stage is None
    value, dropout = 2 if mixed else 4, config.adapter.dropout > 0
    copies = dropout or (mixed and autocast) or value != PRECISIONS[precision_of(config)].matmul
    return LowRank(config.adapter.r, value, copies, dropout, config.adapter.use_dora)


def has_frozen_reference(config: StageConfig) -> bool:
    """Whether a second copy of the weights is held, as `preference_trainer` decides it."""
    chosen = config.preference.reference
    if config.stage is not Stage.dpo or chosen in (Reference.cached, Reference.adapter):
        return False
    return chosen is Reference.frozen or config.adapter.kind.value == "none"


def forecast(plan: Plan, typical: Typical, options: PlanOptions) -> Forecast:
    """The figures of a recipe.

    Raises:
        ConfigError: the stage or the adapter is not one that the model of costs knows, or a sample fits no pack.
    """
    config = plan.config
    check_known(config)
    architecture = architecture_config(config.model, None)
    samples = samples_per_forward(config, typical.load)
    load = repeated(typical.load, samples)
    useful, flops = step_flops(plan, architecture, load)
    forwards = forwards_per_step(config, options.gpus)
    stage = config.deepspeed.stage
    learned = sum(plan.adapter.values()) + sum(plan.parameters[part] for part, count in plan.trained.items() if count)
    sent = sum(plan.parameters.values()) if stage == 3 else learned
    return Forecast(
        samples=samples,
        load=load,
        memory=memory_of(plan, architecture, load, options.gpus),
        speed=throughput(
            load,
            flops,
            gpu=options.gpu,
            utilisation=options.utilisation,
            gpus=options.gpus,
            gpu_hour_price=options.gpu_hour_price,
        ),
        forwards=forwards,
        useful_share=useful / flops,
        traffic=traffic_bytes(sent, stage or 0, forwards) if options.gpus > 1 else 0.0,
    )


def check_known(config: StageConfig) -> None:
    """Raises ConfigError for what the model of costs does not know."""
    if config.stage is Stage.encoder:
        raise ConfigError("stage=encoder: its small model is not in the model of costs; plan pretrain, sft or dpo")
    if config.adapter.kind.value == "qlora":
        raise ConfigError("adapter.kind=qlora: four-bit weights are not in the model of costs; plan adapter.kind=lora")


def samples_per_forward(config: StageConfig, one: Load) -> int:
    """Typical samples that a forward holds. Raises ConfigError where a pack does not take one."""
    data = config.data
    per_pack = data.samples_per_pack or data.tokens_per_pack // one.tokens
    if not per_pack:
        raise ConfigError(
            f"data.tokens_per_pack={data.tokens_per_pack}: the typical sample has {one.tokens} tokens; allow more"
        )
    return per_pack * data.packs_per_forward


def memory_of(plan: Plan, architecture: PreTrainedConfig, load: Load, gpus: int) -> Memory:
    """Memory of a step of one GPU."""
    config, stage, precision = plan.config, plan.config.deepspeed.stage, precision_of(plan.config)
    float32_copy = stage is not None and precision == "bfloat16"
    trained = Trained(
        parts=[part for part, count in plan.trained.items() if count],
        adapted=[part for part, count in plan.adapter.items() if count],
        adapter=low_rank_of(config),
        adapter_parameters=sum(plan.adapter.values()),
        checkpointed=config.model.activation_checkpointing,
        selective=config.model.activation_checkpointing_policy is CheckpointingPolicy.selective,
        precision=precision,
    )
    deepspeed = config.deepspeed
    return step_memory(
        architecture,
        load,
        plan.parameters,
        trained,
        Sharding(stage or 0, gpus, deepspeed.offload_optimizer, deepspeed.offload_parameters),
        state_bytes=optimizer_bytes(plan.arguments.optim, PRECISIONS[precision].weight, float32_copy=float32_copy),
        gradient_bytes=4 if float32_copy and sums_in_float32(config, gpus) else None,
        copies=2 if has_frozen_reference(config) else 1,
    )


def step_flops(plan: Plan, architecture: PreTrainedConfig, load: Load) -> tuple[int, int]:
    """Operations of a forward and backward: those that are of use, and with what is computed twice."""
    model, dpo = plan.config.model, plan.config.stage is Stage.dpo
    passes = {
        "trained": [part for part, count in plan.trained.items() if count],
        "adapted": [part for part, count in plan.adapter.items() if count],
    }
    selective = model.activation_checkpointing_policy is CheckpointingPolicy.selective
    twice = () if selective else model.activation_checkpointing
    useful = sum(training_flops(architecture, load, **passes).values())
    flops = sum(training_flops(architecture, load, **passes, checkpointed=twice).values())
    live = dpo and plan.config.preference.reference is not Reference.cached
    reference = sum(forward_flops(architecture, load).values()) if live else 0
    return useful + reference, flops + reference


def print_forecast(plan: Plan, options: PlanOptions) -> Forecast:
    """Print memory, time, throughput and cost, and what they rest on."""
    typical = typical_sample(plan, options)
    found = forecast(plan, typical, options)
    memory, speed, load = found.memory, found.speed, found.load
    room = MEMORY_BYTES[options.gpu]
    step_s = found.forwards * speed.step_s
    hours = step_s * plan.arguments.max_steps / 3600
    rows = [
        ["a forward on each GPU", f"{load.tokens:,} tokens, {found.samples} samples, {load.audio_s:,.0f} s of audio"],
        *(
            [f"memory: {name}", gib(getattr(memory, name))]
            for name in ("weights", "gradients", "optimizer", "activations", "head")
        ),
        ["memory of a GPU", f"{gib(memory.total)} of {gib(room)}: {'fits' if memory.total < room else 'DOES NOT FIT'}"],
        *([["memory of the host", f"{gib(memory.host)} per GPU"]] if memory.host else []),
        ["a step", f"{step_s:,.2f} s ({found.forwards} x {speed.step_s:.2f} s)"],
        *([["sent by each GPU", f"{gib(found.traffic)} per step, not in its time"]] if found.traffic else []),
        ["throughput", f"{speed.tokens_per_s:,.0f} tokens/s, {speed.audio_hours_per_hour:,.1f} audio-hours per hour"],
        ["the whole run", f"{hours:,.1f} h, {hours * options.gpus:,.1f} GPU hours"],
    ]
    if options.gpu_hour_price:
        cost = hours * options.gpus * options.gpu_hour_price
        rows.append(["cost", f"{cost:,.2f}, {speed.price_per_audio_hour:,.4f} per hour of audio"])
    print(aligned([f"~ {options.gpus} x {options.gpu}", ""], rows))
    print(
        f"assumed: {options.utilisation:.0%} of {PEAK_BF16_FLOPS[options.gpu] / 1e12:.0f} TFLOP/s (data sheet) over "
        f"all operations, which is {options.utilisation * found.useful_share:.0%} MFU;\n"
        f"full packs of one sample: {typical.origin}.\n"
        "Left out: the optimizer's own time, waiting for data and other ranks, fragmentation, 1 to 2 GB of CUDA's own."
    )
    return found
