"""Whole runs on two ranks, plain and under every ZeRO stage, against one process: losses, weights, resume."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.run import open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer
from tests.distributed.ranks import run_ranks
from tests.distributed.train_worker import Job, as_json, run
from tests.runs import recipe

pytestmark = pytest.mark.slow

STEPS = (
    "trainer.max_steps=20",
    "trainer.learning_rate=3e-3",
    "trainer.save_strategy=steps",
    "trainer.save_steps=10",
    "data.packs_per_step=3",  # the second forward of rank 1 is a filler
    "data.tokens_per_pack=60",
)
FREEZE = ("optimizer.frozen_from.multi_modal_projector=10", "optimizer.frozen_until.lm_head=14")
LORA = ("adapter.kind=lora", "adapter.r=2", "adapter.modules=[language_model,audio_tower]", "adapter.dropout=0.0")
TEXT = (*STEPS, "trainer.max_steps=2", "trainer.save_steps=1000")
PAIRS = (*STEPS, "data.tokens_per_pack=200", "trainer.max_steps=6", "trainer.save_steps=1000", "trainer.beta=0.5")

OFFLOAD = {
    "offload-cpu-adam": ("deepspeed.stage=2", "deepspeed.offload_optimizer=true", "trainer.optim=deepspeed_cpu_adam"),
    "offload-2": ("deepspeed.stage=2", "deepspeed.offload_optimizer=true"),
    "offload-3": ("deepspeed.stage=3", "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"),
}
HALF = {
    "bf16-2": ("deepspeed.stage=2", "trainer.bf16=true"),
    "weights-2": ("deepspeed.stage=2", "trainer.bf16=true", "model.dtype=bfloat16"),
    "kahan": ("model.dtype=bfloat16", "trainer.optim=adamw_bf16_kahan"),
    "stochastic": ("model.dtype=bfloat16", "trainer.optim=adamw_bf16_stochastic"),
}
"""Runs in bfloat16: computed, stored with float32 copies, stored without."""

MANY = (*STEPS, "data.packs_per_step=32", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.bf16=true")
"""Sixteen forwards a step on each rank, whose gradients DeepSpeed sums in float32."""

STAGES = ("none", "0", "1", "2", "3")


def zero(stage: str) -> tuple[str, ...]:
    return () if stage == "none" else (f"deepspeed.stage={stage}",)


def jobs() -> list[Job]:
    """Everything that two ranks run."""
    found = []
    for number in STAGES:
        found += [
            Job(f"full-{number}", (*STEPS, *zero(number))),
            Job(f"text-{number}", (*TEXT, *zero(number)), ("text",)),
        ]
    for number in ("none", "2", "3"):
        found += [
            Job(f"full-{number}-resumed", (*STEPS, *zero(number)), resume=f"full-{number}/checkpoint-10"),
            Job(f"lora-{number}", (*STEPS, *LORA, *zero(number))),
            Job(f"lora-{number}-resumed", (*STEPS, *LORA, *zero(number)), resume=f"lora-{number}/checkpoint-10"),
            Job(f"pairs-{number}", (*PAIRS, *zero(number)), ("pairs",)),
        ]
    for number in ("none", "2", "3"):
        found.append(Job(f"freeze-{number}", (*STEPS, *FREEZE, *zero(number))))
    found.append(Job("freeze-3-resumed", (*STEPS, *FREEZE, *zero("3")), resume="freeze-3/checkpoint-10"))
    for name, overrides in OFFLOAD.items():
        found.append(Job(name, (*STEPS, "trainer.optim=adamw_torch", *overrides)))
    name = "offload-cpu-adam"
    found.append(Job(f"{name}-resumed", (*STEPS, *OFFLOAD[name]), resume=f"{name}/checkpoint-10"))
    for name, overrides in HALF.items():
        found.append(Job(name, (*STEPS, *overrides)))
    found += [Job(f"many-{number}", (*MANY, *zero(number))) for number in STAGES if number != "0"]
    found.append(Job("many-1-resumed", (*MANY, *zero("1")), resume="many-1/checkpoint-1"))
    return found


@pytest.fixture(scope="module")
def two(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("tests.distributed.train_worker", noise, folder, as_json(jobs()))
    return folder


@pytest.fixture(scope="module")
def one(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same runs in one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    for name, overrides, sources in (
        ("full", STEPS, ("speech", "sound", "text")),
        ("lora", (*STEPS, *LORA), ("speech", "sound", "text")),
        ("pairs", PAIRS, ("pairs",)),
    ):
        run(noise, folder, Job(name, overrides, sources))
    return folder


def figures(run_dir: Path, *names: str) -> list[tuple[float, ...]]:
    """Figures of every step, by default its loss and the norm of the gradient."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names or ("loss", "grad_norm")) for line in lines if "loss" in line]


def weights(run_dir: Path, step: int = 20) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / f"checkpoint-{step}").glob("*/*model.safetensors")
    return load_file(file)


