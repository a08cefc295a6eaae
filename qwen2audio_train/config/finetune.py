"""The keys of launch/finetune.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import MAX_SEED, SourceFormat


@dataclass
class FinetuneConfig:
    """A corpus, where to start, and what may be told where it cannot be guessed.

    Attributes:
        audio: folder, manifest, table, tar, Kaldi folder or data set; every form that `launch/data.py convert` reads.
        run_dir: folder of the run; everything that it writes is below it.
        name: of the run, and of the corpus in its tables.
        init_from: weights to start from: a hub id, a released checkpoint, a run folder, a checkpoint or an adapter.
        model: choice of recipes/model/; its weights are the start where there is no `init_from`.
        adapter: choice of recipes/adapter/.
        task, language: of the whole corpus, where no column says them.
        columns: our field -> the corpus's column; `meta.speaker` and `meta.split` are understood too.
        format, split: form of the corpus where its looks do not tell, and split of a hub data set.
        held_out: manifest to be scored on; without it a part of `audio` is held out.
        held_out_share: that part.
        guard: manifest of something else that is not to get worse; scored before and after.
        replay: manifest that is mixed into training, so that the model does not forget; with weight `replay_weight`.
        epochs: passes over the corpus, of which the steps follow; `max_steps` says them instead.
        max_examples: held-out examples of a source that are scored at most; 0 takes all.
        nproc_per_node: GPUs (processes).
        replay_weight: probability of drawing an example of `replay`.
        max_steps: optimiser steps; unset, they follow from `epochs`.
        max_new_tokens: longest answer in tokens.
        seed: of weights, order, the held-out part and dropout.
        num_threads: CPU threads of each process; 0 leaves torch's choice.
        overrides: any keys of the stage, as on the command line of launch/sft.py.
    """

    audio: str = "???"
    run_dir: str = "runs/${name}"
    name: str = "finetune"
    init_from: str | None = None
    model: str = "qwen2_audio_7b_instruct"
    adapter: str = "lora_projector"
    task: str | None = None
    language: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    format: SourceFormat = SourceFormat.auto
    split: str | None = None
    held_out: str | None = None
    held_out_share: float = at_least(0.01, 0.2, 0.9)
    guard: str | None = None
    replay: str | None = None
    replay_weight: float = at_least(0, 0.2, 0.95)
    epochs: float = at_least(0.01, 4.0)
    max_steps: int | None = at_least(1, None)
    max_examples: int = at_least(0, 300)
    max_new_tokens: int = at_least(1, 128)
    seed: int = at_least(0, 0, MAX_SEED)
    nproc_per_node: int = at_least(1, 1)
    num_threads: int = at_least(0, 0)
    overrides: list[str] = field(default_factory=list)
