"""What SECURITY.md promises of manifests, archives, recipes and checkpoints that a stranger has made."""

from __future__ import annotations

import ast
import os
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2audio_train.config.schema import ConfigError, StageConfig, load_config
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.storage.blobs import BlobError, find_inside
from qwen2audio_train.data.storage.paths import check_url, expand_paths, shown
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.checkpoints.folder import MANIFEST, CheckpointError
from tests.runs import recipe, train

ROOT = Path(__file__).parents[1]
STEPS = ["trainer.save_strategy=steps", "trainer.save_steps=1"]


def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package and the scripts: file, function as it is written, node."""
    found = []
    for path in [*ROOT.glob("qwen2audio_train/**/*.py"), *ROOT.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node))
    return found


def test_nothing_is_unpickled_evaluated_or_instantiated_by_name() -> None:
    """Save between a process and the decoder that it forked itself, over a pipe of their own."""
    own_pipe = {"qwen2audio_train/data/audio/deadline.py"}
    names = (
        "pickle.load",
        "pickle.loads",
        "eval",
        "exec",
        "os.system",
        "yaml.load",
        "hydra.utils.instantiate",
        "instantiate",
    )
    assert {file for file, name, _ in calls() if name in names} == own_pipe
    loads = [node for _, name, node in calls() if name == "torch.load"]
    assert loads
    for node in loads:
        assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    passed = {word.arg for _, _, node in calls() for word in node.keywords}
    assert not passed & {"allow_pickle", "trust_remote_code", "shell"}
    assert not [name for _, name, _ in calls() if name.endswith(("extractall", ".extract"))]


class Harm:
    """Pickles as a call that makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng/rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(name: str, noise: Path, tmp_path: Path) -> None:
    """Its checksums are right: whoever made it has sealed it."""
    config = recipe(noise, tmp_path / "run", *STEPS, "trainer.max_steps=1")
    train(config)
    folder, partial = tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-1.partial"
    torch.save(Harm(tmp_path / "harm"), folder / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / name, weights_only=True)
    folder.rename(partial)
    (partial / MANIFEST).unlink()
    writing.seal(partial, folder)
    with pytest.raises(CheckpointError, match="holds something else than what is saved here, and is not read"):
        train(recipe(noise, tmp_path / "run", *STEPS, "trainer.max_steps=2"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("key", ["_target_", "model._target_", "data.sources.a._target_"])
def test_a_recipe_names_no_function_to_call(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_config({"stage": "pretrain", "name": "x", **nested(key, "os.system")}, StageConfig)


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def test_a_tar_is_read_in_place_and_its_links_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("../../up", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret")
            tar.addfile(member)
    (tmp_path / "secret").write_text("secret")
    for name in ("link", "hard"):
        with pytest.raises(BlobError, match="no such member"):
            find_inside(f"{tmp_path}/a.tar::{name}", 100)
    find_inside(f"{tmp_path}/a.tar::../../up", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "secret"]


@pytest.mark.parametrize(
    "url",
    ["ftp://x/a", "reference://x", "simplecache::s3://x/a", "s3://x/a::http://y", "zip://a::http://y", "sftp://x/a"],
)
def test_other_protocols_are_not_opened(url: str, tmp_path: Path) -> None:
    for opened in (lambda: Remote(str(tmp_path)).read(url, 10), lambda: expand_paths([url], "data.sources.a")):
        with pytest.raises(BlobError, match="cannot be fetched; expected one of file, http"):
            opened()


def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(BlobError, match=r"^https://\.\.\.@host: a URL must not hold a user or password") as info:
        check_url("https://me:hunter2@host/a.wav")
    assert "hunter2" not in str(info.value)
    check_url("abfs://container@account.example.net/a.wav")
    with pytest.raises(BlobError):
        check_url("s3://key:hunter2@bucket/a.wav")
    assert shown("https://me:hunter2@host/a.wav?sig=abc") == "https://host/a.wav"
    assert str(AudioError("https://host/a.wav?X-Amz-Signature=abc", "is no audio")) == "https://host/a.wav: is no audio"


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "a ${oc.env:my_secret,x}", "${oc.env:${name}}"])
def test_a_recipe_copies_no_secret(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^init_from: \$\{oc\.env:.* would write a secret into config\.yaml"):
        load_config({"stage": "pretrain", "name": "HF_TOKEN", "init_from": value}, StageConfig)


def test_keys_of_the_environment_are_in_no_file(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    train(recipe(noise, tmp_path, *STEPS, "trainer.max_steps=1"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_the_page_and_the_tests_name_the_same_promises() -> None:
    """Every promise of SECURITY.md ends with the name of the test that holds it."""
    page = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")} - {
        "test_the_page_and_the_tests_name_the_same_promises"
    }
    assert here <= named
    everywhere = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in everywhere] == []
