"""The path through a GPU, walked without one: no devices mix, and the host waits as seldom as it is said to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent

WAITS = {
    "pretrain": 0,
    "pretrain in float32": 6,  # no kernel of torch's own: the borders are read in every layer
    "pretrain in bfloat16": 0,
    "sft": 0,
    "lora": 0,
    "lora in bfloat16": 0,
    "frozen encoder": 0,
    "encoder cache": None,  # it reads every clip that it looks for, and writes it
    "empty packs": 0,
    "dpo with lora": 2,  # TRL picks the logits of either side by a mask
    "dpo with a frozen reference": 2,
    "dpo with a stored reference": 7,  # its keys, and at the first batch what is stored against what is computed
    "dpo without groups": 2,
    "dpo without windows": 2,
    "kto": 4,  # and their rows
    "grpo": 0,
    "encoder": None,  # the lengths of transcripts are read for the kernel of the loss
    "warm up": None,
    "evaluation": None,
    "generation": None,
    "scoring": None,
}
"""How often the host may wait for the device in a micro-batch; None: not bounded."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to walk through"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for CUDA is compiled"),
]


@pytest.fixture(scope="module")
def walk(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every kind of step has given."""
    scratch = tmp_path_factory.mktemp("walk")
    library = scratch / "guard.so"
    options = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH}/include", f"-L{TORCH}/lib"]
    linked = ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}/lib", "-o", str(library)]
    subprocess.run(["g++", *options, str(Path(__file__).parent / "guard.cpp"), *linked], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.walk", str(noise), str(scratch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    return {line["kind"]: line for line in lines}


@pytest.mark.parametrize("kind", WAITS)
def test_a_step_mixes_no_devices_and_seldom_waits(kind: str, walk: dict[str, Any]) -> None:
    found = walk[kind]
    assert "error" not in found, found["error"]
    bound = WAITS[kind]
    if bound is not None:
        assert sum(found["waits"].values()) <= bound, found["waits"]


def test_every_kind_is_walked(walk: dict[str, Any]) -> None:
    assert walk.keys() == WAITS.keys()


def test_the_kernel_learns_what_the_loop_over_segments_learns(walk: dict[str, Any]) -> None:
    """Losses of two steps in bfloat16 through torch's wrapper and formula, against float32 without them."""
    assert walk["pretrain"]["loss"] == pytest.approx(walk["pretrain in float32"]["loss"], rel=1e-3)
    assert walk["pretrain in float32"]["loss"][1] < walk["pretrain in float32"]["loss"][0] - 0.1


@pytest.mark.parametrize("older", ["dpo without groups", "dpo without windows"])
def test_older_arguments_of_the_kernel_give_the_same(older: str, walk: dict[str, Any]) -> None:
    assert walk[older]["loss"] == pytest.approx(walk["dpo with lora"]["loss"], rel=1e-3)
