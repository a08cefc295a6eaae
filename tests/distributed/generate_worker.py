"""One rank that decodes its share: `python -m tests.distributed.generate_worker MODE FILE`, MODE plain or zero3.

Rank 0 has one prompt more than rank 1 and batches of another number; one prompt cannot be loaded.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts, sample_texts
from tests.evaluation.tiny import MEL_BINS, ending_model, mixed_samples, task_sample, tiny_tokenizer

DECODING = Decoding(max_new_tokens=10, tokens_per_batch=120)


def prompts() -> list[Sample | None]:
    return [*mixed_samples(), None, task_sample("last", 2.0, seed=9)]


def results(model: Any) -> dict[str, Any]:
    samples = prompts()
    lengths = [12 if sample is None else len(sample.input_ids) for sample in samples]
    sampling = replace(DECODING, temperature=1.0, num_return_sequences=2)
    return {
        "greedy": generate_texts(model, tiny_tokenizer(), samples, DECODING, lengths),
        "sampled": sample_texts(model, tiny_tokenizer(), samples, sampling, lengths),
        "one prompt": generate_texts(model, tiny_tokenizer(), samples[:1], DECODING),
    }


def training_loss(model: Any) -> torch.Tensor:
    """A step's loss on a labelled sample."""
    sample = task_sample("train", 0.6)
    labels = sample.label_mask.copy()
    labels[-3:] = True
    batch = pack([replace(sample, label_mask=labels)], num_mel_bins=MEL_BINS)
    output = model(**batch)
    loss: torch.Tensor = output.nll_sum / output.weight_sum
    return loss


def under_zero3(model: Any) -> dict[str, Any]:
    """Decode before, between and after training steps, whose losses must not notice."""
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found: dict[str, Any] = {}
    losses = []
    for _ in range(3):
        found = results(engine)
        engine.train()
        loss = training_loss(engine)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return found | {"losses": losses}


def main(mode: str, path: str) -> None:
    if mode == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    model = ending_model()
    found = under_zero3(model) if mode == "zero3" else results(model)
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
