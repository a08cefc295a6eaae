"""Which runs an ablation has, what each starts from, what it met, and what comes out of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.ablate import config_of, main
from qwen2audio_train.ablation.gather import Change
from qwen2audio_train.ablation.order import SAME, SAME_DRAWS, OtherOrder, check_order, data_state, order_of
from qwen2audio_train.ablation.study import BASELINE, Run, overrides_of, runs_of
from qwen2audio_train.config.ablation import AblationConfig
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import ConfigError, load_config
from qwen2audio_train.evaluation.scoring.bootstrap import Difference
from qwen2audio_train.training import chain
from tests.launch.scripts import composed, script
from tests.runs import ARCHITECTURE, recipe, train

STAGES = {
    "encoder": {"decodes": False, "hands_on": "model.audio_encoder"},
    "pretrain": {"overrides": ["trainer.max_steps=7"]},
    "sft": {},
}


def runs(**keys: Any) -> list[Run]:
    baseline = load_config({"name": "r", "run_dir": "unused", "stages": STAGES}, RecipeConfig)
    overlays = {"frozen": {"sft": ["ablation=frozen_encoder"]}, "tags": {"pretrain": ["ablation=hierarchical_tags"]}}
    values = {"run_dir": "a", "overlays": overlays, "seeds": [3, 4], **keys}
    return runs_of(load_config(values, AblationConfig), baseline)


def test_an_overlay_runs_from_the_first_stage_that_it_changes() -> None:
    found = runs()
    assert [(run.overlay, run.seed) for run in found] == [
        (name, seed) for name in (BASELINE, "frozen", "tags") for seed in (3, 4)
    ]
    base, frozen, tags = found[0].recipe, found[3].recipe, found[4].recipe
    assert [list(r.stages) for r in (base, frozen, tags)] == [
        ["encoder", "pretrain", "sft"],
        ["sft"],
        ["pretrain", "sft"],
    ]
    assert base.stages["pretrain"].overrides == ["trainer.max_steps=7"]
    assert frozen.stages["sft"].overrides == ["init_from=a/baseline/seed4/pretrain", "ablation=frozen_encoder"]
    assert tags.stages["pretrain"].overrides == [
        "model.audio_encoder=a/baseline/seed3/encoder",
        "trainer.max_steps=7",
        "ablation=hierarchical_tags",
    ]
    assert tags.stages["sft"].overrides == []
    assert (tags.run_dir, tags.seed, found[4].folder) == ("a/tags/seed3", 3, Path("a/tags/seed3/sft"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stages": ["pretran"]}, "stages: pretran is no stage of recipe; did you mean pretrain"),
        ({"stages": ["encoder"]}, "the last one, encoder, is not scored"),
        ({"overlays": {"x": {"dpo": ["a=1"]}}}, r"overlays\.x\.dpo: this stage is not run"),
        ({"overlays": {"x": {"sft": []}}}, r"overlays\.x: changes nothing"),
        ({"overlays": {BASELINE: {"sft": ["a=1"]}}}, "choose another"),
        ({"seeds": []}, "one or more of each"),
    ],
)
def test_refusals(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runs(**keys)


def test_nested_keys_are_overrides() -> None:
    assert overrides_of({"a": 1, "b": {"c": ["d=e", "f"], "g": {"h": "text"}}}) == [
        "a=1",
        'b.c=["d=e", "f"]',
        "b.g.h=text",
    ]


def trained(noise: Path, folder: Path, *overrides: str) -> Path:
    train(recipe(noise, folder, "trainer.max_steps=1", "model.vocab_size=330", *overrides))
    return folder


def test_the_digest_of_the_plan_tells_what_two_runs_met(noise: Path, tmp_path: Path) -> None:
    first = trained(noise, tmp_path / "first")
    assert check_order(first, trained(noise, tmp_path / "rate", "trainer.learning_rate=0.1")) == SAME
    tags = trained(noise, tmp_path / "tags", "data.prompt_style=hierarchical_tags")
    assert check_order(first, tags) == SAME_DRAWS
    assert "seed: 0 when saved, 1 now" in check_order(first, trained(noise, tmp_path / "seed", "data.seed=1"))
    state = data_state(first)
    assert order_of(state, state) == SAME
    more = tmp_path / "more"
    more.mkdir()
    for path in noise.glob("*.wav"):
        (more / path.name).symlink_to(path)
    lines = (noise / "speech.jsonl").read_text().splitlines(keepends=True)
    (more / "speech.jsonl").write_text("".join(lines[:-1]))
    (more / "sound.jsonl").write_text((noise / "sound.jsonl").read_text())
    grown = trained(more, tmp_path / "grown", "trainer.learning_rate=0.1")
    config = (grown / "config.yaml").read_text().replace(str(more), str(noise))
    (grown / "config.yaml").write_text(config)  # as where the file has changed under the same name
    with pytest.raises(OtherOrder, match=r"changes trainer\.learning_rate, none of it the data's"):
        check_order(first, grown)


def test_a_change_is_clear_where_interval_and_seeds_agree() -> None:
    change = Change(("s", "asr", "en", "wer"), 9, (0.3,), (0.2,), Difference(-0.1, -0.2, -0.01, 0.02), (-0.2, -0.05))
    assert change.is_clear
    assert not replace(change, by_seed=(-0.3, 0.01)).is_clear
    assert not replace(change, difference=Difference(-0.1, -0.2, 0.01, 0.06)).is_clear
    assert not replace(change, difference=None).is_clear


def study_file(noise: Path, folder: Path) -> Path:
    stage = [
        *(
            "data=none",
            "tracker=off",
            "model.vocab_size=300",
            "model.num_mel_bins=16",
            "model.architecture.audio_config.num_mel_bins=16",
            "trainer.logging_steps=1",
        ),
        *(f"model.architecture.{part}.{key}={x}" for part, keys in ARCHITECTURE.items() for key, x in keys.items()),
        *(f"data.sources.{name}.path=[{noise}/{name}.jsonl]" for name in ("speech", "sound")),
        *("data.tokens_per_pack=100", "data.packs_per_step=2", "data.num_workers=0", "trainer.use_cpu=true"),
        *(f"data.cache_dir={folder}/cache", "trainer.max_steps=2", "trainer.save_steps=2"),
    ]
    keys = {
        "nproc_per_node": 1,
        "overrides": ["num_threads=1"],
        "evaluate": [f"manifests.noise={noise}/speech.jsonl", "max_new_tokens=4", "max_examples=4", "num_threads=1"],
        "stages": {"pretrain": {"overrides": stage}},
    }
    overlays = {"rate": {"pretrain": ["trainer.learning_rate=0"]}}
    values = {
        "name": "noise",
        "run_dir": str(folder / "run"),
        "stages": ["pretrain"],
        "keys": keys,
        "overlays": overlays,
    }
    (folder / "study.yaml").write_text(json.dumps({**values, "seeds": [0, 1]}))
    return folder / "study.yaml"


@pytest.mark.slow
def test_missing_runs_are_done_and_gathered(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def here(path: Path, arguments: list[str], ranks: int) -> None:
        called.append(path.stem)
        script(path.stem).main(composed(path.stem, *arguments))

    monkeypatch.setattr(chain, "run_script", here)
    study = str(study_file(noise, tmp_path))
    assert main([study, "only=[1]"]) == 0
    assert called == ["pretrain", "evaluate"]
    out = capsys.readouterr().out
    assert "  0  missing  baseline, seed 0" in out
    assert "  1  done     baseline, seed 1" in out
    assert main([study]) == 0
    assert called == ["pretrain", "evaluate"] * 4
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "run" / "ablation.json").read_text())}
    assert (arms["rate"]["changed"], arms["rate"]["order"]) == (["trainer.learning_rate"], SAME)
    loss, wer = arms["rate"]["changes"]
    assert (wer["key"], wer["n"], loss["n"]) == (["speech", "asr", "en", "wer"], 4, 41)
    assert loss["by_seed"] == pytest.approx([b - a for a, b in zip(loss["baseline"], loss["values"], strict=True)])
    assert loss["values"] > loss["baseline"], "at a rate of nought nothing is learnt"
    lines = [json.loads(x) for x in (tmp_path / "run/rate/seed0/pretrain/log.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines if "loss" in line]
    assert len(tokens) == 2
    assert 0 < sum(tokens) <= 2 * 2 * 100
    assert (tmp_path / "run" / "rate.loss.svg").read_text().startswith("<svg xmlns=")
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| rate | speech (en) | WER | 4 |" in table
    assert main([study]) == 0
    assert len(called) == 8


def test_the_array_runs_one_task_each(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(study_file(noise, tmp_path))
    assert main([study, "mode=slurm"]) == 0
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text()
    assert f"--array=0-1 {path}" in text
    assert f"--array=2-3 {path}" in text
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {"PYTHON": str(fake), "SLURM_ARRAY_TASK_ID": "3", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["launch/ablate.py", study, "mode=run", "only=[3]"]


def test_a_number_that_no_run_has_is_refused(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(study_file(noise, tmp_path)), "only=[9]"])
    assert "there are 4 runs" in capsys.readouterr().err


def test_the_ready_ablations_compose() -> None:
    """Every run of every file under benchmarks/ablations/ is let in by the schema."""
    folder = Path(__file__).parents[2] / "benchmarks" / "ablations"
    for path in sorted(folder.glob("*.yaml")):
        from qwen2audio_train.cli.compose import compose, given

        config = given([str(path)], AblationConfig)
        for run in runs_of(config, compose(config.recipe, overrides_of(config.keys), RecipeConfig)):
            chain.stage_configs(run.recipe, config_of)
