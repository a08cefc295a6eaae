"""The mean of several checkpoints of a run, as one more folder of weights.

Averaging the last checkpoints of a run does what a moving average of the weights would, from what is saved anyway: no
copy of the weights in memory, nothing to resume, and how many are taken is chosen afterwards.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints import folder as folders


@dataclass
class AverageOptions:
    """Keys of `launch/average.py`.

    Attributes:
        run_dir: run whose newest checkpoints are taken.
        last: how many of them.
        checkpoints: folders to take instead.
        output_dir: folder that the mean is written to, for `init_from`, `checkpoint` and plain transformers.
    """

    run_dir: str | None = None
    last: int = at_least(2, 5)
    checkpoints: list[str] = field(default_factory=list)
    output_dir: str = "???"


def average(options: AverageOptions) -> list[Path]:
    """Write the mean; what it is of.

    Raises:
        ConfigError: fewer than two checkpoints, adapters, or an output that is there.
        CheckpointError: one of them is damaged, or their weights differ in names or shapes.
    """
    chosen = [Path(path) for path in options.checkpoints]
    if not chosen and options.run_dir is not None:
        chosen = folders.complete_checkpoints(Path(options.run_dir))[-options.last :]
    if len(chosen) < 2:
        raise ConfigError(
            f"a mean needs two checkpoints or more, found {len(chosen)}; name them in checkpoints=[...], or a run_dir= "
            "that keeps some (trainer.save_total_limit)"
        )
    output = Path(options.output_dir)
    if output.exists():
        raise ConfigError(f"output_dir={output}: is there already")
    sources = [Path(folders.weights_folder(str(path))) for path in chosen]
    for path, source in zip(chosen, sources, strict=True):
        if (source / "adapter_config.json").is_file():
            raise ConfigError(f"{path}: the mean of adapters is not that of weights; export them merged first")
        if (path / folders.MANIFEST).is_file():
            folders.verify(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        made = Path(scratch) / "made"
        shutil.copytree(sources[-1], made, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in sorted(sources[-1].glob("*.safetensors")):
            save_file(_mean(file.name, sources), made / file.name, metadata={"format": "pt"})
        made.rename(output)
    return chosen


def _mean(name: str, sources: list[Path]) -> dict[str, Tensor]:
    """Tensor by tensor over one file of each folder, summed in float64 and of the type that was saved."""
    with ExitStack() as stack:
        for source in sources:
            if not (source / name).is_file():
                raise folders.CheckpointError(f"{source}: has no {name}, so these are no checkpoints of one model")
        files = [stack.enter_context(safe_open(source / name, framework="pt")) for source in sources]
        names = [set(file.keys()) for file in files]
        if any(found != names[0] for found in names):
            raise folders.CheckpointError(f"{sources[0]} and the others hold weights of other names")
        return {key: _mean_of([file.get_tensor(key) for file in files], key) for key in sorted(names[0])}


def _mean_of(tensors: list[Tensor], name: str) -> Tensor:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise folders.CheckpointError(f"{name} has the shapes {[tuple(tensor.shape) for tensor in tensors]}")
    if not tensors[0].is_floating_point():
        return tensors[-1]
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
