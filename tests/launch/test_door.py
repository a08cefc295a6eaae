"""The command line: what is refused, with which words and which exit status, before anything is loaded."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.cli.door import door
from tests.launch.scripts import LAUNCH, ROOT, SCHEMAS, script

WRONG = [
    (["model=tyny"], "error: model=tyny: no such choice; did you mean model=tiny?"),
    (["model=null"], "error: model=null: no such choice; known here: assembled, "),
    (["modl=tiny"], "error: modl: unknown key; did you mean model?"),
    (["data.pack_per_step=2"], "error: data.pack_per_step: unknown key; did you mean data.packs_per_step?"),
    (
        ["data.packs_per_step=0", "data.num_workers=-1"],
        "error: data.packs_per_step: 0 is too small; expected 1 or more",
    ),
    (["data.order=shufled"], "error: data.order: 'shufled' is no choice; did you mean shuffled?"),
    (["seed=one"], "error: seed: Value 'one' of type 'str' could not be converted to Integer"),
    (["deepspeed=zero3", "model.compile=true"], "error: this combination is not supported: deepspeed.stage=3, "),
    (["trainer.learning_rat=1"], "error: trainer.learning_rat: TrainingArguments has no such argument"),
    (["trainer.learning_rate=-1"], "error: trainer.learning_rate: -1 is too small; expected 0 or more"),
    (["trainer.optim=a=b"], "error: trainer.optim=a=b: expected key=value (mismatched input '='"),
    (
        ["data.sources.a.path=[my file.jsonl, b (1).jsonl]"],
        "error: data.sources.a.path=[my file.jsonl, b (1).jsonl]: expected key=value (",
    ),
    (["=3"], "error: =3: expected key=value"),
    (["seed"], "error: seed: expected key=value"),
    (["++sede=1"], "error: sede: unknown key; did you mean seed?"),
    (["~sede"], "error: Could not delete from config."),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run("pretrain", "seed=1", ...) -> exit status, output, errors of a launch script in a dry run."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        status = 0
        try:
            launch(script(name).main, name, SCHEMAS[name])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_is_wrong_ends_with_status_2_and_its_name(
    run: Callable[..., tuple[int, str, str]], arguments: list[str], says: str
) -> None:
    status, _, errors = run("pretrain", *arguments, "dry_run=true")
    assert (status, errors[: len(says)]) == (2, says)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("evaluate", [], "error: checkpoint: no value was given, and it has no default; set checkpoint=..."),
        (
            "evaluate",
            ["checkpoint=/nowhere", f"pairs={__file__}"],
            "error: /nowhere: no such folder, and not a hub id (owner/name)",
        ),
        ("recipe", ["stages.sfft={}"], "error: stages: 'sfft' is no choice; did you mean sft?"),
        (
            "recipe",
            ["data=none"],
            "error: data=none: data is a key of the stages; write \"overrides=['data=none']\" to set",
        ),
        ("recipe", ["trainer.bf16=true"], "error: trainer.bf16=true: trainer is a key of the stages; write "),
        ("recipe", ["evaluate=['seeed=1']", "dry_run=true"], "error: seeed: unknown key; did you mean seed?"),
        ("recipe", ["overrides=['trainer.lr=1']", "dry_run=true"], "error: trainer.lr: TrainingArguments has no such"),
    ],
)
def test_the_other_scripts_speak_alike(
    run: Callable[..., tuple[int, str, str]], name: str, arguments: list[str], says: str
) -> None:
    status, _, errors = run(name, *arguments)
    assert (status, errors[: len(says)]) == (2, says)


def test_a_right_one_is_planned(run: Callable[..., tuple[int, str, str]]) -> None:
    status, output, errors = run("pretrain", "dry_run=true", "model.freeze.lm_head=true", "tracker.wandb=off")
    assert (status, errors) == (0, "")
    assert "stage pretrain, run folder runs/pretrain" in output


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_process_says_it_too(ranks: int, tmp_path: Path) -> None:
    """Under plain python and under torchrun: the message, no traceback of ours, no run folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(LAUNCH / "pretrain.py"), f"run_dir={tmp_path}/run", "data.ordr=a"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == (1 if ranks else 2)
    assert "error: data.ordr: unknown key; did you mean data.order?" in done.stderr
    assert "qwen2audio_train/config.py" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_no_yaml_is_named(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: [1,\n")
    status, _, errors = run("pretrain", "--config-dir", str(tmp_path), "--config-name", "mine")
    assert (status, "mine.yaml" in errors, "Traceback" in errors) == (2, True, False)


def test_our_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["pretrain.py", "dry_run=true"])
    with pytest.raises(KeyError, match="ours"):
        launch(broken, "pretrain", SCHEMAS["pretrain"])


def test_configs_can_be_looked_at(run: Callable[..., tuple[int, str, str]]) -> None:
    status, output, _ = run("sft", "--cfg", "job")
    assert status == 0
    assert output.startswith("model:\n  kind: tiny")


def test_an_ascii_terminal_gets_every_letter_in_some_form(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with door():
        print("a\u4e2d")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"a\\u4e2d\n"


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EISDIR, False)])
def test_a_full_or_read_only_disk_says_which_keys_name_folders(
    number: int, hint: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, door():
        raise OSError(number, os.strerror(number), "data_cache/x")
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith(f"error: [Errno {number}] {os.strerror(number)}: 'data_cache/x'")
    assert ("data.cache_dir" in errors) is hint
