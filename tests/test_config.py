"""What the schema lets in and what it refuses, with the full key and the nearest right one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qwen2audio_train.config.combinations import COMBINATIONS, KEYS, refusal
from qwen2audio_train.config.data import Order, SourceFormat
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError, StageConfig, load_config
from qwen2audio_train.config.tools import EvaluateConfig
from qwen2audio_train.training.stages.arguments import deepspeed_config, training_arguments
from tests.runs import recipe

ROOT = Path(__file__).parents[1]

WRONG = [
    ("modle.kind=tiny", "modle: unknown key; did you mean model?"),
    ("model.vocabsize=3", "model.vocabsize: unknown key; did you mean model.vocab_size?"),
    ("data.sources.a.wieght=2", "data.sources.a.wieght: unknown key; did you mean data.sources.a.weight?"),
    ("data.augment.spedd=2", "data.augment.spedd: unknown key; did you mean data.augment.speed?"),
    ("zzz=1", "zzz: unknown key; known here: adapter, ctc, data, "),
    ("data.packs_per_step=many", "data.packs_per_step: Value 'many' of type 'str' could not be converted"),
    ("data.max_bad_share=much", "data.max_bad_share: Value 'much' of type 'str' could not be converted"),
    ("model.compile=perhaps", "model.compile: Value 'perhaps' is not a valid bool"),
    ("data.packs_per_step=1.5", "data.packs_per_step: Value '1.5' of type 'float' could not be converted"),
    ("data.packs_per_step=null", "data.packs_per_step: Incompatible value 'None' for field of type 'int'"),
    ("data.sources.a.path=a.jsonl", "data.sources.a.path: 'a.jsonl' is no list; write data.sources.a.path=[a.jsonl]"),
    ("data.order=shufled", "data.order: 'shufled' is no choice; did you mean shuffled?"),
    ("data.sources.a.format=kaldy", "data.sources.a.format: 'kaldy' is no choice; did you mean kaldi?"),
    ("model.dtype=fp8", "model.dtype: 'fp8' is no choice; known here: bfloat16, float32"),
    ("tracker.wandb=off", "tracker.wandb: YAML reads a bare no or off as false; put it in quotes"),
    ("stage=pretraining", "stage: 'pretraining' is no choice; did you mean pretrain?"),
    ("model=tiny", "model: 'tiny' is no group of keys"),
    ("data.packs_per_step=0", "data.packs_per_step: 0 is too small; expected 1 or more"),
    ("data.packs_per_forward=-1", "data.packs_per_forward: -1 is too small; expected 1 or more"),
    ("data.num_workers=-1", "data.num_workers: -1 is too small; expected 0 or more"),
    ("data.window_examples=0", "data.window_examples: 0 is too small"),
    ("data.sources.a.weight=-2", "data.sources.a.weight: -2.0 is too small"),
    ("adapter.r=0", "adapter.r: 0 is too small"),
    ("adapter.dropout=1.5", "adapter.dropout: 1.5 is too large; expected 1 or less"),
    ("data.max_bad_share=2", "data.max_bad_share: 2.0 is too large"),
    ("optimizer.learning_rates.lm_head=-1", "optimizer.learning_rates.lm_head: -1.0 is too small"),
    ("optimizer.learning_rates.head=1", "optimizer.learning_rates: 'head' is no choice; did you mean lm_head?"),
    ("adapter.modules=[languagemodel]", "adapter.modules: 'languagemodel' is no choice; did you mean language_model?"),
    (
        "model.activation_checkpointing=[encoder]",
        "model.activation_checkpointing: 'encoder' is no choice; known here: audio_tower, language_model",
    ),
]

TRAINER_WRONG = [
    ("trainer.learning_rat=1", "trainer.learning_rat: TrainingArguments has no such argument; did you mean"),
    ("trainer.learning_rate=high", "trainer.learning_rate: 'high' is a str, expected float"),
    ("trainer.learning_rate=-1e-4", "trainer.learning_rate: -0.0001 is too small"),
    ("trainer.max_steps=2.5", "trainer.max_steps: 2.5 is a float, expected int"),
    ("trainer.max_steps=0", "trainer.max_steps: 0 is too small; expected 1 or more"),
    ("trainer.bf16=1", "trainer.bf16: 1 is a int, expected bool"),
    ("trainer.seed=1", "trainer.seed: decided elsewhere in the recipe; set seed instead"),
    (
        "trainer.num_train_epochs=1",
        "trainer.num_train_epochs: decided elsewhere in the recipe; set trainer.max_steps instead",
    ),
    (
        "trainer.gradient_accumulation_steps=2",
        "trainer.gradient_accumulation_steps: decided elsewhere in the recipe; set data.packs_per_step",
    ),
    ("trainer.lr_scheduler_type=cosin", "trainer.lr_scheduler_type: 'cosin' is no choice; did you mean cosine?"),
    ("trainer.save_strategy=stepz", "trainer.save_strategy: 'stepz' is no choice; did you mean steps?"),
    ("trainer.save_strategy=no", "trainer.save_strategy: YAML reads a bare no or off as false; put it in quotes"),
    ("trainer.warmup_steps=-1", "trainer.warmup_steps: -1 is too small"),
    ("trainer.logging_steps=0", "trainer.logging_steps: 0 is too small; expected 1 or more, or a share of max_steps"),
    (
        "trainer.label_smoothing_factor=0.1",
        "trainer.label_smoothing_factor: has no place in this project: Trainer smooths dense logits",
    ),
]


def refused(override: str, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as info:
        training_arguments(recipe(tmp_path, tmp_path, override))
    return str(info.value)


@pytest.mark.parametrize(("override", "says"), WRONG + TRAINER_WRONG)
def test_what_is_wrong_is_named_in_full(override: str, says: str, tmp_path: Path) -> None:
    assert refused(override, tmp_path).startswith(says)


def test_every_unknown_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as info:
        load_config({"naem": "x", "data": {"sorces": {}}, "stage": "sft", "name": "x"}, StageConfig)
    assert str(info.value).splitlines() == [
        "naem: unknown key; did you mean name?",
        "data.sorces: unknown key; did you mean data.sources?",
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage=dpo"], "it is for the stages pretrain and sft"),
        (["adapter.kind=lora"], "it trains the projector as a whole; set adapter.kind=none"),
        (["model.freeze.multi_modal_projector=true"], "set model.freeze.multi_modal_projector=false"),
        (["deepspeed.stage=3"], "it has no support for ZeRO-3; set deepspeed.stage=2"),
    ],
)
def test_an_auxiliary_loss_that_would_do_nothing_is_refused(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^ctc\.weight=0\.5: .*{says}.*or set ctc\.weight=0$"):
        recipe(tmp_path, tmp_path, "ctc.weight=0.5", *overrides)
    recipe(tmp_path, tmp_path, "ctc.weight=0", *overrides)


@pytest.mark.parametrize(
    ("schema", "given", "missing"),
    [
        (StageConfig, {"stage": "sft", "name": "x"}, "model.kind"),
        (EvaluateConfig, {"checkpoint": "x"}, "output_dir"),
        (RecipeConfig, {}, "name"),
    ],
)
def test_what_is_missing_is_named(schema: Any, given: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{missing}: no value was given, and it has no default; set {missing}="):
        load_config(given, schema)


def test_right_values_arrive_in_their_types(tmp_path: Path) -> None:
    config = recipe(
        tmp_path, tmp_path, "data.order=short_first", "data.sources.speech.format=manifest", "adapter.dropout=0"
    )
    assert config.data.order is Order.short_first
    assert config.data.sources["speech"].format is SourceFormat.manifest
    assert isinstance(config.adapter.dropout, float)
    assert config.run_dir == str(tmp_path)


def test_interpolations_are_resolved() -> None:
    given = {"stage": "sft", "name": "x", "model": {"kind": "tiny"}, "data": {"seed": "${seed}"}, "seed": 7}
    config = load_config(OmegaConf.create(given), StageConfig)
    assert (config.data.seed, config.run_dir) == (7, "runs/x")


def test_an_interpolation_of_nothing_is_named() -> None:
    given = {"stage": "sft", "name": "x", "model": {"kind": "tiny"}, "data": {"seed": "${sed}"}}
    with pytest.raises(ConfigError, match=r"data\.seed: .*sed"):
        load_config(OmegaConf.create(given), StageConfig)


def test_deepspeed_gets_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    """A key of DeepSpeed's ZeRO part joins those of the recipe; one that the recipe decides is refused."""
    config = recipe(tmp_path, tmp_path, "deepspeed.stage=2", "deepspeed.extra.zero_optimization.overlap_comm=true")
    config.deepspeed.extra["steps_per_print"] = 7
    found = deepspeed_config(config)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
    assert found["steps_per_print"] == 7
    config.deepspeed.extra["zero_optimization"]["stage"] = 3
    with pytest.raises(ConfigError, match=r"extra\.zero_optimization\.stage: decided .* set deepspeed\.stage instead"):
        deepspeed_config(config)
    config.deepspeed.extra = {"gradient_clipping": 1.0}
    with pytest.raises(ConfigError, match=r"extra\.gradient_clipping: .* set trainer\.max_grad_norm instead"):
        deepspeed_config(config)


