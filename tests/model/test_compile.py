"""Compiled encoder and decoder layers give the same loss and gradients, over packs of changing sizes."""

from __future__ import annotations

import pytest
import torch

from qwen2audio_train.model.qwen2_audio import BLOCKS, PackedQwen2Audio
from tests.model.rows import pack, random_row, tiny_config
from tests.parity.steps import gradients, worst


# raised inside torch while it traces
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks(checkpointing: bool) -> None:
    torch.manual_seed(0)
    plain = PackedQwen2Audio(tiny_config()).train()
    compiled = PackedQwen2Audio(tiny_config()).train()
    compiled.load_state_dict(plain.state_dict())
    if checkpointing:
        compiled.gradient_checkpointing_enable()
    for module in compiled.modules():
        if type(module).__name__ in BLOCKS:
            module.compile(dynamic=True)
    rng = torch.Generator().manual_seed(1)
    for frames in ([(40,), ()], [(7,), (31, 8), (100,)], [()]):
        batch = pack([random_row(rng, f) for f in frames])
        loss, grads = gradients(plain, plain(**batch).nll_sum)
        our_loss, our_grads = gradients(compiled, compiled(**batch).nll_sum)
        assert torch.allclose(our_loss, loss, rtol=1e-5)
        name, gap = worst(our_grads, grads)
        assert gap < 1e-5, f"{name}: {gap:.2e}"
