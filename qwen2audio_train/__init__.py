"""The three-stage recipe behind Qwen2-Audio: pre-training, supervised fine-tuning, preference optimisation.

Rooms from the ground up: `layout`, `errors` and `config` (known to all); `data` and `model` (which do not know each
other); `evaluation`, `export` and `pairs` on both; `training` and `planning` on top; `cli` beside them, for the scripts
of launch/. docs/architecture.md is the map.
"""

from __future__ import annotations

import os

__version__ = "0.2.0"

# Other libraries read these when they are imported, so they are set before any of them; what the user has set stays.
# No telemetry, and no threads in a tokenizer whose process is going to be forked into the workers of a loader.
for _name, _value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_name, _value)

# Every pack has lengths of its own, which fragments a GPU's memory unless its segments may grow. CUDA's allocator alone
# reads this, by either name.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
