"""Encoder and projector learn tokens alike on one rank and on two; and what they hand on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training_ranks import figures, furthest
from tests.distributed.train_worker import Job, as_json, run
from tests.runs import warm_up_recipe

pytestmark = pytest.mark.slow

STEPS = (
    "trainer.max_steps=6",
    "trainer.save_strategy=steps",
    "trainer.save_steps=6",
    "data.packs_per_step=3",  # the second forward of rank 1 is a filler
    "data.tokens_per_pack=60",
    "ctc.sampled_tokens=50",
)
BESIDE = ("stage=pretrain", "ctc.weight=0.5")


@pytest.fixture(scope="module")
def runs(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs on one rank (`one`, `beside-one`) and on two."""
    folder = tmp_path_factory.mktemp("warm_up")
    warm_up_recipe(noise, folder / "parts")  # so that only one process writes them
    jobs = [Job("two", STEPS, ("warm-up",)), Job("beside", (*STEPS, *BESIDE), ("warm-up",))]
    run_ranks("tests.distributed.train_worker", noise, folder, as_json(jobs))
    run(noise, folder, Job("one", STEPS, ("warm-up",)))
    run(noise, folder, Job("beside-one", (*STEPS, *BESIDE), ("warm-up",)))
    return folder


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the head's among them."""
    return load_file(folder / "model" / "model.safetensors") | load_file(folder / "ctc_head.safetensors")


def test_two_ranks_are_one(runs: Path) -> None:
    assert furthest(figures(runs / "two"), figures(runs / "one")) < 2e-5
    ours, theirs = saved(runs / "two" / "checkpoint-6"), saved(runs / "one" / "checkpoint-6")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-5), name


def test_as_an_auxiliary_loss_two_ranks_are_one(runs: Path) -> None:
    names = ("loss", "grad_norm", "ctc_loss")
    assert furthest(figures(runs / "beside", *names), figures(runs / "beside-one", *names)) < 2e-5


@torch.no_grad()
def test_what_is_handed_on_has_the_norm_of_embeddings(noise: Path, runs: Path) -> None:
    """And the head beside it reads from it what it read before."""
    folder = runs / "one" / "checkpoint-6"
    model = PackedQwen2Audio.from_pretrained(folder / "model").eval()
    before = load_file(folder / "unscaled.safetensors")
    after = saved(folder)
    name = "model.multi_modal_projector.linear.weight"
    projector = model.model.multi_modal_projector.linear.weight
    factor = float(projector.norm() / before[name].norm())
    assert torch.allclose(projector, before[name] * factor, rtol=1e-5)
    assert torch.allclose(after["ctc_head.scale"] * factor, before["ctc_head.scale"], rtol=1e-5)
    assert torch.allclose(after["ctc_head.blank"] * factor, before["ctc_head.blank"], rtol=1e-5)
    frames = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    audio = model.model.hear(torch.nn.functional.pad(frames, (0, 4)), torch.tensor([300]))
    table = model.get_input_embeddings().weight
    assert 0.5 < float(audio.norm(dim=1).mean() / table.norm(dim=1).mean()) < 2.0
