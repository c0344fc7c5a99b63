"""Measure the memory of a piece of work, and let trainings take less where it runs out."""

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from uke.methods.lanes import replaced
from uke.models.model import blocks

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class Peak:
    """The most memory held since it was made, beyond what was held then.

        peak = Peak(model.device)
        train()
        print(peak.mib())

    On CUDA what torch's allocator handed out, on Linux the resident memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device, self.start = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / MIB
            return
        try:  # give freed memory back, so that it counts when taken again; reset the kernel's mark
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5")
            self.start = psutil.Process().memory_info().rss / MIB
        except (OSError, AttributeError):  # not Linux
            pass

    def mib(self) -> float | None:
        """Return the peak in mebibytes; None where the system does not say."""
        if self.start is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.start
        highest = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) / 1024
        return max(0.0, highest - self.start)


def free_mib(device: torch.device) -> float:
    """Return the mebibytes that can still be taken, on the CPU within a cluster job's limits."""
    if device.type == "cuda":
        # What torch's allocator holds in reserve is used for the driver, but free for us.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reserve) / MIB
    return min([psutil.virtual_memory().available, *_left_in_groups()]) / MIB


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left in each control group (version 2) above this process."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else []
    for line in lines:
        path = GROUPS / line.removeprefix("0::/")
        for group in (path, *path.parents) if line.startswith("0::/") else ():
            limit = group / "memory.max"
            if limit.is_file() and limit.read_text().strip() != "max":
                pages = dict(line.split() for line in (group / "memory.stat").open())
                cached = int(pages.get("inactive_file", 0))  # dropped where memory is short
                used = int((group / "memory.current").read_text())
                yield max(0, int(limit.read_text()) - used + cached)


def checkpointed(model: nn.Module) -> AbstractContextManager[None]:
    """Store only the input of each block in trainings, and compute the rest again.

    Not by transformers' `gradient_checkpointing_enable`, which works in training mode alone, where
    dropout is on, and drops the cache that trainings of target vectors read.
    """
    return replaced({block: _checkpoint for _, block in blocks(model)})


def _checkpoint(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Reading twice would change a cache; without a gradient nothing is stored anyway.
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return block.forward(*args, **kwargs)
    return checkpoint(block.forward, *args, use_reentrant=False, **kwargs)


def offloaded(model: nn.Module) -> AbstractContextManager[None]:
    """Hold what trainings store, except for the weights, in the host's memory."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    host = save_on_cpu(pin_memory=model.device.type == "cuda")

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight else host.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else host.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


# In the order in which they are enabled, by what a record says of them. Scores stay the same.
FALLBACKS = {
    "activations are computed again where no cache is read": checkpointed,
    "activations are held in the host's memory": offloaded,
}


@dataclass
class MemoryFallbacks:
    """The fallbacks of a model's trainings: none at first, one more when memory runs out."""

    model: nn.Module
    enabled: list[str] = field(default_factory=list)

    def enable_next(self) -> str | None:
        """Enable one more fallback and name it; None where no other is left on this device."""
        useful = len(FALLBACKS) if self.model.device.type == "cuda" else 1
        left = [*FALLBACKS][len(self.enabled) : useful]
        self.enabled += left[:1]
        return left[0] if left else None

    @property
    def notes(self) -> list[str]:
        """What the record of an edit says of them."""
        return [f"memory was short: {name}" for name in self.enabled]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Train inside with the fallbacks that are enabled."""
        with ExitStack() as stack:
            for name in self.enabled:
                stack.enter_context(FALLBACKS[name](self.model))
            yield
