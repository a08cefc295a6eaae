"""What a 7B step could reach at most on a card: its operations and bytes, traced without a card.

    python benchmarks/gpu/roofline.py                        # the table of docs/costs.md, some minutes on one CPU core
    python benchmarks/gpu/roofline.py --shape tiny --cases "LoRA, full"

The packed model at its real shape runs forward and backward on fake tensors: shapes and dtypes, no values. Every kernel
that torch would start is counted with its operations and the bytes that it reads and writes once. The bound divides the
useful operations (`model/flops.py`) by

    operations of matrix products / (`PRODUCTS` x peak)  +  bytes of all other kernels / (`STREAMED` x bandwidth).

Attention, the optimizer, communication and gaps between kernels come on top, so no run reaches it. A product's own
bytes are not counted: at these sizes it is bound by operations. What is traced are torch's kernels one by one, as they
run without a compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Qwen2AudioConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from workload import SHAPES

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, CheckpointingPolicy
from qwen2audio_train.data.samples.collate import indexed
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model import attention
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.flops import PEAK_BF16_FLOPS, training_flops
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.planning.cost import repeated
from qwen2audio_train.planning.find_batch import random_pack
from qwen2audio_train.planning.forecast import Typical

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes per second of the SXM modules' memory: NVIDIA's data sheets."""

PRODUCTS, STREAMED = 0.72, 0.85
"""Shares of the peak and of the bandwidth that large products and streaming kernels are taken to reach."""

MATRIX = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", *ALLOCATIONS}
"""Operators that start no kernel, beside views and those that give no tensor."""

CLIP_FRAMES, PROMPT, LABELS = 1000, 30, 40
"""A sample: ten seconds of audio, 250 tokens."""

CASES: dict[str, tuple[str, str | None, float]] = {
    "full, full": ("full", "full", 0.0),
    "full, selective": ("full", "selective", 0.0),
    "full, none": ("full", None, 0.0),
    "LoRA, full": ("lora", "full", 0.05),
    "LoRA, selective": ("lora", "selective", 0.05),
    "LoRA, none": ("lora", None, 0.05),
    "LoRA without dropout, full": ("lora", "full", 0.0),
    "LoRA without dropout, none": ("lora", None, 0.0),
}
"""What is trained, the policy of activation checkpoints, dropout of the adapter."""


class Kernels(TorchDispatchMode):
    """Operations of matrix products, and bytes of all other kernels by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.bytes, self.starts = 0, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].removesuffix("_")  # in place or not
        if func.is_view or name in FREE or not any(isinstance(x, Tensor) for x in tree_leaves(out)):
            return out
        self.starts[name] += 1
        if name in MATRIX:
            self.products += flop_registry[getattr(torch.ops.aten, name)](*args, **(kwargs or {}), out_val=out)
        else:
            self.bytes[name] += sum(_bytes(x) for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def _bytes(x: Tensor) -> int:
    """What is read or written of a tensor; a dimension that is expanded is there once."""
    distinct = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= size if stride else 1
    return distinct * x.element_size()


class Unseen(torch.autograd.Function):
    """Attention's shapes (1, N, H, D) of (1, H, N, D): its operations are left out of the bound."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.like = k, v
        return q.new_empty(q.transpose(1, 2).shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].transpose(1, 2), *(torch.empty_like(x) for x in ctx.like)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Attention as one kernel, dropout as the one that a GPU has."""
    by_segment, dropout = attention._by_segment, nn.functional.dropout
    attention._by_segment = lambda q, k, v, *_, **__: Unseen.apply(q, k, v)
    nn.functional.dropout = lambda x, p=0.5, training=True, *_, **__: (
        torch.native_dropout(x, p, True)[0] if p and training else x
    )
    try:
        yield
    finally:
        attention._by_segment, nn.functional.dropout = by_segment, dropout


def trace(case: str, shape: str, samples: int) -> dict[str, Any]:
    """One micro-batch of a case: products (operations), bytes of all else by operator, useful operations."""
    kind, policy, dropout = CASES[case]
    parts: Any = {name: dict(part) for name, part in SHAPES[shape].items()}
    config: Any = Qwen2AudioConfig(**parts, audio_token_index=1)
    typical = Typical(CLIP_FRAMES / 100, PROMPT, LABELS, 1, "")
    batch = indexed(random_pack(typical, samples, config.audio_config.num_mel_bins, QWEN2_AUDIO), QWEN2_AUDIO)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model: Any = PackedQwen2Audio(config)
    finally:
        torch.set_default_dtype(default)
    if kind == "lora":
        adapter = AdapterConfig(kind=AdapterKind.lora, modules=["language_model"], dropout=dropout)
        model = apply_adapter(model, adapter)
    mode, kernels = FakeTensorMode(), Kernels()
    with mode, kernels_of_a_gpu():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if policy:
            set_activation_checkpointing(model, ["audio_tower", "language_model"], CheckpointingPolicy(policy))
        model.train()
        inputs: dict[str, Any] = {
            name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in batch.items()
        }
        inputs["mel"] = inputs["mel"].bfloat16()
        with kernels:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "lora"):
                loss = model(**inputs).nll_sum
            loss.backward()
    learned: Any = {"trained": (), "adapted": ("language_model",)} if kind == "lora" else {}
    useful = sum(training_flops(config, repeated(typical.load, samples), **learned).values())
    return {
        "tokens": samples * typical.load.tokens,
        "products": kernels.products,
        "useful": useful,
        "bytes": dict(kernels.bytes.most_common()),
        "starts": kernels.starts.total(),
    }


def bound(found: dict[str, Any], card: str) -> float:
    """The largest MFU that the counted work leaves room for."""
    products = found["products"] / (PRODUCTS * PEAK_BF16_FLOPS[card])
    others = sum(found["bytes"].values()) / (STREAMED * BANDWIDTH[card])
    return float(found["useful"] / (products + others) / PEAK_BF16_FLOPS[card])


def row(case: str, found: dict[str, Any]) -> str:
    largest = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in list(found["bytes"].items())[:4])
    bounds = " | ".join(f"{bound(found, card):.1%}" for card in BANDWIDTH)
    moved = sum(found["bytes"].values()) / 1e9
    products, useful = (found[name] / 1e12 for name in ("products", "useful"))
    return f"| {case} | {products:.0f} | {useful:.0f} | {moved:.0f} | {largest} | {bounds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--samples", type=int, default=51, help="of ten seconds, 320 tokens each")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    print(f"| trained, checkpoints | TFLOP | useful | other kernels, GB | most of them | {' | '.join(BANDWIDTH)} |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    found = {}
    for case in options.cases:
        found[case] = trace(case, options.shape, options.samples)
        print(row(case, found[case]), flush=True)
    print(json.dumps({case: {card: round(bound(one, card), 3) for card in BANDWIDTH} for case, one in found.items()}))


if __name__ == "__main__":
    main()
