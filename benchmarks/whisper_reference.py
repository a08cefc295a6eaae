"""What a Whisper model's own decoder writes for the transcribed clips of a manifest, scored as evaluation scores ours.

    python benchmarks/whisper_reference.py parts/whisper_base data_cache/recordings/dev.jsonl

Greedy, the clip's language given, no timestamps: the reference row of docs/real_parts.md and docs/recordings.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict

import jiwer
import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration

from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.examples import TaskExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.scoring.metrics import error_rate
from qwen2audio_train.evaluation.scoring.normalise import normalise
from qwen2audio_train.layout import SAMPLING_RATE


def main(whisper: str, manifests: list[str]) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{whisper}/tokenizer.json")
    texts: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for example in (example for path in manifests for example in read_manifest(path)):
        if not isinstance(example, TaskExample) or example.task != "asr" or example.language is None:
            continue
        prompt = ["<|startoftranscript|>", f"<|{example.language}|>", "<|transcribe|>", "<|notimestamps|>"]
        features = extractor(load_audio(example.clip), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            ids = model.generate(
                features,
                decoder_input_ids=torch.tensor([tokenizer.convert_tokens_to_ids(prompt)]),
                max_length=224,
            )[0]  # without the prompt
        said = str(tokenizer.decode(ids, skip_special_tokens=True))
        texts[example.source, example.language].append((example.target, said))
    for (source, language), rows in texts.items():
        references, hypotheses = [row[0] for row in rows], [row[1] for row in rows]
        score = error_rate(references, hypotheses, language)
        plain = [[normalise(text, language) for text in side] for side in (references, hypotheses)]
        interval = f"[{score.low:.1%}, {score.high:.1%}]"
        print(f"{source} {language} {score.metric} {score.value:.1%} {interval} n={score.n}; cer ", end="")
        print(f"{jiwer.cer(plain[0], plain[1]):.1%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
