"""The dataclass schema of everything under `recipes/`, and the door through which a composed recipe enters.

`load_config` merges a recipe into its schema: a misspelt key, a wrong type, an unknown choice or a combination that is
not in the table of `combinations.py` is refused before anything is loaded, with the key's full name and the nearest
right one. Keys below `trainer` are those of `transformers.TrainingArguments`: see `training/stages/arguments.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen2audio_train.config.bounds import at_least, misfits, missing, out_of_bounds, secrets
from qwen2audio_train.config.combinations import refusal
from qwen2audio_train.config.ctc import CtcConfig, ctc_refusal
from qwen2audio_train.config.data import MAX_SEED, DataConfig
from qwen2audio_train.config.decoded import DecodedConfig, decoded_refusal
from qwen2audio_train.config.parts import ADAPTED, LAYERED, PARTS, FreezeConfig
from qwen2audio_train.config.preference import PreferenceConfig
from qwen2audio_train.config.reinforcement import GrpoConfig
from qwen2audio_train.config.tracker import TrackerConfig
from qwen2audio_train.errors import UserError
from qwen2audio_train.families.known import DEFAULT, FAMILIES


class ConfigError(UserError):
    """A recipe that cannot be run; the message names the key, what was found and what would be right."""


class Stage(StrEnum):
    encoder = "encoder"
    pretrain = "pretrain"
    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"


class ModelKind(StrEnum):
    released = "released"
    assembled = "assembled"
    tiny = "tiny"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class CheckpointingPolicy(StrEnum):
    full = "full"
    selective = "selective"


class AdapterKind(StrEnum):
    none = "none"
    lora = "lora"
    qlora = "qlora"


class InitLora(StrEnum):
    default = "default"
    pissa = "pissa"


@dataclass
class ModelConfig:
    """Where the weights come from and which parts are trained.

    Attributes:
        family: of the model: its layout of prompts, its tokens, its modules.
        kind: `released` (a Qwen2-Audio checkpoint), `assembled` (a Whisper encoder and a Qwen language model) or `tiny`
            (random weights from `architecture`).
        path: hub id or folder of a released checkpoint, and of its processor.
        audio_encoder: hub id or folder of the Whisper model of an assembled one; run folder of the stage `encoder`
            whose tower a tiny one starts with.
        language_model: hub id or folder of the language model of an assembled one.
        architecture: `audio_config` and `text_config` numbers; they size the model in a dry run, and build a tiny one.
        num_mel_bins: mel bins of a model built from `architecture`; a loaded one says its own.
        vocab_size: size of the byte-level BPE that is fitted on the training text of a tiny model.
        dtype: type of the stored weights; mixed precision is `trainer.bf16`.
        freeze: parts that are not trained.
        activation_checkpointing: modules (`audio_tower`, `language_model`) whose activations are recomputed.
        activation_checkpointing_policy: `full` recomputes whole layers, `selective` all but products and attention.
        compile: compile the decoder and encoder blocks with `torch.compile`.
        encoder_cache_dir: folder for the outputs of a frozen tower, which a later epoch reads instead of running it.
        encoder_cache_max_gib: bound of that folder; beyond it the tower runs for what is not there.
    """

    family: str = field(default=DEFAULT.name, metadata={"choices": FAMILIES})
    kind: ModelKind = MISSING
    path: str | None = None
    audio_encoder: str | None = None
    language_model: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    num_mel_bins: int = at_least(1, 128)
    vocab_size: int = at_least(256, 1024)
    dtype: Dtype = Dtype.float32
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    activation_checkpointing: list[str] = field(default_factory=list, metadata={"choices": LAYERED})
    activation_checkpointing_policy: CheckpointingPolicy = CheckpointingPolicy.full
    compile: bool = False
    encoder_cache_dir: str | None = None
    encoder_cache_max_gib: float = at_least(0, 64.0)


@dataclass
class AdapterConfig:
    """Low-rank adaptation; `modules` names the parts whose linear layers get an adapter.

    Attributes:
        kind: `none`, `lora`, or `qlora` (LoRA on a language model in 4 bits).
        r: rank.
        alpha: the adapter's output is scaled by alpha / r (with `use_rslora` by alpha / sqrt(r)).
        dropout: probability of dropout before the adapter.
        init_lora_weights: `default` starts from an adapter that adds nothing; `pissa` (arXiv:2404.02948) takes each
            layer's largest singular values into the adapter, and leaves the rest frozen: the same outputs at first.
        use_dora: weight-decomposed adaptation (DoRA, arXiv:2402.09353).
        use_rslora: rank-stabilised scaling (arXiv:2312.03732).
        modules: parts whose linear layers get an adapter.
        modules_to_save: parts that are trained in full and saved beside the adapter.
    """

    kind: AdapterKind = AdapterKind.none
    r: int = at_least(1, 16)
    alpha: int = at_least(1, 32)
    dropout: float = at_least(0, 0.0, 1)
    init_lora_weights: InitLora = InitLora.default
    use_dora: bool = False
    use_rslora: bool = False
    modules: list[str] = field(default_factory=lambda: ["language_model"], metadata={"choices": ADAPTED})
    modules_to_save: list[str] = field(default_factory=list, metadata={"choices": PARTS})


@dataclass
class OptimizerConfig:
    """What `trainer.optim` and `trainer.learning_rate` cannot say.

    Attributes:
        learning_rates: rate of a part, such as `audio_tower`, where it differs from `trainer.learning_rate`.
        encoder_layer_decay: factor on the rate from one encoder layer to the one below it (Qwen-Audio: 0.95).
        loraplus_lr_ratio: factor on the rate of the adapters' B matrices (LoRA+, arXiv:2402.12354, takes 16).
        frozen_until: step before which a part, such as `language_model`, keeps its weights: its rate is 0.
        frozen_from: step from which a part keeps its weights.
        max_skipped_steps: steps in a row without finite loss and gradient that are skipped; one more ends the run.
    """

    learning_rates: dict[str, float] = field(default_factory=dict, metadata={"choices": PARTS, "least": 0})
    encoder_layer_decay: float = at_least(0, 1.0)
    loraplus_lr_ratio: float = at_least(0.01, 1.0)
    frozen_until: dict[str, int] = field(default_factory=dict, metadata={"choices": PARTS, "least": 1})
    frozen_from: dict[str, int] = field(default_factory=dict, metadata={"choices": PARTS, "least": 1})
    max_skipped_steps: int = at_least(0, 3)


@dataclass
class DeepSpeedConfig:
    """ZeRO stage (null: no DeepSpeed), what is offloaded to the host, and keys handed on to DeepSpeed as they are.

    Attributes:
        stage: of ZeRO, 0 to 3; unset: no DeepSpeed.
        offload_optimizer: keep the optimizer's state in the host's memory.
        offload_parameters: keep the parameters there (ZeRO-3).
        extra: keys of DeepSpeed's own config, handed on as they are.
    """

    stage: int | None = at_least(0, None, 3)
    offload_optimizer: bool = False
    offload_parameters: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """Everything that one stage needs; the root of `encoder.yaml`, `pretrain.yaml`, `sft.yaml` and `dpo.yaml`.

    Attributes:
        stage: which one.
        name: name of the run.
        run_dir: folder of the run; everything that it writes is below it.
        seed: of weights, order, prompts and dropout.
        init_from: weights to start from: a hub id, a released checkpoint, a run folder, a checkpoint or an adapter.
        resume: `auto` (the newest complete checkpoint of `run_dir`, if any), `never`, or a checkpoint folder.
        dry_run: resolve everything, print the plan and stop.
        num_threads: CPU threads of each rank; 0 leaves torch's choice.
        watchdog_s: seconds without a batch or a save until a rank prints its stack traces and ends; 0 waits for ever.
        keep_every_steps: checkpoints of every so many steps are kept, whatever `trainer.save_total_limit` says.
        model: weights, and what of them is trained.
        data: corpora, and how they are laid out.
        adapter: low-rank adaptation.
        optimizer: learning rates per part.
        trainer: keys of `transformers.TrainingArguments` (dpo: `trl.DPOConfig`), under their own names.
        deepspeed: ZeRO and offloading.
        tracker: Weights & Biases.
        decoded: held-out examples that pre-training and fine-tuning decode and score at every evaluation.
        preference: objective and reference of the stage dpo.
        ctc: reading audio embeddings as tokens.
        grpo: reinforcement from rewards.
    """

    stage: Stage = MISSING
    name: str = MISSING
    run_dir: str = "runs/${name}"
    seed: int = at_least(0, 0, MAX_SEED)
    init_from: str | None = None
    resume: str = "auto"
    dry_run: bool = False
    num_threads: int = at_least(0, 0)
    watchdog_s: float = at_least(0, 1800.0)
    keep_every_steps: int | None = at_least(1, None)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    decoded: DecodedConfig = field(default_factory=DecodedConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    ctc: CtcConfig = field(default_factory=CtcConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


Schema = TypeVar("Schema")


def load_config(raw: DictConfig | Mapping[str, Any], schema: type[Schema]) -> Schema:
    """Merge a composed recipe into `schema`.

    Raises:
        ConfigError: with every unknown key, wrong container or choice, every missing value, the first wrong type, every
            value out of its bounds, or a forbidden combination.
    """
    given = raw if isinstance(raw, DictConfig) else OmegaConf.create(dict(raw))
    written = OmegaConf.to_container(given, resolve=False)
    _refuse((*secrets(written), *misfits(written, schema)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        _refuse(missing(OmegaConf.to_container(merged, resolve=False)))
        config: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', '') or 'recipe'}: {reason}") from error
    _refuse(out_of_bounds(config))
    if isinstance(config, StageConfig):
        frozen = config.model.freeze.multi_modal_projector
        chosen = _choice(config)
        decoded = decoded_refusal(config.decoded, config.stage, config.trainer.get("eval_strategy", "no"))
        ctc = ctc_refusal(config.ctc, config.stage, chosen, frozen)
        _refuse(filter(None, (refusal(chosen), ctc, adapter_refusal(config), decoded)))
    return config


def adapter_refusal(config: StageConfig) -> str | None:
    """Why the adapter's initial weights, or their rates, would be nothing or wrong in a recipe."""
    adapter = config.adapter
    if adapter.kind is AdapterKind.none:
        ratio = config.optimizer.loraplus_lr_ratio
        return None if ratio == 1.0 else f"optimizer.loraplus_lr_ratio={ratio}: there is no adapter; set adapter=lora"
    if adapter.init_lora_weights is InitLora.default:
        return None
    reasons = {
        "its base without the adapter is no reference; set adapter.init_lora_weights=default": config.stage
        in (Stage.dpo, Stage.grpo),
        "it takes weights apart that are in 4 bits; set adapter.kind=lora": adapter.kind is AdapterKind.qlora,
        "it takes weights apart that are sharded; set deepspeed.stage=2": config.deepspeed.stage == 3,
        "it is not combined with adapter.use_dora; set one of them": adapter.use_dora,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"adapter.init_lora_weights=pissa: {'; '.join(found)}" if found else None


def _refuse(reasons: Iterable[str]) -> None:
    if message := "\n".join(reasons):
        raise ConfigError(message)


def _choice(config: StageConfig) -> dict[str, str]:
    """What a recipe chose in each column of the table of combinations."""
    offload = {(False, False): "none", (True, False): "optimizer", (False, True): "parameters", (True, True): "both"}
    return {
        "zero": "none" if config.deepspeed.stage is None else str(config.deepspeed.stage),
        "adapter": config.adapter.kind.value,
        "offload": offload[config.deepspeed.offload_optimizer, config.deepspeed.offload_parameters],
        "compile": str(config.model.compile).lower(),
        "weights": config.model.dtype.value,
        "bf16": str(bool(config.trainer.get("bf16", False))).lower(),
        "optimizer": str(config.trainer.get("optim", "adamw_torch")),
    }
