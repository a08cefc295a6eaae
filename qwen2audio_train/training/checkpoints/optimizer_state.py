"""The optimizer's state by the names of the parameters, whichever backend holds it and on however many ranks.

Every rank writes the values that it holds: all of each trained parameter without DeepSpeed and at ZeRO-0 (rank 0
alone), its share of each at ZeRO-1 to 3. Reading puts together what a rank holds now, so a run goes on under another
backend or on another number of ranks. Beside the state stand the float32 copies of weights that are trained in
bfloat16, and what belongs to no single weight: step counts, and the scales of quantised states, which fit the same
shares alone.

    optimizer/rank_00000.safetensors      tensors `parameter:state`; the header's `parameters` says what they cover
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen2audio_train.training.checkpoints.folder import CheckpointError

FOLDER = "optimizer"
MASTER = "master"
"""Name of the float32 copy of a weight among its states."""
GROUP_STEP = "group.step"
"""Name of a step count that the optimizer keeps in its parameter group."""


@dataclass(frozen=True)
class Share:
    """The part of a trained parameter whose state lies on this rank.

    Attributes:
        name, shape: of the whole parameter.
        start, numel: which of its values, flattened.
        held: the optimizer's own tensor, which may hold several parameters; the share begins at its place `offset`.
        is_weight: `held` is the parameter itself, not a copy.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    held: Tensor
    offset: int
    is_weight: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The share's values (numel,) of a tensor that is shaped as `held`, not copied."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass
class Entry:
    """What a file says of its share of one parameter.

    Attributes:
        held: number of values in the optimizer's own tensor.
        values: states with one number per weight.
        counts: states that are a single number in a tensor; `numbers`: in no tensor.
        scales: states of the whole of the optimizer's own tensor, written with its first share.
    """

    shape: list[int]
    start: int
    numel: int
    held: int
    values: list[str] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)


def shares(model: nn.Module, optimizer: Any) -> Iterator[Share]:
    """What this rank's optimizer, torch's own or DeepSpeed's around one, holds of the trained parameters of `model`."""
    trained: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: a share of every parameter, padded at its end
        for name, p in trained:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(p)]
            start = torch.distributed.get_rank() * numel
            held, numel = optimizer.fp32_partitioned_groups_flat[group], max(0, min(numel, p.ds_numel - start))
            yield Share(name, tuple(p.ds_shape), start, numel, held, offset)
    elif hasattr(optimizer, "bit16_groups") or hasattr(
        optimizer, "bf16_groups"
    ):  # ZeRO-1, ZeRO-2: a share of each group
        flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        for name, p in trained:
            if (share := p._hp_mapping) is not None:
                place, numel = share.lp_fragment_address, share.hp_fragment_address.numel
                held, offset = flat[share.param_group_index], share.hp_fragment_address.start
                yield Share(name, tuple(p.shape), place.start, numel, held, offset)
    else:
        for name, p in trained:
            yield Share(name, tuple(p.shape), 0, p.numel(), p, 0, is_weight=True)


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: torch.optim.Optimizer = optimizer
    return inner


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path, rank: int) -> None:
    """Write what this rank holds; every rank calls it under ZeRO-1 to 3, rank 0 otherwise."""
    inner = innermost(optimizer)
    steps = {id(p): group["step"] for group in inner.param_groups if "step" in group for p in group["params"]}
    tensors, entries, seen = {}, {}, set()
    for share in shares(model, optimizer):
        entry = entries[share.name] = Entry(list(share.shape), share.start, share.numel, share.held.numel())
        states: dict[str, Any] = dict(inner.state.get(share.held, {}))
        if not share.is_weight and share.held.dtype != _dtype_of(model, share.name):
            states[MASTER] = share.held
        if id(share.held) in steps:
            states[GROUP_STEP] = steps[id(share.held)]
        for key, value in states.items():
            if not torch.is_tensor(value):
                entry.numbers[key] = value
            elif value.shape == share.held.shape:
                entry.values.append(key)
                tensors[f"{share.name}:{key}"] = share.of(value).cpu().clone()
            elif value.numel() == 1 or id(share.held) not in seen:
                (entry.counts if value.numel() == 1 else entry.scales).append(key)
                tensors[f"{share.name}:{key}"] = value.detach().cpu().clone()
        seen.add(id(share.held))
    text = json.dumps({name: asdict(entry) for name, entry in entries.items()})
    save_file(tensors, folder / f"rank_{rank:05d}.safetensors", {"parameters": text})