# The table of combinations -------------------------------------------------------------------------------------------


def choice(**changes: str) -> dict[str, str]:
    plain = {"zero": "none", "adapter": "none", "offload": "none", "compile": "false"}
    return plain | {"weights": "float32", "bf16": "false", "optimizer": "adamw_torch"} | changes


def test_every_row_of_the_table_is_allowed() -> None:
    for row in COMBINATIONS:
        for name in KEYS:
            for value in getattr(row, name):
                others = {other: min(getattr(row, other)) for other in KEYS}
                assert refusal(others | {name: value}) is None


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"zero": "3", "compile": "true"}, "deepspeed.stage one of 0, 1, 2, none; or model.compile=false"),
        ({"zero": "3", "adapter": "qlora"}, "deepspeed.stage one of 0, 1, 2, none; or adapter.kind one of lora, none"),
        ({"offload": "optimizer"}, f"deepspeed.stage one of 1, 2, 3; or {KEYS['offload']}=none"),
        (
            {"zero": "2", "offload": "both"},
            f"deepspeed.stage=3; or {KEYS['offload']} one of none, optimizer",
        ),
        (
            {"optimizer": "adamw"},
            "trainer.optim one of adafactor, adamw_bnb_8bit, adamw_torch, adamw_torch_fused, paged_adamw_8bit, sgd",
        ),
        (
            {"zero": "0", "bf16": "true"},
            "deepspeed.stage one of 1, 2, 3, none; or trainer.bf16=false",
        ),
        (
            {"zero": "2", "weights": "bfloat16"},
            "model.dtype=float32; or trainer.bf16=true",
        ),
        (
            {"weights": "bfloat16"},
            "adapter.kind one of lora, qlora; or model.dtype=float32; "
            "or trainer.optim one of adamw_bf16_kahan, adamw_bf16_stochastic",
        ),
        (
            {"optimizer": "adamw_bf16_kahan"},
            "model.dtype=bfloat16; or trainer.optim one of adafactor, adamw_bnb_8bit, adamw_torch, adamw_torch_fused, "
            "paged_adamw_8bit, sgd",
        ),
        (
            {"zero": "2", "offload": "both", "compile": "true"},
            f"{KEYS['offload']}=none",
        ),
        (
            {"zero": "3", "adapter": "qlora", "compile": "true"},
            "adapter.kind one of lora, none and model.compile=false",
        ),
    ],
)
def test_what_is_in_no_row_is_refused_with_the_nearest(changes: dict[str, str], remedy: str) -> None:
    reason = refusal(choice(**changes))
    assert reason is not None
    assert reason.endswith(f"The nearest that is: {remedy}")
    for name, value in changes.items():
        assert f"{KEYS[name]}={value}" in reason


