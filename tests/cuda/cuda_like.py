"""Tensors that say that they are on cuda:0 and compute on the CPU: devices that mix raise, waits are counted.

The path of code through a GPU can be walked without one: every operator that would fail there for want of one device
fails here, and every point where the host would wait for the device is counted with the line that it stands on. Of
kernels, streams and speed this says nothing. torch's own wrapper, autograd formula and autocast rules of the attention
kernel run as on a GPU; `kernel.py` stands in for what is below them.

A process has to be started with the library of `guard.cpp` preloaded, and to call `install` before anything is on a
device.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.cuda import kernel

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")

READERS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
}
"""Operators whose result's value or shape the host waits for."""

NEED_ONE_DEVICE = {"cat", "stack", "index_select", "gather", "embedding", "index_copy", "index_add", "copy_"}
"""Operators that refuse a CPU tensor even without dimensions."""

OTHER_KERNELS = {"_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"}
"""Asked whether they can take the loss of transcripts: not here."""

TRANSCRIPTS = {"_ctc_loss", "_ctc_loss_backward"}
"""The loss of transcripts takes lengths on the host."""

OWN = ("qwen2audio_train/", "/trl/", "/transformers/", "/accelerate/", "/peft/")

waits: collections.Counter[str] = collections.Counter()
"""How often the host has waited, by what for and where."""


def waited(kind: str) -> None:
    lines = [f for f in traceback.extract_stack() if any(name in f.filename for name in OWN)]
    where = f"{'/'.join(lines[-1].filename.split('/')[-2:])}:{lines[-1].lineno} {lines[-1].line}" if lines else "?"
    waits[f"{kind} {where}"] += 1


class CudaTensor(torch.Tensor):
    """Says cuda:0; its values are `host`, a tensor on the CPU."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> CudaTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        self.host = host
        return self

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.host!r})"

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        return CudaTensor(self.host.clone()).requires_grad_(self.requires_grad)

    def tolist(self) -> Any:
        waited("tolist")
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def new_tensor(self, data: Any, **options: Any) -> Any:
        waited("copy to the device")
        return CudaTensor(MAKERS["tensor"](data, dtype=options.get("dtype", self.dtype)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, list):
            waited("copy to the device")
            key = CudaTensor(MAKERS["tensor"](key))
        return torch.Tensor.__getitem__(self, key)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class CudaLike(TorchDispatchMode):
    """Makes what is asked for on a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_cuda(kwargs.get("device")) or any(isinstance(x, CudaTensor) for x in tree_flatten((args, kwargs))[0]):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after looking at where its arguments lie and whether the host would wait."""
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in leaves if isinstance(x, CudaTensor)]
    name = func._schema.name.split("::")[1]
    to_cuda = is_cuda(kwargs.get("device"))
    to_host = kwargs.get("device") is not None and not to_cuda
    _look(name, args, kwargs, leaves, ours, to_cuda, to_host)
    plain_args, plain = tree_map(_host, args), tree_map(_host, kwargs)
    if to_cuda:
        plain["device"] = torch.device("cpu")
    plain |= {"pin_memory": False} if "pin_memory" in plain else {}
    out = _compute(func, name, plain_args, plain)
    if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
        return args[0]
    if to_host or not (ours or to_cuda):
        return out
    if to_cuda and any(out is x for x in leaves):
        out = out.clone()
    known = {id(x.host): x for x in ours}
    return tree_map(lambda x: known.get(id(x), CudaTensor(x)) if isinstance(x, torch.Tensor) else x, out)


def _host(x: Any) -> Any:
    return x.host if isinstance(x, CudaTensor) else x


def _look(name: str, args: Any, kwargs: Any, leaves: Any, ours: Any, to_cuda: bool, to_host: bool) -> None:
    others = [x for x in leaves if not isinstance(x, CudaTensor)]
    if name == "_to_copy":
        if to_host and ours:
            waited("copy to the host")
        elif to_cuda and not ours and not kwargs.get("non_blocking"):
            waited("copy to the device")
        return
    if name == "copy_":
        if len(ours) == 1 and not (len(args) > 2 and args[2]):
            waited("copy to the device" if isinstance(args[0], CudaTensor) else "copy to the host")
        return
    if not ours or name in OTHER_KERNELS | TRANSCRIPTS:
        return
    indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    if indexes and any(x.dim() for x in others):
        waited("index that is on the host")
    elif bad := [x for x in others if x.dim() or name.rstrip("_") in NEED_ONE_DEVICE]:
        shapes = ([tuple(x.shape) for x in group] for group in (ours, bad))
        raise RuntimeError("{}: {} on cuda:0, {} on cpu".format(name, *shapes))
    if name in READERS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        waited(name)
    elif indexes and any(x.dtype == torch.bool for x in tree_flatten(args[1])[0] if isinstance(x, torch.Tensor)):
        waited("bool index")


def _compute(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name == "_varlen_attn":
        return kernel.forward(*args, **kwargs)
    if name == "_varlen_attn_backward":
        return kernel.backward(*args, **kwargs)
    if name in OTHER_KERNELS:
        return False
    if func is aten.addmm.dtype_out:
        return kwargs["out"].copy_(args[0].float() + args[1].float() @ args[2].float())
    return func(*args, **kwargs)


def _pinned(self: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(self, CudaTensor):
        raise RuntimeError("cannot pin a tensor that is on cuda:0: only dense CPU tensors can be pinned")
    return self


MAKERS: dict[str, Callable[..., Any]] = {"tensor": torch.tensor, "as_tensor": torch.as_tensor}


def _maker(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return data.to(device=device, **options) if device is not None else data.to(**options) if options else data
        if not is_cuda(device):
            return make(data, *args, device=device, **options)
        if len(data) if isinstance(data, (list, tuple)) else True:
            waited("copy to the device")
        return CudaTensor(make(data, *args, **options))

    return made


class Generator(torch.Generator):
    """On the CPU, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")


def install() -> CudaLike:
    """Let torch believe in one GPU; returns the mode under which everything is to run."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100",
        "_is_in_bad_fork": False,
    }
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        answers[name] = None
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        answers[name] = 0
    answers["reset_peak_memory_stats"] = None
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.autograd.set_multithreading_enabled(False)
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `.to` would put our shell into plain parameters
    torch.Tensor.pin_memory = _pinned  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    torch.tensor, torch.as_tensor = (_maker(MAKERS[name]) for name in ("tensor", "as_tensor"))
    return CudaLike()
