"""A step of DPO side by side: packed trees under our trainer, and TRL's own trainer on padded, unshared rows.

    python benchmarks/dpo_step.py --save dpo_step.cpu2   # 4 pairs a step, 4 steps; kept in benchmarks/results/
    python benchmarks/dpo_step.py --quick                # 2 pairs a step, 3 steps, both sides at a time on two cores
    python benchmarks/dpo_step.py --device cuda --dtype bfloat16

TRL's side has a minimal collator: its own for the ids, and every clip as 30 s of padded features that are repeated for
the chosen and the rejected row, as its collator for images does. Spectrograms and batches are made beforehand on both
sides. The reference is a frozen copy (`live`), the policy without its adapter (`adapter_off`), or stored
log-probabilities (`cached`); `cached_against_live` sets our stored ones against TRL's live ones.

Clips are lognormal (median 7.5 s, sigma 0.6), answers 20 tokens on average, and the model keeps the real one's ratio of
encoder to language model. Every way runs in a process of its own; the losses of all its steps have to be the other
side's to 1e-4 (float32). Time is CPU time on a CPU, so that other processes do not count. On a CPU TRL's head scores
every position of its rows, on a GPU the labelled ones alone.

The last line is JSON: speed-up and memory (TRL's over ours) of each kind of reference.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import workload
from datasets import Dataset
from record import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from qwen2audio_train.batch import PreferenceBatch, tensors
from qwen2audio_train.config.preference import Reference
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.data.samples.collate import pack_preference
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO, mel_columns, num_audio_tokens
from qwen2audio_train.layout import MAX_FRAMES, NUM_MEL_BINS
from qwen2audio_train.model.adapters import apply_adapter, lora_config
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.training.reference.cache import ReferenceCache
from qwen2audio_train.training.trainers.dpo import AudioDPOTrainer
from qwen2audio_train.training.trainers.packed import RunFiles

AUDIO_ID, PAD_ID = 4095, 0
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    **workload.SHAPES,
    "small": {
        "audio_config": {"d_model": 320, "encoder_layers": 3, "encoder_attention_heads": 5, "encoder_ffn_dim": 1280},
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "intermediate_size": 1408,
            "vocab_size": 4096,
        },
    },
}
ADAPTER = AdapterConfig(kind=AdapterKind.lora, r=8, modules=["language_model"])
KINDS = ("live", "adapter_off", "cached")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def built(make: Any, options: argparse.Namespace) -> Any:
    """A model with the random weights of its class, made on the device and in the dtype that it is used in."""
    parts: Any = {name: dict(part) for name, part in SHAPES[options.shape].items()}
    config = Qwen2AudioConfig(**parts, audio_token_index=AUDIO_ID)
    if make is Qwen2AudioForConditionalGeneration:
        config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            return make(config)
    finally:
        torch.set_default_dtype(default)


def random_pairs(count: int) -> list[Sample]:
    """A clip, a short question, two answers."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        frames = int(np.clip(100 * rng.lognormal(np.log(7.5), 0.6), 50, MAX_FRAMES))
        before, after = rng.integers(1, AUDIO_ID, 20), rng.integers(1, AUDIO_ID, 12)
        ids = np.concatenate([before, np.full(num_audio_tokens(frames), AUDIO_ID), after])
        mel = np.zeros((NUM_MEL_BINS, mel_columns(frames)), dtype=np.float32)
        mel[:, : min(frames + 2, MAX_FRAMES)] = rng.standard_normal((NUM_MEL_BINS, min(frames + 2, MAX_FRAMES)))
        answers = tuple(rng.integers(1, AUDIO_ID, max(2, int(rng.lognormal(np.log(18), 0.4)))) for _ in range(2))
        unlabelled, slots = np.zeros(len(ids), dtype=bool), np.flatnonzero(ids == AUDIO_ID)
        pair = Sample(str(number), "random", "preference", ids, unlabelled, slots, answers, (mel,), (frames,))
        pairs.append(pair)
    return pairs


class PaddedCollator:
    """TRL's collator for the ids; 30 s of features per row, those of the chosen rows repeated for the rejected."""

    def __init__(self, pairs: list[Sample]) -> None:
        self.frames = torch.tensor([pair.clip_frames[0] for pair in pairs])
        self.features = torch.zeros(len(pairs), NUM_MEL_BINS, MAX_FRAMES)
        for feature, pair in zip(self.features, pairs, strict=True):
            width = min(pair.mels[0].shape[1], MAX_FRAMES)
            feature[:, :width] = torch.from_numpy(pair.mels[0][:, :width])
        self.ids = DataCollatorForPreference(pad_token_id=PAD_ID)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        which = [row["pair"] for row in rows]
        mask = (torch.arange(MAX_FRAMES) < self.frames[which, None]).long()
        audio = {"input_features": self.features[which].repeat(2, 1, 1), "feature_attention_mask": mask.repeat(2, 1)}
        return self.ids(rows) | audio


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer on a data set that is tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""


