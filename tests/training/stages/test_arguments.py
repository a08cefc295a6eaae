"""The table of Trainer's and TRL's arguments: complete, and each refused with a reason or seen to work."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import TrainingArguments
from transformers.utils import logging
from trl import DPOConfig, KTOConfig

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.stages.argument_table import SECTIONS, arguments_table, entries, table
from qwen2audio_train.training.stages.arguments import training_arguments
from tests.runs import build_trainer, logged, pairs_recipe, recipe

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent

ALL_ENTRIES = [(section, name, entry) for section, rows in arguments_table().items() for name, entry in rows.items()]


@pytest.mark.parametrize("kind", [TrainingArguments, DPOConfig, KTOConfig])
def test_every_field_is_in_the_table_and_nothing_else(kind: type) -> None:
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    installed = Version(version("transformers"))
    listed = {
        name
        for section in SECTIONS[kind]
        for name, entry in arguments_table()[section].items()
        if Version(str(entry.get("since", "0"))) <= installed
    }
    assert listed == fields


@pytest.mark.parametrize(("section", "name", "entry"), ALL_ENTRIES, ids=[f"{s}.{n}" for s, n, _ in ALL_ENTRIES])
def test_every_entry_says_one_thing(section: str, name: str, entry: dict[str, Any]) -> None:
    """It works, and a test that names it or a reason says so; or another key decides it; or it is refused."""
    assert len({"works", "set", "refused"} & set(entry)) == 1
    assert set(entry) <= {"works", "values", "least", "most", "test", "untested", "set", "refused", "instead", "since"}
    if "works" in entry:
        assert ("test" in entry) != ("untested" in entry)
    if "test" in entry:
        assert name in (TESTS / entry["test"]).read_text()


def test_the_page_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "arguments.md").read_text()


def of_type(kind: type, name: str) -> Any:
    """A value that the type of a field allows."""
    hint = {field.name: str(field.type) for field in dataclasses.fields(kind)}[name]
    return next((value for word, value in (("bool", True), ("int", 2), ("float", 0.5)) if word in hint), "x")


@pytest.mark.parametrize("kind", [TrainingArguments, DPOConfig, KTOConfig])
def test_what_does_not_work_is_refused_with_its_reason(kind: type, tmp_path: Path) -> None:
    objective = ["preference.objective=kto"] if kind is KTOConfig else []
    config = (recipe if kind is TrainingArguments else pairs_recipe)(tmp_path, tmp_path, *objective)
    for name, entry in entries(kind).items():
        if "works" in entry:
            continue
        wrong = dataclasses.replace(config, trainer={**config.trainer, name: of_type(kind, name)})
        with pytest.raises(ConfigError) as info:
            training_arguments(wrong)
        assert str(info.value).startswith(f"trainer.{name}: ")
        assert entry.get("set", entry.get("refused")) in str(info.value)
        assert entry.get("instead", "") in str(info.value)


REFUSED_VALUES = [
    (["trainer.save_strategy=epoch"], r"trainer\.save_strategy: an epoch here is the whole run, .* at the end"),
    (["trainer.eval_strategy=epoch"], r"trainer\.eval_strategy: an epoch here is the whole run"),
    (["trainer.logging_strategy=epoch"], r"trainer\.logging_strategy: an epoch here is the whole run"),
    (["trainer.eval_steps=1"], r"trainer\.eval_steps=1: does nothing without trainer\.eval_strategy=steps"),
    (["trainer.eval_delay=1"], r"trainer\.eval_delay=1: does nothing without trainer\.eval_strategy=steps"),
    (["trainer.save_steps=2"], r"trainer\.save_steps=2: does nothing without trainer\.save_strategy=steps"),
    (['trainer.logging_strategy="no"'], r"trainer\.logging_steps=1: does nothing without trainer\.logging_strategy"),
    (["trainer.logging_steps=-5"], r"trainer\.logging_steps: -5 is too small"),
    (["trainer.save_strategy=best"], r"trainer\.save_strategy=best: nothing says which is best; set trainer\.eval_str"),
    (
        ["trainer.metric_for_best_model=eval_loss"],
        r"metric_for_best_model=eval_loss: does nothing without trainer\.save",
    ),
    (["trainer.neftune_noise_alpha=5"], r"trainer\.neftune_noise_alpha: .*length of the pack"),
    (["trainer.use_liger_kernel=true"], r"trainer\.use_liger_kernel: .*knows no qwen2_audio"),
    (["trainer.debug=underflow_overflow"], r"trainer\.debug: has no place in this project"),
    (["trainer.torch_compile_mode=max-autotune"], r"trainer\.torch_compile_mode: .*use model\.compile instead"),
    (["trainer.logging_nan_inf_filter=true"], r"trainer\.logging_nan_inf_filter: "),
    (["trainer.lr_scheduler_type=reduce_lr_on_plateau"], r"trainer\.lr_scheduler_type: .*follows evaluations"),
    (["trainer.lr_scheduler_type=cosine_with_min_lr"], r"cosine_with_min_lr refuses \{\}.* it takes .*min_lr"),
    (
        ["trainer.lr_scheduler_type=warmup_stable_decay"],
        r"warmup_stable_decay refuses \{\}.* it takes .*num_decay_steps",
    ),
    (["trainer.lr_scheduler_kwargs.num_cycle=2"], r"cosine refuses \{'num_cycle': 2\} .* it takes num_cycles"),
    (["trainer.lr_scheduler_kwargs=x"], r"trainer\.lr_scheduler_kwargs: 'x' is a str, expected key: value pairs"),
    (["trainer.lr_scheduler_type=constant"], r"trainer\.warmup_steps=1: the schedule constant has no warmup"),
    (
        ["trainer.lr_scheduler_type=constant_with_warmup", "trainer.lr_scheduler_kwargs.x=1"],
        r"trainer\.lr_scheduler_kwargs: the schedule constant_with_warmup takes nothing besides",
    ),
    (["trainer.adam_beta2=1.5"], r"trainer\.adam_beta2: 1\.5 is too large; expected 1 or less"),
    (["trainer.eval_on_start=true"], r"trainer\.eval_on_start=True: there are no data\.eval_sources"),
]

REFUSED_PREFERENCES = [
    (["trainer.loss_type=[sigmoide]"], r"trainer\.loss_type: 'sigmoide' is no choice; did you mean sigmoid"),
    (["trainer.loss_weights=[1.0,2.0]"], r"trainer\.loss_weights: 2 weights for 1 losses"),
    (["trainer.label_smoothing=0.1"], r"trainer\.label_smoothing=0\.1: does nothing without trainer\.loss_type one of"),
    (["trainer.loss_type=[exo_pair]"], r"trainer\.loss_type=exo_pair: set trainer\.label_smoothing above 0"),
    (["trainer.discopop_tau=0.1"], r"trainer\.discopop_tau=0\.1: does nothing without trainer\.loss_type=\[discopop\]"),
    (["trainer.loss_type=[aot]", "trainer.use_weighting=true"], r"trainer\.use_weighting: aot and aot_unpaired"),
    (
        ["trainer.loss_type=[apo_zero]", "trainer.f_divergence_type=js_divergence"],
        r"trainer\.f_divergence_type=js_divergence: apo_zero knows reverse_kl alone",
    ),
    (["trainer.f_alpha_divergence_coef=0.4"], r"does nothing without trainer\.f_divergence_type=alpha_divergence"),
    (["preference.objective=kto", "trainer.loss_type=sigmoid"], r"trainer\.loss_type: 'sigmoid' is no choice"),
    (["trainer.sync_ref_model=true"], r"trainer\.sync_ref_model: .*a reference that moves is in no checkpoint"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED_VALUES, ids=lambda value: str(value)[:50])
def test_values_without_a_meaning_are_refused(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        training_arguments(recipe(tmp_path, tmp_path, *overrides))


@pytest.mark.parametrize(("overrides", "says"), REFUSED_PREFERENCES, ids=lambda value: str(value)[:50])
def test_preference_values_without_a_meaning_are_refused(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        training_arguments(pairs_recipe(tmp_path, tmp_path, *overrides))


# What works ---------------------------------------------------------------------------------------------------------


def run(noise: Path, run_dir: Path, *overrides: str, make: Any = recipe) -> Any:
    trainer = build_trainer(make(noise, run_dir, *overrides))
    trainer.train()
    return trainer


SCHEDULES = [
    ("linear", {}, [0, 1, 2 / 3, 1 / 3]),
    ("constant_with_warmup", {}, [0, 1, 1, 1]),
    ("cosine_with_min_lr", {"min_lr_rate": 0.5}, [0, 1, 0.875, 0.625]),
    ("polynomial", {"lr_end": 1e-3, "power": 2.0}, [0, 1, 0.1 + 0.9 * 4 / 9, 0.1 + 0.9 / 9]),
    ("inverse_sqrt", {"timescale": 1}, [0, 1, 0.5**0.5, 3**-0.5]),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}, [0, 1, 1, 0.5]),
]


@pytest.mark.parametrize(("name", "options", "factors"), SCHEDULES)
def test_schedules_are_those_of_their_formulas(
    name: str, options: dict[str, Any], factors: list[float], noise: Path, tmp_path: Path
) -> None:
    """Rates of four steps, one of warmup; lr_scheduler_kwargs reach the schedule."""
    given = [f"trainer.lr_scheduler_kwargs.{key}={value}" for key, value in options.items()]
    overrides = [f"trainer.lr_scheduler_type={name}", *given]
    trainer = run(noise, tmp_path, "data.packs_per_step=1", *overrides)
    rates = [rate / 1e-2 for (rate,) in logged(recipe(noise, tmp_path), "learning_rate")]
    assert rates == pytest.approx(factors, abs=1e-6)
    assert trainer.state.global_step == 4


def test_warmup_below_one_is_a_share(noise: Path, tmp_path: Path) -> None:
    run(noise, tmp_path, "data.packs_per_step=1", "trainer.warmup_steps=0.5", "trainer.lr_scheduler_type=linear")
    assert [rate for (rate,) in logged(recipe(noise, tmp_path), "learning_rate")] == [0, 5e-3, 1e-2, 5e-3]


def test_optimizer_arguments_reach_adamw(noise: Path, tmp_path: Path) -> None:
    overrides = ["trainer.adam_beta1=0.7", "trainer.adam_epsilon=1e-3"]
    optimizer = build_trainer(recipe(noise, tmp_path, *overrides)).create_optimizer()
    assert all(group["betas"][0] == 0.7 and group["eps"] == 1e-3 for group in optimizer.param_groups)


def test_the_gradient_is_clipped_to_max_grad_norm(noise: Path, tmp_path: Path) -> None:
    """The second step, the first with a rate, moves plain SGD's weights by rate x max_grad_norm."""
    moved = {}
    for norm in (0.0, 1e-3):
        overrides = ["trainer.optim=sgd", "trainer.max_steps=2", f"trainer.max_grad_norm={norm}"]
        trainer = build_trainer(recipe(noise, tmp_path / str(norm), *overrides))
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        moved[norm] = float((after - before).norm())
    assert moved[1e-3] == pytest.approx(1e-2 * 1e-3, rel=2e-3)
    assert moved[0.0] > 1e-2


