"""Recipes over noise, one after the other, on one rank: `python -m tests.distributed.train_worker CORPUS FOLDER JOBS`.

JOBS is a list of `Job` fields in JSON. One process runs them all, as starting one takes longer than the runs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qwen2audio_train.training.stages.arguments import sums_in_float32
from tests.runs import pairs_recipe, recipe, train, warm_up_recipe

SOURCES = ("speech", "sound", "text")


@dataclass(frozen=True)
class Job:
    """A run in the folder `name`; `resume` is a checkpoint of an earlier one, `RUN/checkpoint-N`."""

    name: str
    overrides: tuple[str, ...] = ()
    sources: tuple[str, ...] = SOURCES
    resume: str = "auto"


def run(corpus: Path, folder: Path, job: Job) -> None:
    """Train a job to its end."""
    resume = job.resume if job.resume == "auto" else str(folder / job.resume)
    overrides = [*job.overrides, f"resume={resume}"]
    if job.sources == ("pairs",):
        config = pairs_recipe(corpus, folder / job.name, *overrides)
    elif job.sources == ("warm-up",):
        config = warm_up_recipe(corpus, folder / job.name, *overrides)
    else:
        config = recipe(corpus, folder / job.name, *overrides, sources=job.sources)
    trainer = train(config)
    if config.deepspeed.stage is not None:
        assert trainer.model_wrapped.zero_optimization_stage() == config.deepspeed.stage
        assert trainer.model_wrapped.bfloat16_enabled() == config.trainer.get("bf16", False)
        assert (trainer.model_wrapped.get_data_types()[1] == torch.float32) == sums_in_float32(config)
        third = torch.tensor([1 / 3])  # which bfloat16 does not hold
        assert torch.equal(trainer._prepare_inputs({"weight": third})["weight"], third)
    del trainer
    # What accelerate and transformers remember of DeepSpeed and bf16 would reach the next job.
    gc.collect()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=False)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def as_json(jobs: list[Job]) -> str:
    return json.dumps([asdict(job) for job in jobs])


def main(corpus: str, folder: str, jobs: str) -> None:
    for fields in json.loads(jobs):
        fields |= {key: tuple(fields[key]) for key in ("overrides", "sources")}
        run(Path(corpus), Path(folder), Job(**fields))


if __name__ == "__main__":
    main(*sys.argv[1:])
