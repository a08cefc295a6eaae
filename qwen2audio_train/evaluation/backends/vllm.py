"""An exported checkpoint in vLLM. Run with 0.32.0 on a CPU (docs/serving.md); the tests have a stand-in of its calls.

Clips over 30 s are left out by name: vLLM's processor takes 30 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.prompts.render import rendered_text
from qwen2audio_train.data.samples.maker import is_long
from qwen2audio_train.data.samples.recipe import render_as, saved_recipe
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.errors import ExampleError, MissingLibraryError
from qwen2audio_train.evaluation.backends.answers import HeldOutOptions, held_out, scored
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation
from qwen2audio_train.layout import SAMPLING_RATE


@dataclass
class VllmOptions(HeldOutOptions):
    """The keys of `launch/evaluate.py vllm`.

    Attributes:
        manifests, output_dir, max_new_tokens, bootstrap_samples, seed: as of every backend.
        checkpoint: folder that launch/export.py wrote.
        dtype: of the weights in vLLM; unset, as they were saved.
    """

    checkpoint: str = ""
    dtype: str = "auto"


def evaluate_vllm(options: VllmOptions) -> Evaluation:
    """Have vLLM answer every example greedily, and score its answers.

    Raises:
        ConfigError: no checkpoint, or one that launch/export.py did not write.
        MissingLibraryError: vLLM is not installed.
    """
    recipe = saved_recipe(options.checkpoint) if options.checkpoint else None
    if recipe is None:
        raise ConfigError(f"checkpoint={options.checkpoint}: expected a folder that launch/export.py wrote")
    examples = held_out(options)
    try:
        vllm: Any = import_module("vllm")
    except ModuleNotFoundError:
        raise MissingLibraryError("vLLM is not installed: pip install vllm, in an environment of its own") from None
    prompts: dict[int, dict[str, Any]] = {}
    failed: dict[int, str] = {}
    for place, example in enumerate(examples):
        try:
            prompts[place] = _prompt(example, recipe)
        except ExampleError as error:
            failed[place] = str(error)
    most = max((len(prompt["multi_modal_data"]["audio"]) for prompt in prompts.values()), default=1)
    engine = vllm.LLM(model=options.checkpoint, dtype=options.dtype, limit_mm_per_prompt={"audio": max(1, most)})
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=options.max_new_tokens, min_tokens=1)
    outputs = engine.generate(list(prompts.values()), greedy)
    answers = dict(zip(prompts, (output.outputs[0].text for output in outputs), strict=True))
    texts = [answers.get(place) for place in range(len(examples))]
    settings = {"backend": "vllm", "checkpoint": options.checkpoint, "dtype": options.dtype, "vllm": vllm.__version__}
    return scored(options, examples, texts, failed, notes=[], settings=settings)


def _prompt(example: Example, recipe: Any) -> dict[str, Any]:
    rendered = render_as(recipe, example, for_generation=True)
    waveforms = [load_clip(clip, recipe) for clip in rendered.clips]
    if any(is_long(len(waveform) / SAMPLING_RATE) for waveform in waveforms):
        raise ExampleError(f'example "{example.id}": a clip over 30 s, which vLLM does not hear to its end')
    audio = [(waveform, SAMPLING_RATE) for waveform in waveforms]
    return {"prompt": rendered_text(rendered), "multi_modal_data": {"audio": audio}}
