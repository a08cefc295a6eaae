"""A training step on packed rows beside the stock model on padded ones: audio seconds per second, and operations.

    python benchmarks/packed_step.py            # three mixes of lengths on CPU, a few minutes
    python benchmarks/packed_step.py --quick    # seconds
    python benchmarks/packed_step.py --device cuda --dtype bfloat16 --shape 7b --clips 16

Both models hold the same weights and see the same clips; the stock one pads every clip to 30 s, runs the head on every
token and pads the rows of a batch. The small shape keeps the ratio of encoder to language model of the published one.
Prints one JSON line per mix; `flops_ratio` is what the model of costs expects the speed-up to be.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from qwen2audio_train.layout import MAX_FRAMES, mel_columns, num_audio_tokens
from qwen2audio_train.model.cost import forward_flops, packed_load, padded_forward_flops
from qwen2audio_train.model.packed import PackedQwen2Audio

AUDIO_ID, PROMPT_TOKENS, LABELS_PER_S = 3, 10, 4
SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "small": (
        {"d_model": 320, "encoder_layers": 3, "encoder_attention_heads": 5, "encoder_ffn_dim": 1280},
        {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1376, "vocab_size": 4096},
    ),
    "7b": ({}, {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 156032}),
}
MIXES: dict[str, Callable[[random.Random], float]] = {
    "3 s": lambda _: 3.0,
    "lognormal, mean 8.9 s": lambda draw: min(max(draw.lognormvariate(2.0, 0.6), 1.0), 30.0),
    "most 10 to 16 s": lambda draw: draw.triangular(4.0, 17.0, 16.0),
    "30 s": lambda _: 30.0,
}


def build(args: argparse.Namespace) -> tuple[Qwen2AudioForConditionalGeneration, PackedQwen2Audio]:
    """The stock model and ours with the same weights."""
    audio, text = SHAPES[args.shape]
    heads = max(text["hidden_size"] // 128, 4)
    text = text | {"num_attention_heads": heads, "num_key_value_heads": heads}

    def config() -> Qwen2AudioConfig:
        return Qwen2AudioConfig(audio_config=dict(audio), text_config=dict(text), audio_token_index=AUDIO_ID)

    torch.manual_seed(0)
    with torch.device(args.device):
        packed = PackedQwen2Audio(config()).to(getattr(torch, args.dtype))
        stock = Qwen2AudioForConditionalGeneration._from_config(
            config(), attn_implementation="sdpa", dtype=getattr(torch, args.dtype)
        ).to(args.device)
    stock.load_state_dict(packed.state_dict())
    return stock.train(), packed.train()


def batches(seconds: list[float], device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same clips and random text, padded for the stock model and packed for ours."""
    frames = [round(100 * s) for s in seconds]
    labels = [max(1, round(LABELS_PER_S * s)) for s in seconds]
    rows = []
    for f, count in zip(frames, labels, strict=True):
        text = torch.randint(10, 4000, (PROMPT_TOKENS + count,))
        rows.append(torch.cat([torch.full((num_audio_tokens(f),), AUDIO_ID), text]))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    place = torch.arange(ids.size(1))
    last = place >= (lengths - torch.tensor(labels))[:, None]
    attended = place < lengths[:, None]
    padded = {
        "input_ids": ids,
        "attention_mask": attended.long(),
        "labels": torch.where(attended & last, ids, -100),
        "input_features": torch.randn(len(rows), 128, MAX_FRAMES),
        "feature_attention_mask": (torch.arange(MAX_FRAMES) < torch.tensor(frames)[:, None]).long(),
    }
    row, cu = torch.cat(rows), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    targets = torch.cat([torch.arange(end - n, end) for end, n in zip(cu[1:].tolist(), labels, strict=True)])
    packed = {
        "input_ids": row[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
        "predict_from": targets - 1,
        "target": row[targets],
        "weight": torch.ones(len(targets)),
        "cu_q": cu,
        "cu_k": cu,
        "mel": torch.randn(128, sum(mel_columns(f) for f in frames)),
        "clip_frames": torch.tensor(frames),
        "audio_slot": (row == AUDIO_ID).nonzero()[:, 0],
    }
    return tuple({key: value.to(device) for key, value in b.items()} for b in (padded, packed))  # type: ignore[return-value]


def best_time(step: Callable[[], Tensor], steps: int, device: str) -> float:
    """Shortest of some forward and backward passes, in seconds; on CPU those of one core, whoever else uses it."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(steps):
        start = clock()
        step().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


def measure(name: str, args: argparse.Namespace, stock: Any, ours: PackedQwen2Audio) -> dict[str, Any]:
    """One mix: both speeds and their ratio."""
    draw = random.Random(0)
    seconds = [MIXES[name](draw) for _ in range(args.clips)]
    padded, packed = batches(seconds, args.device)

    def packed_step() -> Tensor:
        out = ours(**packed)
        assert out.nll_sum is not None
        return out.nll_sum / out.weight_sum

    padded_s = best_time(lambda: stock(**padded).loss, args.steps, args.device)
    packed_s = best_time(packed_step, args.steps, args.device)
    load = packed_load(packed["clip_frames"].tolist(), packed["cu_q"].diff().tolist(), len(packed["target"]))
    flops = [sum(count(ours.config, load).values()) for count in (padded_forward_flops, forward_flops)]
    return {
        "mix": name,
        "padded_audio_s_per_s": round(sum(seconds) / padded_s, 2),
        "packed_audio_s_per_s": round(sum(seconds) / packed_s, 2),
        "speed_up": round(padded_s / packed_s, 2),
        "flops_ratio": round(flops[0] / flops[1], 2),
        "packed_tflops": round(3 * flops[1] / packed_s / 1e12, 3),
        "shape": args.shape,
        "dtype": args.dtype,
        "device": args.device,
        "clips": args.clips,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two clips, one step, one mix")
    args = parser.parse_args()
    mixes = list(MIXES)
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.quick:
        args.clips, args.steps, mixes = 2, 1, mixes[:1]
    stock, ours = build(args)
    for name in mixes:
        print(json.dumps(measure(name, args, stock, ours)), flush=True)


if __name__ == "__main__":
    main()
