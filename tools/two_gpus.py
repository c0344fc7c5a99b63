"""Pretend two GPUs on a CPU: a tensor says where it lies, and no operation takes tensors of both.

    with two_gpus():
        model = laid(model, places)  # by the names of modules: FIRST or SECOND
        ...  # RuntimeError where on CUDA tensors of two devices would meet; else the CPU's numbers

Made for tests: whoever has no GPU can still see that a model over several of them is edited alike.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# No kernel runs on `meta`, so torch lets another one answer for it: here that of the CPU.
CPU, FIRST, SECOND = map(torch.device, ("cpu", "meta:0", "meta:1"))
FUSED = "torch.optim.optimizer._get_fused_kernels_supported_devices"


@contextmanager
def two_gpus() -> Iterator[None]:
    """Inside, tensors may be moved to FIRST and SECOND, and made there."""
    with _Operations(), _Functions(), mock.patch(FUSED, lambda: ["cpu", "meta"]):
        yield


def laid(model: nn.Module, places: Mapping[str, torch.device]) -> nn.Module:
    """Move modules, by name, to their places, with the hooks that a device map has."""
    for name, place in places.items():
        model.get_submodule(name).to(place)
    return dispatch_model(model, dict(places))


class Placed(Tensor):
    """A tensor of the CPU (`held`) that is said to lie elsewhere."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device):
        form = {"strides": held.stride(), "dtype": held.dtype, "device": place}
        return Tensor._make_wrapper_subclass(cls, held.shape, **form)

    def __init__(self, held: Tensor, place: torch.device) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Answers what never becomes an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and "device" in kwargs:
            return torch.tensor(*args).to(kwargs["device"])
        if args and isinstance(args[0], Placed):
            if func is Tensor.tolist:
                return args[0].held.tolist()
            if func is Tensor.data.__get__:
                return args[0].detach()
            if func is Tensor.data.__set__:
                args[0].held = args[1].held
                return None
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                at = args[1] if isinstance(args[1], tuple) else (args[1],)
                at = tuple(torch.tensor(one) if isinstance(one, list) else one for one in at)
                args = (args[0], at, *args[2:])
        return func(*args, **kwargs)


def _run(func, args, kwargs):
    """Run an operation on what is held; as on CUDA, of a CPU only scalars and indices may join."""
    with torch._C.DisableTorchFunction():  # else each look at a tensor would be a call of its own
        name, found = func._schema.name.removeprefix("aten::"), []
        args = _held(args, found)
        kwargs = {key: _held(value, found) for key, value in kwargs.items()}
        there = {one.device for one in found if type(one) is Placed}
        beside = {one.device for one in found if one.dim() and "index" not in name}
        if len(there | beside) > 1 and name not in ("_to_copy", "copy_"):
            raise RuntimeError(f"{name}: expected tensors of one device, found {there | beside}")
        place = torch.device(kwargs.get("device") or next(iter(there), CPU))
        made = func(*args, **kwargs | ({"device": CPU} if "device" in kwargs else {}))
        if name.endswith("_"):  # in place
            return found[0] if func._schema.returns else None
        return made if place == CPU else _placed(made, place)


def _held(value, found: list[Tensor]):
    """Return the value with what placed tensors hold; add all its tensors to those found."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.held if type(value) is Placed else value
    if isinstance(value, list | tuple):
        return type(value)([_held(one, found) for one in value])
    return value


def _placed(value, place: torch.device):
    if isinstance(value, Tensor):
        return Placed(value, place)
    if isinstance(value, list | tuple):
        return type(value)([_placed(one, place) for one in value])
    return value