def test_lines_and_evaluations_come_when_asked(noise: Path, tmp_path: Path) -> None:
    """logging_steps as a share, logging_first_step, eval_steps, eval_delay, eval_on_start."""
    overrides = [
        f"data.eval_sources.speech.path=[{noise}/speech.jsonl]",
        "trainer.logging_steps=0.5",
        "trainer.logging_first_step=true",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "trainer.eval_delay=3",
        "trainer.eval_on_start=true",
        "data.packs_per_step=1",
    ]
    history = run(noise, tmp_path, *overrides).state.log_history
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 4]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 3, 4]


def test_the_best_checkpoint_is_saved(noise: Path, tmp_path: Path) -> None:
    """save_strategy=best by metric_for_best_model and greater_is_better: what never rises is saved once."""
    overrides = [
        f"data.eval_sources.speech.path=[{noise}/speech.jsonl]",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "trainer.save_strategy=best",
        "trainer.save_total_limit=2",
        "trainer.metric_for_best_model=eval_loss",
        "trainer.greater_is_better=true",
        "trainer.learning_rate=0.0",
    ]
    run(noise, tmp_path, *overrides)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_nothing_is_logged_where_the_strategy_is_no(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path, "data.packs_per_step=1")
    config.trainer |= {"logging_strategy": "no"}
    del config.trainer["logging_steps"]
    trainer = build_trainer(config)
    trainer.train()
    assert not [line for line in trainer.state.log_history if "loss" in line]


