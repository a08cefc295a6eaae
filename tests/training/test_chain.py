"""Stages in a row: where a recipe goes on, what it refuses, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError, load_config
from qwen2audio_train.training import chain
from qwen2audio_train.training.chain import LEDGER, Entry, StageFailed, run_stages, stage_overrides
from tests.launch.scripts import LAUNCH, RECIPES, ROOT, composed
from tests.runs import ARCHITECTURE

Calls = list[tuple[str, dict[str, str]]]


def recipe_of(run_dir: Path, **changes: Any) -> RecipeConfig:
    stages = {"pretrain": {}, "sft": {"overrides": ["trainer.max_steps=7"]}, "dpo": {"decodes": False}}
    values = {"name": "r", "run_dir": str(run_dir), "stages": stages, "evaluate": ["max_examples=3"]}
    return load_config(values | changes, RecipeConfig)


def compose(root: str, overrides: list[str]) -> Any:
    return composed(root, *overrides)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What would have been run: (script, its overrides)."""
    found: Calls = []

    def run(script: Path, overrides: list[str], ranks: int) -> None:
        assert ranks == 1
        found.append((script.stem, dict(text.split("=", 1) for text in overrides)))

    monkeypatch.setattr(chain, "run_script", run)
    return found


def fail_at(monkeypatch: pytest.MonkeyPatch, calls: Calls, number: int, error: BaseException) -> None:
    """Let the call `number` fail."""
    run = chain.run_script

    def failing(*args: Any) -> None:
        if len(calls) + 1 == number:
            raise error
        run(*args)

    monkeypatch.setattr(chain, "run_script", failing)


def names(calls: Calls) -> list[str]:
    return [name for name, _ in calls]


def go(recipe: RecipeConfig) -> dict[str, Entry]:
    return run_stages(recipe, compose, LAUNCH)


def test_stages_run_in_a_row_each_from_the_one_before(calls: Calls, tmp_path: Path) -> None:
    entries = go(recipe_of(tmp_path, seed=5))
    assert names(calls) == ["pretrain", "evaluate", "sft", "evaluate", "dpo"]
    pretrain, scored, sft, _, dpo = (overrides for _, overrides in calls)
    assert "init_from" not in pretrain
    assert (sft["init_from"], sft["run_dir"]) == (f"{tmp_path}/pretrain", f"{tmp_path}/sft")
    assert (dpo["init_from"], dpo["seed"], sft["trainer.max_steps"]) == (f"{tmp_path}/sft", "5", "7")
    assert (scored["checkpoint"], scored["max_examples"]) == (f"{tmp_path}/pretrain", "3")
    assert [bool(entry.evaluated) for entry in entries.values()] == [True, True, False]
    assert all(entry.trained and "train" in entry.wall_s for entry in entries.values())


def test_a_stage_says_by_which_key_the_next_one_starts_from_it(tmp_path: Path) -> None:
    for key in ("init_from", "model.audio_encoder"):
        recipe = recipe_of(tmp_path, stages={"encoder": {"hands_on": key}, "pretrain": {}})
        assert f"{key}={tmp_path}/encoder" in stage_overrides(recipe, "pretrain", "encoder")


def test_the_stage_before_answers_for_the_pairs_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(chain, "run_script", lambda script, overrides, ranks: found.append((script.stem, overrides)))
    stages = {"sft": {"decodes": False}, "dpo": {"decodes": False, "pairs": ["num_answers=3"]}}
    go(recipe_of(tmp_path, stages=stages, seed=4))
    assert [name for name, _ in found] == ["sft", "pairs", "dpo"]
    place = [f"checkpoint={tmp_path}/sft", f"output={tmp_path}/pairs.jsonl"]
    assert found[1][1] == ["sample", *place, "seed=4", "num_answers=3"]


def test_finished_stages_are_not_run_again(calls: Calls, tmp_path: Path) -> None:
    go(recipe_of(tmp_path))
    calls.clear()
    go(recipe_of(tmp_path))
    assert calls == []


@pytest.mark.parametrize("error", [StageFailed("sft.py ended with status 1"), KeyboardInterrupt()])
def test_it_goes_on_at_the_stage_that_is_not_done(
    error: BaseException, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, calls, 3, error)
    with pytest.raises(type(error)):
        go(recipe_of(tmp_path))
    ledger = json.loads((tmp_path / LEDGER).read_text())
    assert [ledger[name]["trained"] for name in ("pretrain", "sft")] == [True, False]
    assert "train" in ledger["sft"]["wall_s"]
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(chain, "run_script", lambda script, overrides, ranks: calls.append((script.stem, {})))
    go(recipe_of(tmp_path))
    assert names(calls) == ["sft", "evaluate", "dpo"]


def test_a_failed_evaluation_does_not_train_again(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, calls, 2, StageFailed("evaluate.py ended with status 1"))
    with pytest.raises(StageFailed):
        go(recipe_of(tmp_path))
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(chain, "run_script", lambda script, overrides, ranks: calls.append((script.stem, {})))
    go(recipe_of(tmp_path))
    assert names(calls) == ["evaluate", "sft", "evaluate", "dpo"]