class Batches:
    """Packed batches, over and over."""

    source_names = ("random",)
    telemetry = SimpleNamespace(take=dict)
    plan = 0

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from map(dict, self.batches)


class Stopwatch(TrainerCallback):
    """Seconds of every step but the first, and the losses."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter() if self.device == "cuda" else time.process_time())

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")


def stock_trainer(kind: str, pairs: list[Sample], args: DPOConfig, watch: Stopwatch, options: Any) -> DPOTrainer:
    rows = [
        {
            "prompt_ids": pair.input_ids.tolist(),
            "chosen_ids": pair.branches[0].tolist(),
            "rejected_ids": pair.branches[1].tolist(),
            "pair": number,
        }
        for number, pair in enumerate(pairs)
    ]
    args.precompute_ref_log_probs = kind == "cached"
    weights = built(PackedQwen2Audio, options).state_dict()
    policy = built(Qwen2AudioForConditionalGeneration, options)
    policy.load_state_dict(weights)
    frozen = None
    if kind == "live":
        frozen = built(Qwen2AudioForConditionalGeneration, options)
        frozen.load_state_dict(weights)
    return TokenisedDPOTrainer(
        policy,
        ref_model=frozen,
        args=args,
        data_collator=PaddedCollator(pairs),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[watch],
        peft_config=lora_config(ADAPTER, QWEN2_AUDIO) if kind == "adapter_off" else None,
    )


def our_trainer(kind: str, pairs: list[Sample], args: DPOConfig, watch: Stopwatch, options: Any) -> DPOTrainer:
    size = args.per_device_train_batch_size
    batches = [tensors(pack_preference(pairs[start : start + size])) for start in range(0, len(pairs), size)]
    policy = built(PackedQwen2Audio, options)
    frozen = built(PackedQwen2Audio, options) if kind == "live" else None
    if kind == "adapter_off":
        torch.manual_seed(args.seed)
        policy = apply_adapter(policy, ADAPTER)
    trainer = AudioDPOTrainer(
        policy,
        args=args,
        reference=Reference.cached if kind == "cached" else Reference.auto,
        ref_model=frozen,
        cache=ReferenceCache(Path(str(args.output_dir)) / "reference", "policy") if kind == "cached" else None,
        processing_class=tokenizer(),
        callbacks=[watch],
        loader=Batches(batches),
        files=RunFiles("", {}, lambda folder: None),
    )
    if kind == "cached":
        trainer.precompute_reference(cast(list[PreferenceBatch], batches))
    return trainer


def run(side: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    pairs = random_pairs(options.pairs * options.steps)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.pairs,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=options.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )
        watch = Stopwatch(options.device)
        build = our_trainer if side == "ours" else stock_trainer
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        trainer = build(kind, pairs, args, watch, options)
        trainer.train()
    if options.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    seconds = float(np.median(np.diff(watch.marks)))
    return {"seconds_per_step": round(seconds, 4), "memory_mib": round(memory, 1), "losses": watch.losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="keep the figures in benchmarks/results/NAME.json")
    parser.add_argument("--only", nargs=2, metavar=("SIDE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.pairs = options.pairs or (2 if options.quick else 4)
    options.steps = options.steps or (3 if options.quick else 4)
    if options.only:
        print(json.dumps(run(options.only[0], options.only[1], options)))
        return
    ways = [(side, kind) for kind in KINDS for side in ("stock", "ours")]
    with ThreadPoolExecutor(2 if options.quick and options.device == "cpu" else 1) as pool:
        found = dict(zip(ways, pool.map(lambda way: in_own_process(way[0], way[1], options), ways), strict=True))
    for (side, kind), result in found.items():
        print(f"{side:5} {kind:11} {result['seconds_per_step']:8.3f} s a step  {result['memory_mib']:8.0f} MiB")
    for kind in KINDS:
        stock, ours = found["stock", kind]["losses"], found["ours", kind]["losses"]
        if not np.allclose(stock, ours, rtol=0, atol=TOLERANCE[options.dtype]):
            sys.exit(f"{kind}: the losses differ, so the times mean nothing: stock {stock}, ours {ours}")
    figures = {"speedup": ratios(found, "seconds_per_step"), "memory_ratio": ratios(found, "memory_mib")}
    if options.save:
        settings = {name: getattr(options, name) for name in ("device", "dtype", "shape", "pairs", "steps", "threads")}
        save(options.save, {**figures, "settings": settings, "ways": {" ".join(way): found[way] for way in ways}})
    print(json.dumps(figures))


def in_own_process(side: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", side, kind]
    for name in ("device", "dtype", "shape", "pairs", "steps", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} {kind} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratios(found: dict[tuple[str, str], dict[str, Any]], figure: str) -> dict[str, float]:
    """TRL's figure over ours."""
    ways = {kind: (kind, kind) for kind in KINDS} | {"cached_against_live": ("live", "cached")}
    return {
        name: round(found["stock", theirs][figure] / found["ours", own][figure], 2)
        for name, (theirs, own) in ways.items()
    }


if __name__ == "__main__":
    main()