def test_log_level_is_that_of_transformers(noise: Path, tmp_path: Path) -> None:
    before = logging.get_verbosity()
    try:
        build_trainer(recipe(noise, tmp_path, "trainer.log_level=error"))
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(before)


def test_full_determinism_is_switched_on(noise: Path, tmp_path: Path) -> None:
    try:
        build_trainer(recipe(noise, tmp_path, "trainer.full_determinism=true"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_rank_arguments_reach_accelerate(noise: Path, tmp_path: Path) -> None:
    overrides = ["trainer.ddp_bucket_cap_mb=7", "trainer.ddp_broadcast_buffers=false", "trainer.max_steps=1"]
    handler = run(noise, tmp_path, *overrides).accelerator.ddp_handler
    assert (handler.bucket_cap_mb, handler.broadcast_buffers) == (7, False)


def test_preference_arguments_reach_trl(noise: Path, tmp_path: Path) -> None:
    """disable_dropout=false leaves an adapter's dropout on; discopop_tau and undesirable_weight are TRL's own."""
    lora = ["adapter.kind=lora", "adapter.dropout=0.3", "trainer.disable_dropout=false"]
    dpo = build_trainer(
        pairs_recipe(noise, tmp_path / "a", *lora, "trainer.loss_type=[discopop]", "trainer.discopop_tau=0.1")
    )
    assert {m.p for m in dpo.model.modules() if isinstance(m, torch.nn.Dropout)} >= {0.3}
    assert dpo.args.discopop_tau == 0.1
    kto = build_trainer(
        pairs_recipe(noise, tmp_path / "b", "preference.objective=kto", "trainer.undesirable_weight=0.4")
    )
    assert kto.undesirable_weight == 0.4