def test_the_schema_asks_the_table(tmp_path: Path) -> None:
    assert "this combination is not supported" in refused("deepspeed.offload_optimizer=true", tmp_path)


def test_a_compiled_block_takes_no_policy_of_what_it_keeps(tmp_path: Path) -> None:
    selective = ["model.activation_checkpointing=[audio_tower]", "model.activation_checkpointing_policy=selective"]
    training_arguments(recipe(tmp_path, tmp_path, *selective))
    with pytest.raises(ConfigError, match=r"policy=selective with model\.compile=true.*take one of the two"):
        training_arguments(recipe(tmp_path, tmp_path, *selective, "model.compile=true"))


def test_gradients_of_many_forwards_are_summed_in_float32_unless_said_otherwise(tmp_path: Path) -> None:
    def types(forwards: int, *overrides: str) -> Any:
        packs = f"data.packs_per_step={forwards}"
        return deepspeed_config(recipe(tmp_path, tmp_path, "deepspeed.stage=2", packs, *overrides))["data_types"]

    assert types(15, "trainer.bf16=true") == types(16) == {}
    assert types(16, "trainer.bf16=true") == {"grad_accum_dtype": "fp32"}
    given = "deepspeed.extra.data_types.grad_accum_dtype=bf16"
    assert types(16, "trainer.bf16=true", given) == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_allocator_of_a_gpu_is_set_up_unless_the_environment_does(given: dict[str, str], expected: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    code = "import os, qwen2audio_train; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_page_shows_the_table() -> None:
    from qwen2audio_train.config.combinations import table

    assert table() in (ROOT / "docs" / "combinations.md").read_text()
