"""Models behind an API with audio input, so that proprietary ones fill their rows: OpenAI's form, or Gemini's.

Every reply is kept on disk before it is used, so a run that was cut off asks for nothing again. A clip goes as a whole,
16 kHz mono WAV. What the endpoint refuses counts as an empty answer and is counted apart; what fails for good is left
out by name, and asked again by the next run.
"""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import soundfile
from tqdm import tqdm

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Clip, Example
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.backends.answers import WORDS, HeldOutOptions, held_out, scored, turns_of
from qwen2audio_train.evaluation.judging.client import Client, JudgeError, Reply, client_of
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation
from qwen2audio_train.layout import SAMPLING_RATE


@dataclass
class ApiOptions(HeldOutOptions):
    """The keys of `launch/evaluate.py api`.

    Attributes:
        manifests, output_dir, max_new_tokens, bootstrap_samples, seed: as of every backend.
        api: the endpoint: base_url, model, form (`openai` or `gemini`), and the other fields of `client.Endpoint`.
        workers: requests under way at once.
    """

    api: dict[str, Any] = field(default_factory=dict)
    workers: int = 8


def evaluate_api(options: ApiOptions) -> Evaluation:
    """Ask the endpoint about every example, and score its answers."""
    examples = held_out(options)
    given = {"max_tokens": options.max_new_tokens, "timeout_s": 120.0, **options.api}
    client = client_of(given, f"{options.output_dir}/api_cache", "api")
    with ThreadPoolExecutor(options.workers) as pool:
        asked = pool.map(lambda example: _asked(client, example), examples)
        replies = list(tqdm(asked, total=len(examples), desc="api", disable=None))
    failed = {place: reply for place, reply in enumerate(replies) if isinstance(reply, str)}
    texts = [None if isinstance(reply, str) else reply.text for reply in replies]
    refused = sum(isinstance(reply, Reply) and reply.refusal for reply in replies)
    note = f"{refused} of {len(examples)} were refused by the endpoint and count as they were answered"
    settings = {"backend": "api", "model": client.endpoint.model, "form": client.endpoint.form, "cost": client.spent}
    return scored(options, examples, texts, failed, notes=[note] if refused else [], settings=settings, asked=WORDS)


def messages_of(example: Example, recipe: SampleRecipe = SampleRecipe()) -> list[dict[str, Any]]:
    """An example as the endpoint is asked.

    Raises:
        ExampleError: a clip cannot be read.
    """
    return [{"role": role, "content": [_part(part, recipe) for part in content]} for role, content in turns_of(example)]


def _part(part: str | Clip, recipe: SampleRecipe) -> Any:
    if not isinstance(part, Clip):
        return part
    wav = io.BytesIO()
    soundfile.write(wav, load_clip(part, recipe), SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return {"wav": base64.b64encode(wav.getvalue()).decode()}


def _asked(client: Client, example: Example) -> Reply | str:
    """The reply, or why there is none."""
    try:
        return client.complete(messages_of(example))
    except (JudgeError, ExampleError) as error:
        return str(error)
