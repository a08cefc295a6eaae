"""What users get wrong ends with status 2 and a message that says what, where and how to mend it; never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.parts import PARTS
from tests.launch.scripts import SCHEMAS, script
from tests.runs import ARCHITECTURE

Run = Callable[..., tuple[int, str]]


def tiny(noise: Path, run_dir: Path) -> list[str]:
    """Overrides that turn a published root into a tiny run over noise."""
    sizes = {"audio_config": {"num_mel_bins": 16}, "text_config": {}}
    small = [
        f"model.architecture.{part}.{key}={value}"
        for part, keys in ARCHITECTURE.items()
        for key, value in (keys | sizes[part]).items()
    ]
    return [
        *small,
        "model.num_mel_bins=16",
        "data=none",
        f"data.sources.noise.path=[{noise}/speech.jsonl]",
        f"data.cache_dir={noise}/cache",
        "data.tokens_per_pack=100",
        "data.packs_per_step=2",
        "data.num_workers=0",
        "trainer.bf16=false",
        "trainer.max_steps=1",
        "tracker=off",
        f"run_dir={run_dir}",
    ]


@pytest.fixture
def run(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("pretrain", "key=value", ...) -> exit status and errors of a tiny run."""

    def call(name: str, *overrides: str) -> tuple[int, str]:
        given = [text.replace("NOISE", str(noise)).replace("HERE", str(tmp_path)) for text in overrides]
        base = tiny(noise, tmp_path / "run") if name in ("pretrain", "sft", "dpo") else []
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *base, *given])
        status = 0
        try:
            launch(script(name).main, name, SCHEMAS[name])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return call


def test_the_tiny_run_itself_is_right(run: Run, tmp_path: Path) -> None:
    status, errors = run("pretrain")
    assert (status, "error:" in errors) == (0, False)
    assert (tmp_path / "run" / "checkpoint-1" / "MANIFEST.json").is_file()


WRONG = [
    (
        "pretrain",
        ["data.sources.noise.path=[/no/where.jsonl]"],
        "data.sources.noise.path: no file '/no/where.jsonl' (look",
    ),
    ("pretrain", ["data.sources.noise.path=[]"], "data.sources.noise.path: no files given"),
    ("pretrain", ["data.eval_sources.dev.path=[/no/dev.jsonl]"], "data.eval_sources.dev.path: no file '/no/dev.jsonl'"),
    ("pretrain", ["~data.sources.noise"], "data.sources is empty: name at least one source"),
    (
        "pretrain",
        ["data.sources.noise.path=[HERE/empty.jsonl]"],
        "data.sources.noise: no usable example: there are no rows in it",
    ),
    ("pretrain", ["data.sources.noise.path=[HERE/bad.jsonl]"], "data.sources.noise: no usable example"),
    ("pretrain", ["data.sources.noise.path=[HERE]"], "HERE"),
    (
        "pretrain",
        ["data.sources.noise.path=[NOISE/pairs.jsonl]"],
        "data.sources.noise: holds preference, the stage pretrain",
    ),
    ("dpo", ["data.samples_per_pack=1"], "data.sources.noise: holds asr, the stage dpo learns from preferences"),
    (
        "pretrain",
        ["data.sources.noise.path=[NOISE/pairs.jsonl]", "data.sources.noise.streaming=true"],
        "data.sources.noise: holds preference, the stage pretrain",
    ),
    (
        "dpo",
        ["data.samples_per_pack=1", "data.sources.noise.streaming=true"],
        "data.sources.noise: holds asr, the stage dpo learns from preferences",
    ),
    ("pretrain", ["data.tokens_per_pack=5"], "every example of noise is longer than a pack: the shortest has"),
    ("pretrain", ["model.vocab_size=260"], "model.vocab_size: 260 is too small: 256 bytes and"),
    ("pretrain", ["stage=sft"], "stage=sft: this script runs pretrain; start launch/sft.py"),
    ("pretrain", ["deepspeed=zero2"], "deepspeed.stage=2: start it with torchrun, also for a single rank"),
    ("pretrain", ["trainer.eval_strategy=steps"], "trainer.eval_strategy=steps: there are no data.eval_sources"),
    ("pretrain", ["init_from=HERE/nothing"], "HERE/nothing: no such folder, and not a hub id (owner/name)"),
    ("pretrain", ["init_from=HERE"], "HERE: no weights here; expected config.json, adapter_config.json, a checkpoint"),
    ("pretrain", ["resume=HERE/nothing"], "resume=HERE/nothing: no such folder; expected auto, never or a checkpoint"),
    ("pretrain", ["run_dir=HERE/empty.jsonl"], "run_dir=HERE/empty.jsonl: cannot be written to (File exists)"),
    (
        "pretrain",
        ["model=assembled", "trainer.optim=adamw_bf16_kahan"],
        "model.language_model=Qwen/Qwen2.5-0.5B: no tokenizer could be loaded from there",
    ),
    (
        "sft",
        ["model=qwen2_audio_7b", "adapter=lora"],
        "model.path=Qwen/Qwen2-Audio-7B: no tokenizer could be loaded from there",
    ),
    (
        "pretrain",
        ["model.architecture.text_config.num_attention_heads=3"],
        "model.architecture.text_config: num_attention_heads 3 is no",
    ),
    (
        "pretrain",
        ["model.architecture.audio_confg={}"],
        "model.architecture: unknown ['audio_confg']; known are audio_config",
    ),
    ("pretrain", ["data.sources.noise.weight=0"], "weights in"),
    (
        "pretrain",
        ["optimizer.learning_rates.lm_head=1", "model.freeze.lm_head=true"],
        "optimizer.learning_rates: lm_head has no",
    ),
    (
        "pretrain",
        [f"model.freeze.{part}=true" for part in PARTS],
        "model.freeze: every part is frozen and there is no adapter, so there is nothing to train",
    ),
    ("pretrain", ["adapter=qlora"], "adapter.kind: qlora quantises saved weights"),
    ("evaluate", ["checkpoint=HERE", "output_dir=HERE/out"], "manifests: empty; name what to score: manifests.NAME="),
    ("evaluate", ["checkpoint=HERE", "manifests.a=HERE/no.jsonl"], "manifests.a: no file 'HERE/no.jsonl'"),
    ("evaluate", ["checkpoint=HERE", "manifests.a=NOISE/speech.jsonl", "pairs=no"], "pairs: no file 'no'"),
    ("export", ["checkpoint=HERE", "output_dir=HERE/out", "check_manifest=no"], "check_manifest: no file 'no'"),
    ("pretrain", ["adapter=lora", "adapter.modules=[]"], "adapter.modules: empty, expected some of"),
    ("evaluate", ["checkpoint=HERE", "manifests.a=NOISE/speech.jsonl"], "HERE: no weights here; expected config.json"),
    ("export", ["checkpoint=HERE/nothing", "output_dir=HERE/out"], "HERE/nothing: no such folder"),
]


@pytest.mark.parametrize(
    ("name", "overrides", "says"), WRONG, ids=lambda value: value[-1] if isinstance(value, list) else ""
)
def test_a_mistake_is_named(name: str, overrides: list[str], says: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"id": "x"}\nnonsense\n')
    status, errors = run(name, *overrides)
    assert status == 2, errors[-2000:]
    assert says.replace("HERE", str(tmp_path)) in errors.replace("error: ", "")
    assert "Traceback" not in errors
