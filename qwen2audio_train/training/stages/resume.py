"""Whether a recipe may go on from a checkpoint: found out before anything is built, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from qwen2audio_train.config.schema import AdapterKind, ModelConfig, Stage, StageConfig
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints.bases import content_of, lineage_of
from qwen2audio_train.training.checkpoints.changes import PER_WEIGHT, Change, Rule, changes
from qwen2audio_train.training.checkpoints.folder import CheckpointError
from qwen2audio_train.training.stages.process import process
from qwen2audio_train.training.trainers.resumed import CONFIG_FILE

Found = TypeVar("Found")


def told_by_rank_0(find: Callable[[], Found]) -> Found:
    """What `find` gives on rank 0, on every rank; so is what it raises."""
    if process().num_processes == 1:
        return find()
    box: list[Any] = [None, None]
    if process().is_main_process:
        try:
            box = [find(), None]
        except (Exception, KeyboardInterrupt) as error:
            box = [None, error]
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    found: Found = box[0]
    return found


def plain(config: Any) -> dict[str, Any]:
    """A config as the values that YAML holds."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=lambda value: getattr(value, "value", None)))
    return values


def check_resume(config: StageConfig, point: Path, world_size: int) -> list[str]:
    """Compare a verified checkpoint with the recipe that is to go on from it.

    Returns:
        What differs and is carried out, a line each.

    Raises:
        CheckpointError: naming every key whose change cannot be carried out.
    """
    saved: Any = OmegaConf.to_container(OmegaConf.load(point / CONFIG_FILE))
    defaults = plain(StageConfig(stage=config.stage, name=config.name, model=ModelConfig(kind=config.model.kind)))
    found = changes(saved, plain(config), defaults)
    lineage = lineage_of(point)
    finished = folders.step_of(point) >= int(config.trainer.get("max_steps", 1000))
    kept = {Rule.refused, *((Rule.applied, Rule.data) if finished else ())}
    refused = [str(change) for change in found if change.rule in kept]
    refused += _moved_weights(config, lineage, found)
    if (point / "optimizer" / "optimizer.pt").is_file() or (point / "deepspeed").is_dir():
        refused.append("the state of its optimizer was written by an earlier version")
    then, now = (lineage.get("zero_stage"), lineage.get("world_size", world_size)), (config.deepspeed.stage, world_size)
    if _shared_out(*then) != _shared_out(*now) and config.trainer.get("optim", "adamw_torch") not in PER_WEIGHT:
        refused.append(
            f"trainer.optim={config.trainer['optim']}: its state was saved {_place(*then)} and cannot be shared out "
            f"{_place(*now)}; start it as it was"
        )
    if refused:
        which = "is the end of a run with other settings" if finished else "cannot be gone on from with this recipe"
        raise CheckpointError(
            f"{point} {which}:"
            + "".join(f"\n  {line}" for line in refused)
            + f"\nPut them back, choose another run_dir, or start a new run from its weights (init_from={point})."
        )
    notes = [f"{change} (from here on)" for change in found if change.rule in (Rule.applied, Rule.free)]
    if then != now:
        notes.append(f"saved {_place(*then)}, goes on {_place(*now)}")
    if then[1] != now[1]:
        notes.append("random numbers of dropout are not those of the uninterrupted run: another number of ranks")
    return notes


def _shared_out(stage: int | None, world_size: int) -> int:
    """On how many ranks the state of an optimizer is spread."""
    return world_size if stage else 1


def _place(stage: int | None, world_size: int) -> str:
    backend = "without DeepSpeed" if stage is None else f"under ZeRO-{stage}"
    return f"{backend} on {world_size} rank{'s' if world_size > 1 else ''}"


def _moved_weights(config: StageConfig, lineage: dict[str, Any], found: list[Change]) -> list[str]:
    """Weights that the run needs beside the checkpoint's, or is now said to start from, and that are others now."""
    named = [change for change in found if change.rule is Rule.content]
    needed = config.stage is Stage.dpo or config.adapter.kind is not AdapterKind.none
    if not needed and not named:
        return []
    then, now = lineage.get("base"), content_of(config)
    if then == now and (then is not None or not named):
        return []
    if then == now:
        return [str(change) for change in named]
    differ = sorted(name for name in {**(then or {}), **(now or {})} if (then or {}).get(name) != (now or {}).get(name))
    role = "the reference is measured from" if config.stage is Stage.dpo else "the run started from"
    return [
        *(str(change) for change in named),
        f"the weights that {role} ({lineage.get('start') or lineage.get('init_from')}) hold something else now: "
        f"{', '.join(differ)} differ{'s' if len(differ) == 1 else ''} in sha256",
    ]
