"""One optimiser step: however it is cut into forwards, its loss is the mean over the whole step, and nothing divides it
again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.quarantine import TooManyBadExamples
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.recipe import recipe_of
from qwen2audio_train.data.samples.sample import materialise
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.run import fit, open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer
from qwen2audio_train.training.trainers.packed import PackedTrainer
from tests.runs import build_trainer, encoder_recipe, logged, pairs_recipe, recipe, warm_up_recipe

TOLERANCE = 1e-5


def run(config: StageConfig) -> PackedTrainer:
    """Train without the checkpoint at the end."""
    trainer = build_trainer(config)
    trainer.train()
    return trainer


def ctc_recipe(corpus: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """The audio embeddings are read as tokens besides; what a sample gives depends on the clips of a forward."""
    return recipe(corpus, run_dir, "ctc.weight=0.5", "ctc.sampled_tokens=0", *overrides)


@pytest.mark.parametrize("make", [recipe, pairs_recipe, encoder_recipe, ctc_recipe])
def test_a_step_may_be_cut_in_any_way(make: Any, noise: Path, tmp_path: Path) -> None:
    """1 x 4 = 2 x 2 = 4 x 1; the optimiser is one that does not forgive a wrong scale.

    The first two steps have the same weights, as the first has a rate of zero; then what rounding did to them shows.
    """
    found = {}
    for per_forward in (1, 2, 3, 4):
        overrides = ["trainer.optim=sgd", "trainer.learning_rate=0.05", f"data.packs_per_forward={per_forward}"]
        config = make(noise, tmp_path / str(per_forward), *overrides)
        trainer = run(config)
        assert trainer.args.gradient_accumulation_steps == -(-4 // per_forward)
        found[per_forward] = logged(config, "loss", "grad_norm")
    for per_forward in (2, 3, 4):
        for step, (ours, reference) in enumerate(zip(found[per_forward], found[1], strict=True)):
            assert ours == pytest.approx(reference, rel=TOLERANCE if step < 2 else 10 * TOLERANCE)


def whole_epoch(noise: Path, run_dir: Path, *overrides: str) -> StageConfig:
    """One step that holds every example of the corpus once."""
    config = recipe(noise, run_dir, "trainer.max_steps=1", *overrides)
    trainer = build_trainer(config)
    config.data.packs_per_step = trainer.loader.planner.num_slots(1)
    return config


def alone(noise: Path, config: StageConfig) -> tuple[torch.nn.Module, dict[str, list[Tensor]]]:
    """The model of a run before its first step, and the losses of the labels of every sample, taken one by one."""
    open_run(config)
    tokenizer = build_tokenizer(config)
    model = build_policy(config, tokenizer)
    samples = recipe_of(config.data, config.model.num_mel_bins)
    losses: dict[str, list[Tensor]] = {}
    for source in config.data.sources:
        for example in read_manifest(noise / f"{source}.jsonl"):
            batch = pack([materialise(example, tokenizer, samples)], num_mel_bins=config.model.num_mel_bins)
            hidden = model.model(
                **{k: v for k, v in batch.items() if k not in ("predict_from", "target", "source_id", "weight")}
            ).last_hidden_state[0]
            logits = model.lm_head(hidden[batch["predict_from"]])
            losses.setdefault(source, []).append(
                torch.nn.functional.cross_entropy(logits, batch["target"], reduction="none")
            )
    return model, losses


def expected(weighting: str, losses: dict[str, list[Tensor]]) -> Tensor:
    """The loss by its definition: every label, every sample or every task counts the same."""
    if weighting == "token":
        return torch.cat([one for group in losses.values() for one in group]).mean()
    if weighting == "sample":
        return torch.stack([one.mean() for group in losses.values() for one in group]).mean()
    return torch.stack([torch.stack([one.mean() for one in group]).mean() for group in losses.values()]).mean()


@pytest.mark.parametrize("weighting", ["token", "sample", "task"])
def test_the_loss_is_what_it_is_said_to_be(weighting: str, noise: Path, tmp_path: Path) -> None:
    """Loss and norm of the gradient of a whole epoch in one step, against a computation sample by sample."""
    config = whole_epoch(noise, tmp_path, f"data.loss_weighting={weighting}")
    run(config)
    model, losses = alone(noise, config)
    direct = expected(weighting, losses)
    direct.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    (figures,) = logged(config, "loss", "grad_norm")
    assert figures == pytest.approx((direct.item(), norm.item()), rel=TOLERANCE)


def test_weights_of_labels_stay_float32_in_bfloat16(noise: Path, tmp_path: Path) -> None:
    """The step's loss is the mean with the loader's own weights; with weights in bfloat16 it would be another one."""
    config = whole_epoch(noise, tmp_path, "data.loss_weighting=sample", "trainer.bf16=true")
    batches = islice(build_trainer(config).get_train_dataloader(), config.data.packs_per_step)
    weight = torch.cat([batch["weight"] for batch in batches])
    trainer, found = build_trainer(config), []
    unwrap(trainer.model).register_forward_hook(lambda module, given, output: found.append(output.nll))
    trainer.train()
    nll, rounded = torch.cat(found).double(), weight.bfloat16()
    means = [float((nll * w.double()).sum() / weight.double().sum()) for w in (weight, rounded)]
    ((loss,),) = logged(config, "loss")
    assert loss == pytest.approx(means[0], rel=1e-6)
    assert loss != pytest.approx(means[1], rel=1e-5)


def test_losses_of_the_sources_add_up(noise: Path, tmp_path: Path) -> None:
    config = whole_epoch(noise, tmp_path)
    run(config)
    _, losses = alone(noise, config)
    ((loss, speech, sound),) = logged(config, "loss", "loss/speech", "loss/sound")
    assert speech == pytest.approx(torch.cat(losses["speech"]).mean().item(), abs=TOLERANCE)
    assert sound == pytest.approx(torch.cat(losses["sound"]).mean().item(), abs=TOLERANCE)
    labels = {source: sum(len(one) for one in group) for source, group in losses.items()}
    parts = labels["speech"] * speech + labels["sound"] * sound
    assert loss == pytest.approx(parts / sum(labels.values()), abs=TOLERANCE)


class Fixed:
    """The same batches over and over, in place of the trainer's loader."""

    def __init__(self, loader: Any, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.telemetry, self.plan = batches, loader.telemetry, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.batches


@pytest.mark.parametrize("num_fillers", [1, 3])
def test_empty_packs_change_nothing(num_fillers: int, noise: Path, tmp_path: Path) -> None:
    """A filler neither adds to the loss nor takes part in its mean, and every parameter keeps its gradient."""
    found = []
    for fillers in (0, num_fillers):
        config = recipe(noise, tmp_path / str(fillers), "trainer.max_steps=2", "data.packs_per_step=2")
        trainer = build_trainer(config)
        real = list(islice(trainer.loader, 2))
        trainer.loader = Fixed(trainer.loader, [*real, *[pack([], num_mel_bins=16)] * fillers])
        trainer.args.gradient_accumulation_steps = 2 + fillers
        trainer.train()
        found.append(logged(config, "loss", "grad_norm", "loss/speech"))
    assert found[1] == [pytest.approx(step, rel=TOLERANCE) for step in found[0]]


def test_a_step_without_any_label_is_zero_and_finite(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path, "trainer.max_steps=2", "data.packs_per_step=1", "trainer.optim=sgd")
    trainer = build_trainer(config)
    trainer.loader = Fixed(trainer.loader, [next(iter(trainer.loader)), pack([], num_mel_bins=16)])
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert logged(config, "loss", "grad_norm")[1] == (0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_first_step_without_any_label_is_an_error(noise: Path, tmp_path: Path) -> None:
    """All audio gone: the run says so at once, and where the reasons are."""
    (tmp_path / "gone").mkdir()
    shutil.copy(noise / "speech.jsonl", tmp_path / "gone")
    config = recipe(
        noise, tmp_path / "run", f"data.sources.speech.path=[{tmp_path}/gone/speech.jsonl]", sources=["speech"]
    )
    with pytest.raises(TooManyBadExamples, match=r"no example of the first step could be used; .*bad_examples\.rank\*"):
        run(config)
    assert ".wav: no such file" in (tmp_path / "run" / "bad_examples.rank0.jsonl").read_text()


def test_held_out_loss_is_the_mean_over_all_labels(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path, f"data.eval_sources.speech.path=[{noise}/speech.jsonl]")
    trainer = build_trainer(config)
    metrics = trainer.evaluate()
    _, losses = alone(noise, config)
    assert metrics["eval_loss"] == pytest.approx(torch.cat(losses["speech"]).mean().item(), rel=TOLERANCE)
    assert metrics["eval_loss/speech"] == pytest.approx(metrics["eval_loss"], abs=TOLERANCE)
    assert 0 <= metrics["eval_token_accuracy"] <= 1


def test_rates_and_decay_reach_the_optimizer(noise: Path, tmp_path: Path) -> None:
    overrides = [
        "optimizer.learning_rates.lm_head=0.5",
        "trainer.weight_decay=0.1",
        "optimizer.encoder_layer_decay=0.5",
    ]
    trainer = build_trainer(recipe(noise, tmp_path, *overrides))
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert groups["lm_head.decay.0"]["lr"] == 0.5
    assert groups["language_model.decay.0"]["lr"] == 1e-2
    assert groups["audio_tower.decay.1"]["lr"] == 0.5e-2
    assert groups["language_model.no_decay.0"]["weight_decay"] == 0.0
    assert groups["language_model.decay.0"]["weight_decay"] == 0.1
    held = sum(len(group["params"]) for group in groups.values())
    assert held == sum(p.requires_grad for p in trainer.model.parameters())


def test_an_auxiliary_loss_is_added_by_its_weight(noise: Path, tmp_path: Path) -> None:
    """And changes neither the language model's own loss nor what held-out examples are measured by."""
    held_out = [f"data.eval_sources.speech.path=[{noise}/speech.jsonl]", "trainer.max_steps=1"]
    plain, beside = (recipe(noise, tmp_path / f"{w}", f"ctc.weight={w}", *held_out) for w in (0.0, 0.5))
    trainers = [run(config) for config in (plain, beside)]
    ((loss,),) = logged(plain, "loss")
    ((total, ctc_loss),) = logged(beside, "loss", "ctc_loss")
    assert ctc_loss > 1.0
    assert total == pytest.approx(loss + 0.5 * ctc_loss, rel=TOLERANCE)
    # the rate of the first step is zero, so both have the weights that they started with
    measured = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert measured[0] == measured[1]
    assert [unwrap(trainer.model).ctc_head is None for trainer in trainers] == [True, False]


def test_the_head_of_an_auxiliary_loss_is_that_of_the_stage_before(noise: Path, tmp_path: Path) -> None:
    config = warm_up_recipe(noise, tmp_path / "before", "trainer.max_steps=2")
    fit(build_trainer(config), config)
    folder = tmp_path / "before" / "checkpoint-2"
    start = [f"init_from={folder}", "stage=pretrain", "ctc.weight=0.5"]
    model = build_trainer(warm_up_recipe(noise, tmp_path / "next", *start)).model
    saved = load_file(folder / "ctc_head.safetensors")
    assert float(saved["ctc_head.blank"].norm()) > 0
    for name, tensor in unwrap(model).ctc_head.state_dict().items():
        assert torch.equal(tensor, saved[f"ctc_head.{name}"]), name
