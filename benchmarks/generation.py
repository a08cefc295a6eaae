"""Decoding side by side: clips one by one, in batches, by the stock loop on the same batches, and by the stock class.

    python benchmarks/generation.py            # 64 clips of 1 to 10 s, batches of 16
    python benchmarks/generation.py --quick    # a minute

A random model of the demo's size; its stop token is made one that it says early in some answers and late in others.
All texts have to be the same, in float32, or nothing is reported. `stock_loop` is transformers' `generate` on the
embeddings of our encoder, `stock` the stock class's from spectrograms padded to 30 s, which are made before time
counts. `eight` samples eight answers of full length to each clip, `one` a single one.

Two lines of JSON: CPU seconds of each way with the speed-ups, and last how many times as long stock `generate` takes
and what eight answers to a prompt cost over one.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from qwen2audio_train.config.schema import ModelConfig, ModelKind
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.data.samples.sample import Sample, build_sample
from qwen2audio_train.evaluation.decoding.generate import (
    Decoding,
    embed_prompts,
    generate_texts,
    sample_texts,
    stop_ids,
)
from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio

ARCHITECTURE = {
    "audio_config": {"d_model": 144, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 576},
    "text_config": {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}


def random_model(tokenizer: Any) -> PackedQwen2Audio:
    """Weights spread wide, so that the best token is clear of the second."""
    torch.manual_seed(0)
    cfg = ModelConfig(kind=ModelKind.tiny, architecture=ARCHITECTURE)
    model = build_model(cfg, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_positions" not in name:
                weight.mul_(3.0)
    return model


@torch.no_grad()
def let_answers_end(model: PackedQwen2Audio, tokenizer: Any, samples: list[Sample], length: int) -> None:
    """Exchange the stop token's row of the head with that of the token whose first places are the most spread out."""
    answers = stock_ids(model, tokenizer, samples, Decoding(max_new_tokens=length, min_new_tokens=length))
    places = [[(row == token).nonzero()[:1].sum().item() or length for row in answers] for token in answers.unique()]
    chosen = int(answers.unique()[int(np.argmax([np.std(p) * (min(p) > 2) for p in places]))])
    stop, weight = stop_ids(tokenizer)[0], model.lm_head.weight
    weight[[stop, chosen], :] = weight[[chosen, stop], :]


def random_prompts(count: int, tokenizer: Any) -> list[tuple[Sample, np.ndarray]]:
    """Recognition prompts on noise of 1 to 10 s, the shortest first, each with its waveform."""
    rng = np.random.default_rng(0)
    prompts = []
    for index in range(count):
        seconds = rng.uniform(1.0, 10.0)
        noise = (0.1 * rng.standard_normal(round(seconds * SAMPLING_RATE))).astype(np.float32)
        example = TaskExample(str(index), Clip("", seconds), "asr", "en", "", "noise")
        prompts.append((build_sample(render(example, for_generation=True), [noise], tokenizer), noise))
    return sorted(prompts, key=lambda prompt: len(prompt[0].input_ids))


def stock_ids(model: PackedQwen2Audio, tokenizer: Any, samples: list[Sample], decoding: Decoding) -> torch.Tensor:
    """`GenerationMixin.generate` on the embeddings of our encoder."""
    embeds, mask, _ = embed_prompts(model, samples)
    stops = stop_ids(tokenizer)
    stock: Any = model  # its stubs want a protocol that no model of transformers fulfils
    return stock.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[1],
    )


def stock_texts(model: PackedQwen2Audio, tokenizer: Any, samples: list[Sample], decoding: Decoding) -> list[str]:
    ids = stock_ids(model, tokenizer, samples, decoding)
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stock_inputs(tokenizer: Any, prompts: list[tuple[Sample, np.ndarray]]) -> dict[str, torch.Tensor]:
    """What the stock class takes of some prompts: ids padded on the left, spectrograms padded to 30 s."""
    extract = WhisperFeatureExtractor(feature_size=128)
    features = extract(
        [waveform for _, waveform in prompts],
        sampling_rate=SAMPLING_RATE,
        return_tensors="pt",
        return_attention_mask=True,
    )
    ids = [torch.from_numpy(sample.input_ids) for sample, _ in prompts]
    length = max(map(len, ids))
    pad = stop_ids(tokenizer)[1]
    return {
        "input_ids": torch.stack([F.pad(row, (length - len(row), 0), value=pad) for row in ids]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in ids]),
        "input_features": features["input_features"],
        "feature_attention_mask": features["attention_mask"],
    }