def _dtype_of(model: nn.Module, name: str) -> torch.dtype:
    return model.get_parameter(name).dtype


class SavedOptimizer:
    """The state that the files of a checkpoint hold together.

    Raises:
        CheckpointError: there is no such state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, list[tuple[Any, Entry]]] = {}
        for path in sorted(folder.glob("rank_*.safetensors")):
            file = safe_open(path, framework="pt")
            for name, entry in json.loads(file.metadata()["parameters"]).items():
                self.found.setdefault(name, []).append((file, Entry(**entry)))
        if not self.found:
            raise CheckpointError(
                f"{folder}: holds no state of an optimizer; start from the checkpoint's weights: init_from="
            )

    def of(self, share: Share) -> tuple[Any, Entry]:
        """A file that knows the parameter of a share: the one that wrote this very share, if any did.

        Raises:
            CheckpointError: the parameter is unknown or of another shape, or its state belongs to other shares alone.
        """
        found = self.found.get(share.name, [])
        if not found:
            raise self.misfit(f"nothing was saved for {share.name}")
        same = (share.start, share.numel, share.held.numel())
        file, entry = next((pair for pair in found if (pair[1].start, pair[1].numel, pair[1].held) == same), found[0])
        if tuple(entry.shape) != share.shape:
            raise self.misfit(f"{share.name} was {tuple(entry.shape)} when saved, is {share.shape} now")
        if (entry.start, entry.numel, entry.held) != same and any(other.scales for _, other in found):
            raise self.misfit(f"the state of {share.name} is no value per weight, and was saved on other ranks' shares")
        return file, entry

    def values(self, share: Share, key: str) -> Tensor:
        """The values (numel,) of a share's state, put together from whichever files hold them.

        Raises:
            CheckpointError: some are nowhere.
        """
        end, parts, position = share.start + share.numel, [], share.start
        for file, entry in sorted(self.found[share.name], key=lambda pair: pair[1].start):
            stop = min(end, entry.start + entry.numel)
            if entry.start <= position < stop:
                saved = file.get_slice(f"{share.name}:{key}")
                parts.append(saved[position - entry.start : stop - entry.start])
                position = stop
        if position < end:
            raise self.misfit(f"values {position} to {end} of {share.name}:{key} are missing")
        return torch.cat(parts) if parts else torch.empty(0)

    def misfit(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: the state of the optimizer does not fit ({reason}); trainer.optim, the frozen parts "
            "and the adapter have to be those of the run that is resumed"
        )


@torch.no_grad()
def restore_optimizer(model: nn.Module, optimizer: Any, folder: Path, weight: Callable[[str], Tensor]) -> None:
    """Fill the optimizer of a fresh run with a saved state; learning rates and the like stay the recipe's.

    Args:
        weight: the saved weight of a parameter, for float32 copies that were not saved beside the state.

    Raises:
        CheckpointError: a parameter's state is missing, left over, or of another shape.
    """
    saved, inner = SavedOptimizer(folder), innermost(optimizer)
    groups = {id(p): group for group in inner.param_groups for p in group["params"]}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if lost := sorted(saved.found.keys() - trained):
        raise saved.misfit(f"{lost[0]} was trained when saved, and is not now")
    for share in shares(model, optimizer):
        file, entry = saved.of(share)
        group, state = groups.get(id(share.held), inner.param_groups[0]), inner.state[share.held]
        for key in (name for name in entry.values if name != MASTER):
            values = saved.values(share, key)
            share.of(state.setdefault(key, torch.zeros_like(share.held, dtype=values.dtype))).copy_(values)
        for key in (*entry.counts, *entry.scales):
            on_device = key in entry.scales or group.get("fused") or group.get("capturable")
            state[key] = file.get_tensor(f"{share.name}:{key}").to(share.held.device if on_device else "cpu")
        for key, number in entry.numbers.items():
            if key == GROUP_STEP:
                group["step"] = number
            else:
                state[key] = number
        if MASTER in entry.values:
            share.of(share.held).copy_(saved.values(share, MASTER))
        elif not share.is_weight:
            share.of(share.held).copy_(weight(share.name).flatten()[share.start : share.start + share.numel])
