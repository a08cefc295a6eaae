"""One rank of a DPO run over fixed pairs: `python -m tests.distributed.dpo_worker MODE OUTPUT_FOLDER` under torchrun.

Three packs of one pair each make a step; on two ranks the second forward of rank 1 is a filler.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2audio_train.config.preference import Reference
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.data.samples.collate import pack_preference
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.training.reference.cache import ReferenceCache
from qwen2audio_train.training.reference.reference import reference_digest
from tests.model.rows import BANDS, tiny_config
from tests.training.pairs import config, our_trainer, random_pair

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # Every tensor is cut up, however small.
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 0,
    },
}


def policy(seed: int) -> PackedQwen2Audio:
    torch.manual_seed(seed)
    return PackedQwen2Audio(tiny_config())


def batches_of_rank(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    """The packs of a step that this rank runs, fillers where none is left."""
    samples = [random_pair(np.random.default_rng(seed), (20 + 7 * seed,), name=f"p{seed}") for seed in range(3)]
    slots = [pack_preference([sample], BANDS) for sample in samples]
    slots += [pack_preference([], BANDS)] * (-len(slots) % world)
    return slots[rank::world]


def build(mode: str, folder: Path, rank: int, batches: list[dict[str, torch.Tensor]]) -> Any:
    # Before the arguments: once they name ZeRO-3, transformers cuts up new models, whose random weights then differ.
    model: Any = policy(0)
    options: dict[str, Any] = {"eval_batches": batches}
    if mode.endswith("frozen"):
        options |= {"ref_model": policy(1)}
    if mode.endswith("adapter"):
        adapter = AdapterConfig(kind=AdapterKind.lora, r=2, modules=["language_model"])
        model = apply_adapter(model, adapter, autocast_adapter_dtype=False)
    if mode.endswith("cached"):
        options |= {"reference": Reference.cached, "cache": ReferenceCache(folder / "cache", "x", rank)}
    args = config(
        folder / "run",
        max_steps=2,
        gradient_accumulation_steps=len(batches),
        optim="adamw_torch",
        learning_rate=1e-2,
        deepspeed=ZERO_3 if mode.startswith("zero3") else None,
        ddp_find_unused_parameters=False,
    )
    trainer, _ = our_trainer(model, batches, args, **options)
    return trainer


def main(mode: str, folder: Path) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    batches = batches_of_rank(rank, world)
    trainer = build(mode, folder, rank, batches)
    digest = ""
    if mode.endswith("cached"):
        trainer.precompute_reference(batches)
        digest = reference_digest(trainer.model)
        if world > 1:
            torch.distributed.barrier()
        trainer.cache.load()
    trainer.train()
    held_out = trainer.evaluate()
    if rank == 0:
        result = {"log": trainer.state.log_history, "held_out": held_out, "digest": digest}
        result["cached"] = len(trainer.cache) if trainer.cache else 0
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
