"""Does a server say what our own path says?  python benchmarks/serving_diff.py MANIFEST EVALUATION BASE_URL MODEL

Asks an OpenAI-compatible endpoint every example of a chat manifest, greedily, and compares its texts with those that
launch/evaluate.py wrote into the folder EVALUATION.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import soundfile

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import ChatExample, Clip
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.evaluation.reporting.results import TEXTS, read_texts
from qwen2audio_train.layout import SAMPLING_RATE

TIMEOUT_S = 300.0


def part_of(part: Clip | str) -> dict[str, Any]:
    """A part of a message as the endpoint takes it: text, or the clip as the encoder would hear it, in a WAV."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    soundfile.write(file, load_clip(part, SampleRecipe()), SAMPLING_RATE, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def ask(base_url: str, model: str, example: ChatExample, max_tokens: int = 256) -> str:
    """The server's greedy answer to the last turn of the user."""
    said = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    messages = [{"role": message.role, "content": list(map(part_of, message.content))} for message in said]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def differences(manifest: str, evaluation: str, base_url: str, model: str) -> tuple[list[tuple[str, str, str]], int]:
    """(id, our text, the server's) where they differ, and how many were asked."""
    ours = {item.id: text for item, text, _ in read_texts(Path(evaluation, TEXTS))}
    asked = [e for e in read_manifest(manifest) if isinstance(e, ChatExample) and e.id in ours]
    theirs = [(example.id, ours[example.id], ask(base_url, model, example)) for example in asked]
    return [one for one in theirs if one[1].strip() != one[2].strip()], len(asked)


if __name__ == "__main__":
    different, count = differences(*sys.argv[1:5])
    for name, own, other in different:
        print(f"{name}\n  here:   {own!r}\n  server: {other!r}")
    print(f"{count - len(different)} of {count} texts are the same")
