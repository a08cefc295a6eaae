"""What TRL logs, left on the device: its trainers read some fifteen numbers back after every forward.

Each reading waits for all that the device has yet to do. TRL gathers a number over the ranks before it reads it, so the
gather is where a `Figure` can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Figure:
    """A tensor that nobody reads yet: `item()` is itself, arithmetic gives another one, and every test of it holds.

    TRL tests figures to keep from dividing by zero; what comes of that is no number, and is left out of the means.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Among the arguments of a function of torch it is the tensor."""
        return function(*tree_map(_value, args), **tree_map(_value, kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Figure]:
        method = getattr(self.value, name)
        return lambda *args, **kwargs: Figure(method(*map(_value, args), **kwargs))

    def item(self) -> Figure:
        return self

    def __bool__(self) -> bool:
        return True


def _operator(name: str) -> Callable[..., Figure]:
    return lambda self, other: Figure(getattr(self.value, name)(_value(other)))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "gt"):
    setattr(Figure, f"__{_name}__", _operator(f"__{_name}__"))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Figure) else x


def tensor_of(figure: Any, like: Tensor) -> Tensor:
    """() float64 on the device of `like`: of a `Figure`, or of a number that was read after all."""
    value = _value(figure)
    return value.detach().double() if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)


@contextmanager
def unread(accelerator: Any) -> Iterator[None]:
    """Let the accelerator's gathers give this rank's own value, unread, for the time of the context."""
    accelerator.gather = accelerator.gather_for_metrics = lambda value: Figure(value)
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
