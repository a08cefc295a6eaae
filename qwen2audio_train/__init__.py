"""The three-stage recipe behind Qwen2-Audio: pre-training, supervised fine-tuning, preference optimisation.

Rooms from the ground up: `layout`, `errors` and `config` (known to all); `data` and `model` (which do not know each
other); `evaluation`, `export` and `pairs` on both; `training` and `planning` on top. docs/architecture.md is the map.
"""