def stock_class(model: PackedQwen2Audio) -> Any:
    """transformers' own model with the same weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    stock = Qwen2AudioForConditionalGeneration(config).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def generated(stock: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], decoding: Decoding) -> list[str]:
    """The texts of the stock class's `generate`."""
    stops = stop_ids(tokenizer)
    ids = stock.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[1],
    )[:, inputs["input_ids"].size(1) :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def timed(run: Callable[[], list[Any]], repeats: int) -> tuple[float, list[Any]]:
    """Least CPU seconds of `repeats` runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        with torch.no_grad():
            texts = run()
        seconds.append(time.process_time() - start)
    return min(seconds), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.clips, args.max_new_tokens = args.batch, 24
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(["the cat sat on the mat and heard what was said"], 400, ["<|en|>"])
    model = random_model(tokenizer)
    prompts = random_prompts(args.clips, tokenizer)
    samples = [sample for sample, _ in prompts]
    let_answers_end(model, tokenizer, samples[:: max(1, args.clips // 16)], args.max_new_tokens)
    batches = [samples[start : start + args.batch] for start in range(0, args.clips, args.batch)]
    stock = stock_class(model)
    inputs = [
        stock_inputs(tokenizer, prompts[start : start + args.batch]) for start in range(0, args.clips, args.batch)
    ]
    decoding = Decoding(max_new_tokens=args.max_new_tokens, tokens_per_batch=10**9)
    drawn = replace(decoding, temperature=1.0, min_new_tokens=args.max_new_tokens)
    eight = replace(drawn, num_return_sequences=8)
    ways: dict[str, Callable[[], list[Any]]] = {
        "one_by_one": lambda: [generate_texts(model, tokenizer, [s], decoding)[0] for s in samples],
        "batched": lambda: [text for batch in batches for text in generate_texts(model, tokenizer, batch, decoding)],
        "stock_loop": lambda: [text for batch in batches for text in stock_texts(model, tokenizer, batch, decoding)],
        "stock": lambda: [text for part in inputs for text in generated(stock, tokenizer, part, decoding)],
        "one": lambda: [texts for batch in batches for texts in sample_texts(model, tokenizer, batch, drawn)],
        "eight": lambda: [texts for batch in batches for texts in sample_texts(model, tokenizer, batch, eight)],
    }
    results = {name: timed(run, 1 if args.quick else 3) for name, run in ways.items()}
    seconds = {name: round(result[0], 3) for name, result in results.items()}
    texts = {name: result[1] for name, result in results.items()}
    for name in ("batched", "stock_loop", "stock"):
        if texts[name] != texts["one_by_one"]:
            sys.exit(f"{name}: texts differ from those of the clips one by one, so the times mean nothing")
    print(
        json.dumps(
            {
                "clips": args.clips,
                "batch": args.batch,
                "cpu_s": seconds,
                "speed_up_over_one_by_one": round(seconds["one_by_one"] / seconds["batched"], 2),
                "speed_up_over_stock_loop": round(seconds["stock_loop"] / seconds["batched"], 2),
                "same_texts": True,
                "answer_tokens": [len(tokenizer(text)["input_ids"]) for text in texts["batched"]][:16],
            }
        )
    )
    over_stock = round(seconds["stock"] / seconds["batched"], 2)
    eight_over_one = round(seconds["eight"] / seconds["one"], 2)
    print(json.dumps({"generation": {"over_stock": over_stock, "eight_over_one": eight_over_one, "same_texts": True}}))


if __name__ == "__main__":
    main()
