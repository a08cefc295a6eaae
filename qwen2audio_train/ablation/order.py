"""Did two runs meet the same examples in the same steps? Read off the digest of the data plan in their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen2audio_train.data.order.state import differences
from qwen2audio_train.errors import UserError
from qwen2audio_train.training.checkpoints.folder import newest

SAME = "same examples in every step"
SAME_DRAWS = "same examples in the same order, in other packs"


class OtherOrder(UserError):
    """Two runs that should differ in one thing did not meet the same examples."""


def data_state(folder: Path) -> dict[str, Any]:
    """The data state of a run's last checkpoint: `plan_hash` and the `inputs` that it is the hash of."""
    point = newest("auto", folder)
    if point is None:
        raise OtherOrder(f"{folder}: no complete checkpoint, so what it was trained on cannot be compared")
    state: dict[str, Any] = json.loads((point / "data_state.json").read_text(encoding="utf-8"))
    return state


def order_of(first: Mapping[str, object], second: Mapping[str, object]) -> str:
    """How the order of two data states compares, in words.

    The draws follow from seed, order, and the content, size and probability of every source. Lengths in tokens (the
    source's index) and budgets only decide which of them share a pack.
    """
    if first["plan_hash"] == second["plan_hash"]:
        return SAME
    changed = differences(first["inputs"], second["inputs"])
    packing = ("tokens_per_pack", "samples_per_pack", "packs_per_step", "window_examples")
    if all(line.startswith(packing) or line.split(":")[0].endswith(".index") for line in changed):
        return SAME_DRAWS
    return f"other data: {'; '.join(changed[:3])}"


def check_order(baseline: Path, overlay: Path) -> str:
    """Compare what an overlay's run was trained on with its baseline's.

    Returns:
        How the two compare.

    Raises:
        OtherOrder: the overlay changes no key of the data, and yet other examples came.
    """
    found = order_of(data_state(baseline), data_state(overlay))
    changed = changed_keys(baseline, overlay)
    if found != SAME and not any(key.startswith(DECIDES) for key in changed):
        raise OtherOrder(
            f"{overlay}: changes {', '.join(changed) or 'nothing'}, none of it the data's, and was trained on {found}. "
            "Have files of the corpus changed between the runs? Remove both folders and start again"
        )
    return found


DECIDES = ("data.", "model.kind", "model.path", "model.language_model", "model.num_mel_bins", "model.vocab_size")
"""Keys that may change the plan of the data: the sources, and the tokenizer and mel bins that measure them."""

PLACES = ("name", "run_dir", "init_from", "model.audio_encoder")
"""Keys that differ between any two runs of a chain."""


def changed_keys(baseline: Path, overlay: Path) -> list[str]:
    """Keys whose value differs between the resolved configs of two stages, but for their places."""
    first, second = (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) for folder in (baseline, overlay))
    keys = [line.split(":")[0] for line in differences(first, second)]
    return [key for key in keys if key not in PLACES]
