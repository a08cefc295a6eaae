"""Checkpoint folders: what they hold, and what becomes of damage, interrupted saves and full disks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.checkpoints.folder import CheckpointError, complete_checkpoints, resume_point, verify
from qwen2audio_train.training.stages.run import fit, open_run, source_commit
from tests.runs import build_trainer, logged, recipe, train

SAVING = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=2"]
LORA = ["adapter.kind=lora", "adapter.r=2"]

MODEL = {"sample_recipe.json", "config.json", "generation_config.json", "model.safetensors"}
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
STATE = {
    "config.yaml",
    "data_state.json",
    "lineage.json",
    "optimizer/rank_00000.safetensors",
    "rng/rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 1 and 2."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(recipe(noise, run_dir, *SAVING))
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_everything(finished: Path) -> None:
    folder = finished / "checkpoint-2"
    expected = {f"model/{name}" for name in MODEL | PROCESSOR} | STATE
    assert files_of(folder) == expected | {folders.MANIFEST}
    manifest = json.loads((folder / folders.MANIFEST).read_text())
    assert manifest.keys() == expected
    for name, entry in manifest.items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_its_lineage_says_where_it_comes_from(noise: Path, finished: Path, tmp_path: Path) -> None:
    lineage = json.loads((finished / "checkpoint-2" / "lineage.json").read_text())
    config = (finished / "checkpoint-2" / "config.yaml").read_text()
    assert config == (finished / "config.yaml").read_text()
    assert lineage["config_sha256"] == hashlib.sha256(config.encode()).hexdigest()
    assert (lineage["stage"], lineage["init_from"], lineage["base"]) == ("pretrain", None, None)
    assert lineage["versions"]["torch"] == torch.__version__
    assert lineage["commit"] == source_commit()
    assert lineage["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", lineage["commit"])
    train(recipe(noise, tmp_path, *SAVING, f"init_from={finished}"))
    child = json.loads((tmp_path / "checkpoint-2" / "lineage.json").read_text())
    weights = (finished / "checkpoint-2" / "model" / "model.safetensors").read_bytes()
    assert child["init_from"] == str(finished)
    assert child["base"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}


def test_a_lora_checkpoint_leaves_the_base_out(noise: Path, finished: Path, tmp_path: Path) -> None:
    train(recipe(noise, tmp_path, *SAVING, *LORA, f"init_from={finished}"))
    folder = tmp_path / "checkpoint-2"
    adapter = {"base.json", "sample_recipe.json", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files_of(folder) == {f"adapter/{name}" for name in adapter | PROCESSOR} | STATE | {folders.MANIFEST}
    assert all("lora_" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert json.loads((folder / "lineage.json").read_text())["base"].keys() == {"model.safetensors"}


# Damage ---------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model/model.safetensors", truncate, r"model/model\.safetensors: \d+ bytes, MANIFEST\.json says \d+; choose"),
    (
        "optimizer/rank_00000.safetensors",
        Path.unlink,
        r"optimizer/rank_00000\.safetensors: listed in MANIFEST\.json but missing; choose",
    ),
    ("MANIFEST.json", Path.unlink, r"checkpoint-2: no MANIFEST\.json, so the checkpoint was not finished; choose"),
    ("MANIFEST.json", truncate, r"MANIFEST\.json: damaged, it is no list of files; choose"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE)
def test_an_incomplete_checkpoint_is_passed_over(
    name: str, damage: Callable[[Path], Any], says: str, run_dir: Path
) -> None:
    damage(run_dir / "checkpoint-2" / name)
    point, (note,) = resume_point("auto", run_dir)
    assert point == run_dir / "checkpoint-1"
    assert re.search(says.removesuffix("; choose"), note)
    assert note.startswith(f"passing over {run_dir}/checkpoint-2")
    with pytest.raises(CheckpointError, match=says):
        resume_point(str(run_dir / "checkpoint-2"), run_dir)


def test_a_changed_byte_is_found_and_the_checkpoint_set_aside(noise: Path, run_dir: Path) -> None:
    """By name it is refused; `auto` goes on from the one before, whose own checksums say that it is whole."""
    flip(run_dir / "checkpoint-2" / "optimizer" / "rank_00000.safetensors")
    differs = r"checkpoint-2/optimizer/rank_00000\.safetensors: differs from MANIFEST\.json \(damaged or edited\)"
    with pytest.raises(CheckpointError, match=f"{differs}; choose an earlier checkpoint"):
        resume_point(str(run_dir / "checkpoint-2"), run_dir)
    point, (note,) = resume_point("auto", run_dir)
    assert point == run_dir / "checkpoint-1"
    assert re.search(f"^passing over .*{differs}; it is checkpoint-2.damaged now$", note)
    assert (run_dir / "checkpoint-2.damaged" / "MANIFEST.json").is_file()
    train(recipe(noise, run_dir, *SAVING))
    verify(run_dir / "checkpoint-2")


def test_where_none_is_whole_the_run_starts_again_and_says_so(run_dir: Path) -> None:
    for step in (1, 2):
        flip(run_dir / f"checkpoint-{step}" / "model" / "model.safetensors")
    point, notes = resume_point("auto", run_dir)
    assert point is None
    assert [note.split(": ")[0].split("/")[-3] for note in notes[:-1]] == ["checkpoint-2", "checkpoint-1"]
    assert notes[-1] == "no checkpoint is whole: starting from step 0"


@pytest.mark.parametrize("name", ["../checkpoint-1/config.yaml", "/etc/hostname"])
def test_a_manifest_that_lists_what_lies_outside_is_damaged(name: str, run_dir: Path) -> None:
    manifest = run_dir / "checkpoint-2" / "MANIFEST.json"
    manifest.write_text(json.dumps({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match=r"damaged, it lists '.*', which lies outside"):
        verify(run_dir / "checkpoint-2")


def test_what_is_no_checkpoint_is_not_taken_for_one(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoint-9.partial").mkdir()
    (run_dir / "checkpoint-best").mkdir()
    (run_dir / "checkpoint-7").write_text("a file")
    assert [path.name for path in complete_checkpoints(run_dir)] == ["checkpoint-1", "checkpoint-2"]
    assert resume_point("auto", tmp_path / "none") == (None, [])
    with pytest.raises(CheckpointError, match="no such folder"):
        resume_point(str(run_dir / "checkpoint-7"), run_dir)


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}.partial"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        writing.seal(folder, tmp_path / f"checkpoint-{step}")
        verify(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11.partial").mkdir()
    writing.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    writing.rotate(tmp_path, keep=1, every=10)
    assert len(complete_checkpoints(tmp_path)) == 2
    writing.rotate(tmp_path, keep=1, every=20)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-100"]


# Interrupted saves and full disks -------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("point", ["_save_training_state", "_save_run_files", "seal", "rotate"])
def test_a_save_that_is_cut_short_leaves_the_one_before(
    point: str, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(noise, tmp_path, *SAVING)
    trainer = build_trainer(config)
    home = trainer if point.startswith("_") else writing
    whole = getattr(home, point)

    def cut(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(home, point, cut)
    with pytest.raises(Killed):
        fit(trainer, config)
    monkeypatch.undo()
    newest = 2 if point == "rotate" else 1
    assert resume_point("auto", tmp_path)[0] == tmp_path / f"checkpoint-{newest}"
    train(config)
    assert [step for (step,) in logged(config, "step")] == [1, 2]
    verify(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob("*.partial")) or point == "rotate"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails, as on a full disk, whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "room",
    [150_000, 300_000],
    ids=["weights", "optimizer"],
)
def test_a_full_disk_is_said_and_the_one_before_kept(room: int, noise: Path, tmp_path: Path) -> None:
    """The weights take 260 kB, the state of the optimiser 520 kB; the message says what, why and what is left."""
    config = recipe(noise, tmp_path, *SAVING)
    trainer = build_trainer(config)
    save = trainer._save_checkpoint

    def short_of_room(*args: Any) -> None:
        if trainer.state.global_step < 2:
            return save(*args)
        with largest_file(room):
            return save(*args)

    trainer._save_checkpoint = short_of_room  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as info:
        fit(trainer, config)
    words = str(info.value)
    assert words.startswith(f"{tmp_path}/checkpoint-2: could not be written (")
    assert "GiB are free" in words
    assert words.endswith(f"{tmp_path}/checkpoint-1 is complete and will be resumed from")
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-1"]
    train(config)
    verify(tmp_path / "checkpoint-2")


def test_room_is_looked_for_before_anything_is_written(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first checkpoint by counting bytes, for the next ones by the size of the one before."""
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free[0]))  # type: ignore[attr-defined]
    config = recipe(noise, tmp_path, *SAVING)
    trainer = build_trainer(config)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1: could not be written \(it takes [0-9.e-]+ GiB; 0 GiB are"
    ):
        fit(trainer, config)
    assert not list(tmp_path.glob("checkpoint*"))
    counted = writing.least_size(trainer.model, trainer.optimizer, trained_only=False)
    free[0] = 10**9
    train(config)
    (tmp_path / "checkpoint-7.partial").mkdir()
    tensors = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*.safetensors"))
    assert 0.9 * tensors < counted < tensors  # the rest are the headers of the files
    free[0] = writing.size_of(tmp_path / "checkpoint-2") - 1
    with pytest.raises(
        CheckpointError, match=r"To make room: a lower trainer\.save_total_limit; here lie checkpoint-1 \("
    ):
        train(recipe(noise, tmp_path, *SAVING, "trainer.max_steps=3"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every folder is synced, then it is renamed, then the folder that holds the name is synced."""
    done: list[Path] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(Path(os.readlink(f"/proc/self/fd/{n}"))), fsync(n)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(to), rename(self, to))[1])
    train(recipe(noise, tmp_path, *SAVING, "trainer.max_steps=1"))
    partial, target = tmp_path / "checkpoint-1.partial", tmp_path / "checkpoint-1"
    there = [target, *target.rglob("*")]
    assert set(done[:-2]) == {partial / path.relative_to(target) for path in there}
    assert done[-2:] == [target, tmp_path]
    assert done.index(partial / "MANIFEST.json") == len(files_of(target)) - 1


# Run folders ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_made(noise: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*/file/run: cannot be written to \(Not a directory\)"):
        build_trainer(recipe(noise, tmp_path / "file" / "run"))


@pytest.mark.slow
def test_two_processes_do_not_share_a_run_folder(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path / "run")
    open_run(config)
    code = "import sys; from tests.runs import *; open_run(recipe(Path(sys.argv[1]), Path(sys.argv[2])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(noise), str(tmp_path / "run")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "another process is training there; choose another" in done.stderr
