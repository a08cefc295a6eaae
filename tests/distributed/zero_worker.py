"""One rank of two optimiser steps under DeepSpeed: `python -m tests.distributed.zero_worker STAGE MODE FILE`.

The ranks' packs differ as much as they can: audio beside text alone, then text beside a pack without any label.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_train.config.parts import FreezeConfig
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, CheckpointingPolicy
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.freeze import set_trainable
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import pack, random_row, tiny_config

STEPS, WORLD, RATE = 2, 2, 0.1


def packs() -> list[list[dict[str, Tensor]]]:
    """Packs of each step and rank."""
    rng = torch.Generator().manual_seed(0)
    audio = pack([random_row(rng, (40,)), random_row(rng, (7, 31))])
    text, more_text = pack([random_row(rng, ())]), pack([random_row(rng, (), turns=2)])
    unlabelled = pack([random_row(rng, ())])
    unlabelled |= {key: unlabelled[key][:0] for key in ("predict_from", "target", "source_id", "weight")}
    return [[audio, text], [more_text, unlabelled]]


def build(mode: str) -> nn.Module:
    torch.manual_seed(0)
    model = PackedQwen2Audio(tiny_config())
    set_trainable(model, FreezeConfig(audio_tower=mode == "frozen", lm_head=mode == "frozen"))
    if mode.startswith("lora"):
        lora = AdapterConfig(kind=AdapterKind.lora, r=2, modules=["language_model", "audio_tower"])
        # A fresh adapter's B is zero, which would leave A without a gradient.
        lora.modules_to_save = ["multi_modal_projector"]
        adapted = apply_adapter(model, lora, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    else:
        adapted = model
    if mode.endswith("checkpointed"):
        policy = CheckpointingPolicy.selective if "selective" in mode else CheckpointingPolicy.full
        set_activation_checkpointing(adapted, ["audio_tower", "language_model"], policy)
    return adapted


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def alone(mode: str) -> dict[str, Tensor]:
    """The two steps in one process: weights and losses."""
    model = build(mode).train()
    optimizer = torch.optim.SGD(trainable(model), lr=RATE)
    losses = []
    for step in packs():
        optimizer.zero_grad()
        outputs = [model(**batch) for batch in step]
        loss = sum(o.nll_sum for o in outputs) / sum(o.weight_sum for o in outputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {n: p.detach() for n, p in model.named_parameters()} | {"loss": torch.stack(losses)}


def main(stage: int, mode: str, path: str) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    model = build(mode).train()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1.0 where not given
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    optimizer = torch.optim.SGD(trainable(model), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in packs():
        total = sum(float(batch["weight"].sum()) for batch in step)
        loss = engine(**step[rank]).nll_sum * WORLD / total
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / WORLD
        torch.distributed.all_reduce(mean)
        losses.append(mean)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    if rank == 0:
        torch.save(state | {"loss": torch.stack(losses)}, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