def furthest(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> float:
    """Largest relative difference."""
    assert len(a) == len(b)
    return max(abs(x - y) / abs(y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_ranks_hold_audio_and_text_apart(noise: Path, tmp_path: Path) -> None:
    """The plan of these runs has what they are about: a rank without audio beside one that has some."""
    config = recipe(noise, tmp_path, *STEPS, sources=["speech", "sound", "text"])
    tokenizer = build_tokenizer(config)
    loaders = [build_batches(config.data, tokenizer, rank=r, world_size=2, num_mel_bins=16) for r in range(2)]
    forwards = zip(*(islice(loader, 2 * 20) for loader in loaders), strict=True)
    kinds = {tuple(bool(len(batch["clip_frames"])) for batch in ranks) for ranks in forwards}
    assert kinds >= {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize("number", STAGES)
def test_two_ranks_train_as_one(number: str, one: Path, two: Path) -> None:
    names = ("loss",) if number == "0" else ("loss", "grad_norm")  # DeepSpeed clips at stage 0 and keeps the norm
    expected_figures = figures(one / "full", *names)
    assert len(expected_figures) == 20
    assert furthest(figures(two / f"full-{number}", *names), expected_figures) < 1e-3
    expected = weights(one / "full")
    found = weights(two / f"full-{number}")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-2, atol=2e-4), name


@pytest.mark.parametrize("number", ["none", "2", "3"])
def test_adapters_train_as_one(number: str, one: Path, two: Path) -> None:
    assert furthest(figures(two / f"lora-{number}"), figures(one / "lora")) < 1e-3


@pytest.mark.parametrize("number", ["none", "2", "3"])
def test_preferences_train_as_one(number: str, one: Path, two: Path) -> None:
    first = figures(one / "pairs")[0][0]
    assert first == pytest.approx(0.693147, abs=1e-5)
    assert furthest(figures(two / f"pairs-{number}"), figures(one / "pairs")) < 1e-3


@pytest.mark.parametrize("number", STAGES)
def test_text_alone_leaves_the_tower_as_it_was(number: str, noise: Path, two: Path, tmp_path: Path) -> None:
    """Steps without any audio: encoder and projector keep their weights to the bit, the language model learns."""
    config = recipe(noise, tmp_path, *TEXT, sources=["text"])
    open_run(config)
    before = dict(build_policy(config, build_tokenizer(config)).state_dict())
    after = weights(two / f"text-{number}", step=2)
    for name, value in after.items():
        if name.startswith(("audio_tower.", "multi_modal_projector.")):
            assert torch.equal(value, before[f"model.{name}"]), name
    head = after["language_model.lm_head.weight"]
    assert not torch.equal(head, before["lm_head.weight"])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("number", ["none", "2", "3"])
def test_resumed_is_uninterrupted(kind: str, number: str, two: Path) -> None:
    whole, resumed = figures(two / f"{kind}-{number}"), figures(two / f"{kind}-{number}-resumed")
    assert len(resumed) == 10
    assert furthest(resumed, whole[10:]) < 1e-6
    expected = weights(two / f"{kind}-{number}")
    for name, value in weights(two / f"{kind}-{number}-resumed").items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("number", ["none", "2", "3"])
def test_a_part_keeps_its_weights_from_a_step_on_and_until_one(number: str, two: Path) -> None:
    half, end = (weights(two / f"freeze-{number}", step) for step in (10, 20))
    head, projector = "language_model.lm_head.weight", "multi_modal_projector.linear.weight"
    assert torch.equal(half[projector], end[projector])
    assert not torch.equal(half[head], end[head])
    assert torch.equal(half[head], weights(two / "freeze-none", 10)[head])  # as they were built
    assert furthest(figures(two / f"freeze-{number}"), figures(two / "freeze-none")) < 1e-3
    if number == "3":
        resumed = weights(two / "freeze-3-resumed")
        assert all(torch.allclose(value, end[name], rtol=1e-6, atol=1e-8) for name, value in resumed.items())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_rank_goes_on_where_two_stopped(kind: str, noise: Path, one: Path, two: Path, tmp_path: Path) -> None:
    extra = LORA if kind == "lora" else ()
    run(noise, tmp_path, Job("run", (*STEPS, *extra), resume=str(two / f"{kind}-none" / "checkpoint-10")))
    assert furthest(figures(tmp_path / "run"), figures(one / kind)[10:]) < 1e-3


@pytest.mark.parametrize("number", ["2", "3"])
def test_deepspeed_checkpoints_load_in_plain_transformers(number: str, two: Path) -> None:
    folder = two / f"full-{number}" / "checkpoint-20" / "model"
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    saved = weights(two / f"full-{number}")
    assert torch.equal(model.lm_head.weight, saved["language_model.lm_head.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in saved.values())


@pytest.mark.parametrize("name", list(OFFLOAD))
def test_states_on_the_host_train_alike(name: str, one: Path, two: Path) -> None:
    assert furthest(figures(two / name), figures(one / "full")) < 1e-3


def test_states_of_deepspeeds_own_optimizer_go_on(two: Path) -> None:
    resumed = figures(two / "offload-cpu-adam-resumed")
    assert furthest(resumed, figures(two / "offload-cpu-adam")[10:]) < 1e-6


@pytest.mark.parametrize("name", list(HALF))
def test_bfloat16_stays_near(name: str, one: Path, two: Path) -> None:
    """To three digits in the loss: bfloat16 has eight bits."""
    ours, exact = ([loss for loss, _ in figures(folder)] for folder in (two / name, one / "full"))
    assert ours == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_gradients_of_many_forwards_are_summed_in_float32(number: str, two: Path) -> None:
    """The worker looks at the type of the sum; here losses, norms and a resume are those of the same run."""
    found, expected = figures(two / f"many-{number}"), figures(two / "many-none")
    assert furthest(found, expected) < 1e-3
    if number == "1":  # another wrapper of DeepSpeed's, with a state of its own shape
        assert furthest(figures(two / "many-1-resumed"), found[1:]) < 1e-6
