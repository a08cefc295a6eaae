"""Saved weights back into a model under any backend: none missing, none left over, none of another shape."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.integrations import deepspeed as zero

from qwen2audio_train.families.family import Family
from qwen2audio_train.training.checkpoints.folder import CheckpointError


@contextmanager
def kept_whole() -> Iterator[None]:
    """Hide ZeRO-3 from transformers and TRL for the time of the context.

    A new model is then created unsharded: the same random weights for every number of ranks, and full shapes. And a
    head that is whole is not gathered.
    """
    hidden = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = hidden


def whole(parameters: Iterable[Tensor], *, changes: bool = False) -> AbstractContextManager[Any]:
    """The parameters with all their elements for the time of the context, also where ZeRO-3 has cut them up.

    Every rank has to enter it. With `changes`, what rank 0 writes into them is kept on all ranks.
    """
    cut_up = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut_up:
        return nullcontext()
    import deepspeed

    modifier = 0 if changes else None
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(cut_up, modifier_rank=modifier)
    return gathered


def whole_state(model: nn.Module, keep: bool, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, one after the other; empty on ranks that do not `keep` them.

    Every rank calls it under ZeRO-3.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            with whole([parameter]):
                if keep:
                    state[name] = parameter.detach().to("cpu", copy=True)
    return state


class SavedWeights:
    """The safetensors files of a folder, read tensor by tensor under the names of a model's modules.

    Args:
        renamed: saved name -> name of the model's own tensor.
    """

    def __init__(self, files: Iterable[Path], renamed: Callable[[str], str]) -> None:
        opened = [safe_open(path, framework="pt") for path in sorted(files)]
        self.places = {renamed(name): (file, name) for file in opened for name in file.keys()}  # noqa: SIM118

    def __call__(self, name: str) -> Tensor:
        file, saved_name = self.places[name]
        tensor: Tensor = file.get_tensor(saved_name)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {own: tuple(file.get_slice(name).get_shape()) for own, (file, name) in self.places.items()}


@torch.no_grad()
def restore_weights(model: nn.Module, saved: SavedWeights, names: Iterable[str]) -> None:
    """Write saved tensors into those of `model` that `names` lists, in place; every rank calls it.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    wanted = set(names)
    own = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    check_fit(saved.shapes(), {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in own.items()})
    for name, parameter in own.items():
        with whole([parameter], changes=True):
            if not hasattr(parameter, "ds_id") or torch.distributed.get_rank() == 0:
                parameter.data.copy_(saved(name))


def check_fit(saved: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of saved tensors with those of the model.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    lost, more = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if lost or more:
        raise CheckpointError(f"saved weights do not fit the model: missing {lost[:3]}, left over {more[:3]}")
    for name, expected in own.items():
        if saved[name] != expected:
            raise CheckpointError(f"saved weights do not fit the model: {name} is {saved[name]}, expected {expected}")


def published_to_module(name: str, own: Container[str], family: Family) -> str:
    """Module name of a weight that a checkpoint names as it was published, or as the model's `own` names are."""
    return name if name in own else family.module_name(name)
