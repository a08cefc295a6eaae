"""What each memory option saves of a training step: bytes per parameter, peak, and how far the forecast is from it.

    python benchmarks/memory.py --quick    # under two minutes on two CPU cores
    python benchmarks/memory.py            # some minutes; writes benchmarks/results/memory.cpu2.json

Every case is a recipe in a process of its own: a model of the published one's proportions with random weights, steps of
two packs, the second of which finds gradients of the first. `peak_mib` is of the resident set (on a GPU of the
allocator), beyond what the process held when it had trained a model of a few thousand weights; `kib_per_token` is how
much it grows with the pack. Beside both stands what `launch/plan.py` says of the same recipe. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import torch
from record import save
from workload import SHAPES

CLIP_S, PROMPT_TOKENS, LABEL_TOKENS = 6.0, 10, 24

FLOAT32 = ("model.dtype=float32",)
BF16 = ("model.dtype=bfloat16",)
BOTH_FULL = ("model.activation_checkpointing=[audio_tower,language_model]",)
BOTH_SELECTIVE = (*BOTH_FULL, "model.activation_checkpointing_policy=selective")
CASES: dict[str, tuple[str, ...]] = {
    "float32, AdamW": FLOAT32,
    "float32, fused AdamW": (*FLOAT32, "trainer.optim=adamw_torch_fused"),
    "float32, 8-bit AdamW": (*FLOAT32, "trainer.optim=adamw_bnb_8bit"),
    "float32, Adafactor": (*FLOAT32, "trainer.optim=adafactor"),
    "autocast, AdamW": (*FLOAT32, "trainer.bf16=true"),
    "bfloat16, AdamW with Kahan sums": (*BF16, "trainer.optim=adamw_bf16_kahan"),
    "bfloat16, AdamW with stochastic rounding": (*BF16, "trainer.optim=adamw_bf16_stochastic"),
    "float32, AdamW, language model checkpointed": (*FLOAT32, "model.activation_checkpointing=[language_model]"),
    "float32, AdamW, tower checkpointed": (*FLOAT32, "model.activation_checkpointing=[audio_tower]"),
    "float32, AdamW, both checkpointed": (*FLOAT32, *BOTH_FULL),
    "float32, AdamW, both selectively checkpointed": (*FLOAT32, *BOTH_SELECTIVE),
    "float32, AdamW, frozen tower": (*FLOAT32, "model.freeze.audio_tower=true"),
    "float32, LoRA": (*FLOAT32, "adapter.kind=lora"),
    "bfloat16, AdamW with stochastic rounding, both checkpointed": (
        *BF16,
        "trainer.optim=adamw_bf16_stochastic",
        *BOTH_FULL,
    ),
    "bfloat16, LoRA, both checkpointed": (*BF16, "adapter.kind=lora", *BOTH_FULL),
    "bfloat16, LoRA, both selectively checkpointed": (*BF16, "adapter.kind=lora", *BOTH_SELECTIVE),
}
QUICK = ("float32, AdamW", "bfloat16, AdamW with stochastic rounding", "float32, AdamW, both checkpointed")


WARM_UP = {
    "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 300,
    },
}


def recipe(overrides: tuple[str, ...], samples: int, shape: dict[str, Any]) -> Any:
    """The checked config of a case."""
    from omegaconf import OmegaConf

    from qwen2audio_train.config.schema import StageConfig, load_config

    values = {
        "stage": "sft",
        "name": "memory",
        "num_threads": 1,
        "model": {
            "kind": "tiny",
            "architecture": shape,
        },
        "data": {"tokens_per_pack": 2**20, "samples_per_pack": samples, "packs_per_step": 2},
        "trainer": {"optim": "adamw_torch"},
        "tracker": {"wandb": "off"},
    }
    given: Any = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
    return load_config(given, StageConfig)


def measure(name: str, samples: int, shape: dict[str, Any]) -> dict[str, Any]:
    """One case at a shape of `workload.SHAPES`, in this process."""
    from qwen2audio_train.planning.dry_run import make_plan
    from qwen2audio_train.planning.find_batch import attempt, stepper
    from qwen2audio_train.planning.forecast import PlanOptions, forecast, typical_sample
    from qwen2audio_train.planning.peak_memory import PeakMemory

    options = PlanOptions(clip_s=CLIP_S, prompt_tokens=PROMPT_TOKENS, label_tokens=LABEL_TOKENS)
    plan, small = (make_plan(recipe(CASES[name], count, shape), 1) for count in (samples, 1))
    typical = typical_sample(plan, options)
    expected, least = (forecast(p, typical, options).memory.total for p in (plan, small))
    # What libraries load and allocate when they first train anything is no option's doing.
    warm_up, _ = stepper(make_plan(recipe(CASES[name], 1, WARM_UP), 1), typical, forwards=2)
    warm_up(1)
    del warm_up
    memory = PeakMemory()
    step, optimizer = stepper(plan, typical, forwards=2)
    attempt(step, 1, memory)
    one, trial = (attempt(step, count, memory) for count in (1, samples))
    assert one is not None
    assert trial is not None
    more_tokens = (samples - 1) * typical.load.tokens
    return {
        "bytes_per_parameter": round(bytes_per_trained(optimizer), 2),
        "peak_mib": round(trial.peak_bytes / 2**20),
        "forecast_mib": round(expected / 2**20),
        "kib_per_token": round((trial.peak_bytes - one.peak_bytes) / more_tokens / 2**10, 1),
        "forecast_kib_per_token": round((expected - least) / more_tokens / 2**10, 1),
        "step_s": round(trial.seconds, 2),
    }


def bytes_per_trained(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of weight, gradient and optimiser state for each parameter that is trained."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    tensors = [*parameters, *(p.grad for p in parameters)]
    tensors += [value for p in parameters for value in optimizer.state[p].values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in parameters)


def run_case(name: str, samples: int) -> dict[str, Any]:
    """One case in a process of its own; `not measured` where its optimizer is not installed."""
    if "8-bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        return {"not measured": "bitsandbytes is not installed"}
    command = [sys.executable, __file__, "--case", name, "--samples", str(samples)]
    # glibc keeps freed blocks below a threshold that grows; a fixed one gives tensors back, so that the peak is theirs.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three cases with small packs")
    parser.add_argument("--case", choices=list(CASES), help="only this one, in this process")
    parser.add_argument("--samples", type=int, help="clips of six seconds in a pack")
    args = parser.parse_args()
    samples = args.samples or (3 if args.quick else 6)
    if args.case:
        print(json.dumps(measure(args.case, samples, SHAPES["small"])))
        return
    cases = {}
    for name in QUICK if args.quick else CASES:
        cases[name] = run_case(name, samples)
        print(name, json.dumps(cases[name]), file=sys.stderr, flush=True)
    figures = {"clip_s": CLIP_S, "samples": samples, "cases": cases}
    if not args.quick:
        save("memory.cpu2", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
