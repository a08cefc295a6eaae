"""The little that evaluation needs to know about being one of several processes."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(share: dict[int, T]) -> dict[int, T]:
    """The shares of all ranks in one, on every rank."""
    _, world = rank_and_world()
    if world == 1:
        return share
    shares: list[dict[int, T]] = [{} for _ in range(world)]
    dist.all_gather_object(shares, share)
    return {index: value for part in shares for index, value in part.items()}


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers weights from other ranks (ZeRO-3), so that all ranks have to run the same number."""
    _, world = rank_and_world()
    return world > 1 and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