def test_another_evaluation_is_done_anew(calls: Calls, tmp_path: Path) -> None:
    go(recipe_of(tmp_path))
    calls.clear()
    go(recipe_of(tmp_path, evaluate=["max_examples=4"]))
    assert names(calls) == ["evaluate", "evaluate"]


def test_a_finished_stage_whose_config_changed_is_refused(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, calls, 3, StageFailed(""))
    with pytest.raises(StageFailed):
        go(recipe_of(tmp_path))
    calls.clear()
    says = f"stage pretrain of {tmp_path} is finished, and its config has changed since .*pretrain/config.yaml"
    with pytest.raises(ConfigError, match=says):
        go(recipe_of(tmp_path, overrides=["trainer.max_steps=3"]))
    assert calls == []


def test_an_unfinished_stage_may_change(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, calls, 3, StageFailed(""))
    with pytest.raises(StageFailed):
        go(recipe_of(tmp_path))
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(chain, "run_script", lambda script, overrides, ranks: calls.append((script.stem, {})))
    stages = {"pretrain": {}, "sft": {"overrides": ["trainer.max_steps=9"]}, "dpo": {"decodes": False}}
    go(recipe_of(tmp_path, stages=stages))
    assert names(calls) == ["sft", "evaluate", "dpo"]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"overrides": ["data.ordr=9"]}, "data.ordr: unknown key; did you mean data.order"),
        ({"overrides": ["trainer.max_step=9"]}, "trainer.max_step: TrainingArguments has no such argument; did you"),
        ({"evaluate": ["max_exampels=9"]}, "max_exampels: unknown key; did you mean max_examples"),
    ],
)
def test_what_is_wrong_in_any_stage_is_refused_before_the_first_one_runs(
    stage: dict[str, list[str]], says: str, calls: Calls, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        go(recipe_of(tmp_path, stages={"pretrain": {}, "sft": stage}))
    assert calls == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"pretrain": {"trained": true}}', '{"pretrain": 3}'])
def test_a_damaged_ledger_is_named(content: str, calls: Calls, tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text(content)
    with pytest.raises(ConfigError, match=r"ledger\.json: damaged, it is no ledger of stages"):
        go(recipe_of(tmp_path))


# Real processes -------------------------------------------------------------------------------------------------------


def tiny_overrides(noise: Path) -> list[str]:
    """Overrides that make the stages of the published recipe tiny runs over noise."""
    small = [
        f"model.architecture.{part}.{key}={value}" for part, keys in ARCHITECTURE.items() for key, value in keys.items()
    ]
    return [
        *small,
        "model.num_mel_bins=16",
        "model.architecture.audio_config.num_mel_bins=16",
        "data=none",
        f"data.sources.noise.path=[{noise}/speech.jsonl]",
        f"data.cache_dir={noise}/cache",
        "data.tokens_per_pack=100",
        "data.packs_per_step=2",
        "data.num_workers=0",
        "trainer.bf16=false",
        "trainer.logging_steps=1",
        "trainer.save_steps=1",
        "tracker=off",
    ]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """launch/recipe.py in a process group of its own, as from a terminal."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(LAUNCH / "recipe.py"), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)


def lives(marker: str) -> bool:
    """Whether a process has `marker` on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_text():
                return True
        except OSError:
            continue
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes through /proc")
def test_ctrl_c_stops_every_rank_and_the_recipe_goes_on(noise: Path, tmp_path: Path) -> None:
    """Two ranks are stopped by the signal that a terminal sends; started again, the stage goes on at its checkpoint."""
    assert RECIPES.is_dir()
    quoted = ",".join(f"'{text}'" for text in [*tiny_overrides(noise), "trainer.max_steps=200"])
    arguments = [f"run_dir={tmp_path}/run", "nproc_per_node=2", f"overrides=[{quoted}]", "~stages"]
    arguments += ["+stages={pretrain: {decodes: false}}", "evaluate=[]"]
    process = start(arguments, tmp_path)
    stage = tmp_path / "run" / "pretrain"
    wait_for(lambda: any(stage.glob("checkpoint-*/MANIFEST.json")), process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-3000:]
    assert not lives(f"run_dir={tmp_path}/run/pretrain")
    ledger = json.loads((tmp_path / "run" / LEDGER).read_text())
    assert ledger["pretrain"]["trained"] is False
    assert ledger["pretrain"]["wall_s"]["train"] > 0
    again = start(arguments, tmp_path)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output[-3000:]
    assert f"resuming from {tmp_path}/run/pretrain/checkpoint-" in output
    lines = [json.loads(line) for line in (tmp_path / "run" / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 201))
    assert json.loads((tmp_path / "run" / LEDGER).read_text())["pretrain"]["trained"] is True


def test_a_second_recipe_in_the_same_folder_is_refused(calls: Calls, tmp_path: Path) -> None:
    code = "import fcntl; f = open('lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is training there"):
            go(recipe_of(tmp_path))
        other.communicate("\n")
    assert calls == []
