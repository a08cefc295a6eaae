"""Evaluates a tiny model on clips of noise: `python -m tests.evaluation.decoding.kept_worker CLIPS OUTPUT COUNT`."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, evaluate, save
from tests.evaluation.tiny import SAMPLES, ending_model, tiny_tokenizer


def evaluated(clips: Path, output: Path, count: int) -> Evaluation:
    names = sorted(path.name for path in clips.glob("*.wav"))
    examples = [
        TaskExample(f"e{i}", Clip(str(clips / names[i % len(names)]), None), "asr", "en", "the cat sat", f"s{i % 3}")
        for i in range(count)
    ]
    decoding = Decoding(max_new_tokens=12, tokens_per_batch=400)
    result = evaluate(
        ending_model(), tiny_tokenizer(), examples, SAMPLES, decoding=decoding, bootstrap_samples=10, keep_in=output
    )
    save(result, output)
    return result


if __name__ == "__main__":
    evaluated(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
