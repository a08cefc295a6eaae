"""The console script, from a wheel and outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen2audio_train.cli.completion import script
from qwen2audio_train.cli.main import known_keys, main, stories
from tests.launch.scripts import LAUNCH, ROOT


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_it_lists_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of() == 0
    lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in LAUNCH.glob("*.py")} - {"__init__"}
    assert {line.split()[0] for line in lines if line[:2] == "  " and line.split()[0] in names} == names
    assert all(stories().values())


def test_a_misspelt_name_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("pretran") == 2
    assert capsys.readouterr().err == "error: pretran: no such command; did you mean pretrain?\n"


def test_a_tool_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("data", "chek") == 2
    assert "error: chek: no such command; did you mean check?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("finet", ["finetune"]),
        ("finetune held_out", ["held_out=", "held_out_share="]),
        ("--nproc=2 sft model.freeze.audio", ["model.freeze.audio_tower="]),
        ("sft data.so", ["data.sources.", "data.sources="]),
        ("evaluate che", ["checkpoint="]),
    ],
)
def test_bash_completes_commands_and_keys(words: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "completion").write_text(script(known_keys()))
    typed = f"COMP_WORDS=(qwen2audio-train {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _qwen2audio_train"
    command = f'source completion; {typed}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(set(done.stdout.split())) == expected


@pytest.mark.slow
def test_a_wheel_runs_a_stage_from_any_folder(tmp_path: Path) -> None:
    """Built as `pip install .` builds it and unpacked elsewhere: a dry run, and a mistake, under torchrun."""
    source = tmp_path / "source"
    for name in ("qwen2audio_train", "launch", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    code = "from qwen2audio_train.cli.main import main; main()"
    command = [sys.executable, "-c", code, "pretrain", "dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage pretrain, run folder runs/pretrain" in done.stdout
    wrong = [*command, "data.ordr=a"]
    done = subprocess.run(wrong, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "error: data.ordr: unknown key; did you mean data.order?" in done.stderr
    assert "Traceback" not in done.stderr
