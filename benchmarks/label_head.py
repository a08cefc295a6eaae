"""Ways to score labels with a large vocabulary, side by side: time and memory of one forward and backward.

    python benchmarks/label_head.py            # 1 024 labels of Qwen2-Audio's vocabulary at width 1 024
    python benchmarks/label_head.py --quick    # seconds
    python benchmarks/label_head.py --device cuda --dtype bfloat16 --width 4096 --labels 4096

Every candidate runs in a process of its own, so that its peak memory is its own; their losses have to agree. The last
line is JSON: seconds and peak memory beyond the inputs of every candidate, in the order of time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trl.kernels import ChunkedLogProbFunction

from qwen2audio_train.model.loss import LabelHead, chunk_rows, label_nll

Score = Callable[[Tensor, LabelHead, Tensor, Tensor], Tensor]
"""Hidden states, head, targets and weights to the weighted sum of the negative log-likelihoods."""


def whole(hidden: Tensor, head: LabelHead, target: Tensor, weight: Tensor) -> Tensor:
    """All logits at once."""
    return (F.cross_entropy(head(hidden).float(), target, reduction="none") * weight).sum()


def checkpointed(hidden: Tensor, head: LabelHead, target: Tensor, weight: Tensor) -> Tensor:
    """Chunks whose logits are computed again in backward."""
    rows = chunk_rows(head.out_features)
    pieces = zip(hidden.split(rows), target.split(rows), weight.split(rows), strict=True)
    return sum((checkpoint(whole, h, head, t, w, use_reentrant=False) for h, t, w in pieces), hidden.new_zeros(()))


def torch_chunked(hidden: Tensor, head: LabelHead, target: Tensor, weight: Tensor) -> Tensor:
    """torch's own chunked function (2.13), per label."""
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(hidden, head.weight, target, reduction="none", options=options)
    return (nll.float() * weight).sum()


def trl_chunked(hidden: Tensor, head: LabelHead, target: Tensor, weight: Tensor) -> Tensor:
    """TRL's function, which tiles the vocabulary as well."""
    log_probs = ChunkedLogProbFunction.apply(hidden, head.weight, None, target, 1.0, 32768, None, 1.0, ("log_probs",))[
        0
    ]
    return -(log_probs * weight).sum()


def ours(hidden: Tensor, head: LabelHead, target: Tensor, weight: Tensor) -> Tensor:
    """The package's: gradients while the logits are at hand."""
    return label_nll(hidden, head, target, weight).nll_sum


CANDIDATES: dict[str, Score] = {f.__name__: f for f in (whole, checkpointed, torch_chunked, trl_chunked, ours)}


TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative, of the losses among each other."""


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Best time of some steps of one candidate, its peak memory beyond the inputs, and its value."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    head = LabelHead(args.width, args.vocab, bias=False, device=args.device, dtype=dtype)
    head.weight.requires_grad_(not args.frozen)
    hidden = torch.randn(args.labels, args.width, device=args.device, dtype=dtype, requires_grad=True)
    target = torch.randint(args.vocab, (args.labels,), device=args.device)
    weight = torch.rand(args.labels, device=args.device)
    before, times = _peak_bytes(args.device), []
    for _ in range(args.steps):
        head.zero_grad()
        start = time.perf_counter()
        loss = CANDIDATES[name](hidden, head, target, weight)
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    mib = (_peak_bytes(args.device) - before) / 2**20
    return {"seconds": round(min(times), 4), "peak_mib": round(mib), "loss": float(loss)}


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=156_032)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--frozen", action="store_true", help="a head that is not trained")
    parser.add_argument("--quick", action="store_true", help="a small vocabulary and few labels")
    parser.add_argument("--candidate", choices=sorted(CANDIDATES), help="measure this one in this process")
    args = parser.parse_args()
    if args.quick:
        args.labels, args.width, args.vocab = 64, 64, 4096
    if args.candidate:
        print(json.dumps(measure(args.candidate, args)))
        return
    found = {}
    for name in CANDIDATES:
        if name == "torch_chunked" and not hasattr(F, "linear_cross_entropy"):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--candidate", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    whole_loss = found["whole"]["loss"]
    for name, figures in sorted(found.items(), key=lambda item: item[1]["seconds"]):
        print(f"{name:14} {figures['seconds']:9.4f} s {figures['peak_mib']:7} MiB")
        if abs(figures["loss"] - whole_loss) > TOLERANCE[args.dtype] * whole_loss:
            sys.exit(f"{name}: loss {figures['loss']}, with all logits at once it is {whole_loss}")
    setup = {key: getattr(args, key) for key in ("labels", "width", "vocab", "dtype", "device", "frozen")}
    ways = {
        figure: {name: found[name][figure] for name in sorted(found, key=lambda name: found[name]["seconds"])}
        for figure in ("seconds", "peak_mib")
    }
    print(json.dumps({**ways, **setup}))


if __name__ == "__main__":
    main()
