"""KTO on packed answers against TRL's own trainer on padded, unshared rows, foreign answers included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from qwen2audio_train.data.samples.collate import pack_preference
from qwen2audio_train.data.samples.collate_kto import pack_unpaired, unpaired, with_foreign_answers
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.training.trainers.kto import AudioKTOTrainer
from qwen2audio_train.training.trainers.packed import RunFiles
from tests.model.rows import BANDS
from tests.training.pairs import PAD_ID, Gradients, HeldOut, ListLoader, StockCollator, config, random_pair, tokenizer
from tests.training.trainers.test_preference_parity import packed, stock

TAKEN_OVER = ["output_dir", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm", "beta"]
TAKEN_OVER += ["logging_steps", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "bf16", "max_length"]
TAKEN_OVER += ["remove_unused_columns", "dataloader_pin_memory"]

SAMPLES = [random_pair(np.random.default_rng(seed), (20 + 9 * seed,), name=f"p{seed}") for seed in range(3)]


class StockKTOTrainer(KTOTrainer):
    """TRL's trainer as it is, on a data set that is tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class UnpairedCollator(StockCollator):
    """TRL's own collator for the ids, and 30 s of features for every row."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = DataCollatorForUnpairedPreference(pad_token_id=PAD_ID)(rows)
        return ids | self.features([self.samples[row["sample"]] for row in rows])


def kto_config(folder: Path, **changes: Any) -> KTOConfig:
    values = {name: getattr(config(folder), name) for name in TAKEN_OVER}
    fixed = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 6, "gradient_checkpointing": False}
    return KTOConfig(**(values | fixed | changes))


def stock_run(
    samples: list[Sample], args: KTOConfig, answers: list[tuple[int, int, bool]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Rows as (sample, branch, label), in our order; the answer of the row before is the foreign one."""
    rows = [
        {
            "prompt_ids": samples[s].input_ids.tolist(),
            "completion_ids": samples[s].branches[branch].tolist(),
            "KL_completion_ids": samples[answers[row - 1][0]].branches[answers[row - 1][1]].tolist(),
            "label": label,
            "sample": s,
        }
        for row, (s, branch, label) in enumerate(answers)
    ]
    gradients = Gradients()
    trainer = StockKTOTrainer(
        stock(0),
        ref_model=stock(1),
        args=args,
        data_collator=UnpairedCollator(samples),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer.state.log_history[0], gradients.by_name


def our_trainer(batches: list[dict[str, Tensor]], args: KTOConfig) -> tuple[AudioKTOTrainer, Gradients]:
    gradients = Gradients()
    trainer = AudioKTOTrainer(
        packed(0),
        ref_model=packed(1),
        args=args,
        processing_class=tokenizer(),
        callbacks=[gradients],
        loader=ListLoader(batches),
        files=RunFiles("", {}, lambda folder: None),
        eval_batches=lambda: HeldOut(batches),
    )
    return trainer, gradients


PAIRED = [(s, 0, True) for s in range(3)] + [(s, 1, False) for s in range(3)]


def single(number: int, branch: int, task: str) -> Sample:
    """One answer of a sample, without its opposite."""
    return replace(SAMPLES[number], branches=SAMPLES[number].branches[branch : branch + 1], task=task)


def check_equal_to_trl(
    found: dict[str, float], gradients: dict[str, Tensor], expected: dict[str, float], theirs: dict[str, Tensor]
) -> None:
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    assert found["logits/rejected"] == pytest.approx(expected["logits/rejected"], rel=1e-4, abs=1e-4)
    floor = 1e-4 * max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        gap = float((gradients[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        assert gap < 1e-4, f"{name}: {gap:.2e}"


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_metrics_and_gradients_equal_trl(loss_type: str, tmp_path: Path) -> None:
    options = {"loss_type": loss_type, "desirable_weight": 1.3}
    expected, theirs = stock_run(SAMPLES, kto_config(tmp_path, **options), PAIRED)
    trainer, gradients = our_trainer(
        [pack_unpaired(SAMPLES, BANDS, foreign=loss_type == "kto")], kto_config(tmp_path, **options)
    )
    trainer.train()
    check_equal_to_trl(trainer.state.log_history[0], gradients.by_name, expected, theirs)


def test_answers_without_their_opposite_equal_trl(tmp_path: Path) -> None:
    answers = [(2, 0, True), (0, 1, False), (1, 0, False)]
    expected, theirs = stock_run(SAMPLES, kto_config(tmp_path, per_device_train_batch_size=3), answers)
    alone = [single(0, 1, "undesirable"), single(1, 0, "undesirable"), single(2, 0, "desirable")]
    trainer, gradients = our_trainer([pack_unpaired(alone, BANDS)], kto_config(tmp_path))
    trainer.train()
    check_equal_to_trl(trainer.state.log_history[0], gradients.by_name, expected, theirs)


def test_a_step_of_one_kind_of_answer_and_of_one_prompt(tmp_path: Path) -> None:
    """Undesirable answers, then one desirable one by itself: both sides are logged, and its KL term is zero."""
    batches = [
        pack_unpaired([single(0, 1, "undesirable"), single(1, 1, "undesirable")], BANDS),
        pack_unpaired([single(2, 0, "desirable")], BANDS),
    ]
    arguments = kto_config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer, _ = our_trainer(batches, arguments)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], abs=1e-6)
    alone, _ = our_trainer(batches[1:], kto_config(tmp_path, per_device_train_batch_size=2))
    found = alone.evaluate()
    assert found["eval_kl"] == 0.0
    assert found["eval_loss"] == pytest.approx(1 - 1 / (1 + np.exp(-found["eval_rewards/chosen"])), abs=1e-6)
    assert "eval_rewards/rejected" not in found


def test_held_out_pairs_and_fillers(tmp_path: Path) -> None:
    trainer, _ = our_trainer([pack_unpaired(SAMPLES, BANDS), pack_unpaired([], BANDS)], kto_config(tmp_path))
    alone, _ = our_trainer([pack_unpaired(SAMPLES, BANDS)], kto_config(tmp_path))
    found, expected = trainer.evaluate(), alone.evaluate()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_foreign_answers_belong_to_another_prompt() -> None:
    """With several rejected answers the row before may have the same prompt, and is passed over."""
    samples = [random_pair(np.random.default_rng(seed), (20,), num_rejected=2, name=f"q{seed}") for seed in range(2)]
    batch = with_foreign_answers(unpaired(pack_preference(samples, BANDS)))
    prompts = [0, 0, 1, 1, 0, 0, 1, 1]
    assert batch["label"].tolist() == [True] * 4 + [False] * 4
    ids = batch["packed_ids"][0]
    for row, prompt in enumerate(prompts):
        places = batch["KL_scatter"][row][batch["KL_scatter"][row] >= 0]
        answer = ids[places[1:]].tolist()
        assert ids[places[0]] == samples[prompt].input_ids[-1]
        assert any(answer == branch.tolist() for branch in samples[1 - prompt].branches)
        assert torch.equal(
            batch["packed_positions"][0][places[1:]], len(samples[prompt].input_ids) + torch.arange(len(answer))
        )
    assert int(batch["cu_q"][-1]) == len(ids)
    assert int(batch["cu_k"][-1]) == len(batch["key_index"])
