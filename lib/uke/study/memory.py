"""How much memory a piece of work takes beyond what is held when it starts, and how a training takes less."""

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from uke.methods.lanes import replaced
from uke.models.model import blocks

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY, MEMBER, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MIB = 2**20
UNLIMITED = (
    2**60
)  # bytes; where no limit is set, the older kind of control group says one near 2**63


class Peak:
    """Measures from its making on: on CUDA what the allocator handed out there, on Linux the process's resident memory.

    Resident memory counts pages, so what an earlier piece of work has freed is given back to the system first.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device, self.start = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / MIB
        elif _forget():
            self.start = _resident("VmRSS")

    def mib(self) -> float | None:
        """Mebibytes at the highest point so far beyond the start; None where the system does not tell."""
        if self.start is None:
            return None
        highest = (
            torch.cuda.max_memory_allocated(self.device) / MIB
            if self.device.type == "cuda"
            else _resident("VmHWM")
        )
        return max(0.0, highest - self.start)


def free_mib(device: torch.device) -> float:
    """Mebibytes that can still be taken on the device; without end where the system does not tell."""
    if device.type == "cuda":
        # What torch's allocator holds in reserve is taken for the driver, and free for us.
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        ) / MIB
    try:
        whole = (
            int(re.search(r"^MemAvailable:\s+(\d+) kB", MEMORY.read_text(), re.MULTILINE)[1]) / 1024
        )
    except (OSError, TypeError):
        whole = float("inf")
    return min(whole, _left_to_group())


def _left_to_group() -> float:
    """Mebibytes that a container or a cluster's job leaves this process: the least that any of its control groups has left."""
    left = [float("inf")]
    try:
        memberships = [line.split(":", 2)[1:] for line in MEMBER.read_text().splitlines()]
    except OSError:
        return left[0]
    for kinds, path in memberships:
        if kinds and "memory" not in kinds.split(","):
            continue
        top, most, taken = (
            (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if kinds
            else (GROUPS, "memory.max", "memory.current")
        )
        own = top / path.strip("/")
        for folder in (own, *own.parents):
            limit = (
                (folder / most).read_text().strip()
                if folder.is_relative_to(top) and (folder / most).is_file()
                else "max"
            )
            if limit != "max" and int(limit) < UNLIMITED:
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)$",
                    (folder / "memory.stat").read_text(),
                    re.MULTILINE,
                )
                left.append(
                    (
                        int(limit)
                        - int((folder / taken).read_text())
                        + (int(cached[1]) if cached else 0)
                    )
                    / MIB
                )
    return max(0.0, min(left))


def _forget() -> bool:
    """Give freed memory back and let the kernel forget the highest mark so far; False where that cannot be done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field: str) -> float:
    """A field of the process's status in mebibytes."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) / 1024


def recomputed(model: nn.Module) -> AbstractContextManager[None]:
    """Trainings inside keep what goes into a block and compute the rest again in the backward pass: the same numbers, later."""
    return replaced({block: _again for _, block in blocks(model)})


def _again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # With a cache, to which a block adds what it reads, a second reading would be another one; without a gradient nothing is kept.
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return block.forward(*args, **kwargs)
    return checkpoint(block.forward, *args, use_reentrant=False, **kwargs)


def offloaded(model: nn.Module) -> AbstractContextManager[None]:
    """Trainings inside hold in the host's memory what they keep for the backward pass, weights aside: the same numbers, over the bus and back."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    host = save_on_cpu(pin_memory=model.device.type == "cuda")

    def pack(tensor: Tensor) -> Any:
        # A weight that is kept beside its input is on the device in any case.
        return tensor if tensor.untyped_storage().data_ptr() in weights else host.pack_hook(tensor)

    return saved_tensors_hooks(
        pack, lambda packed: packed if isinstance(packed, Tensor) else host.unpack_hook(packed)
    )


# In the order in which they are taken, with what is said of each. Inside both, what goes into a block is all that is kept, and that on the host.
WAYS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "activations are computed again where no cache is read": recomputed,
    "what a training keeps is held in the host's memory": offloaded,
}


@dataclass
class Thrift:
    """How the trainings of a model take less memory: no way at first, and one more each time that memory runs out."""

    model: nn.Module
    taken: list[str] = field(default_factory=list)

    def more(self) -> str | None:
        """Take one more way from here on; what is said of it, or None where there is no other on this device."""
        left = [
            way
            for way in WAYS
            if way not in self.taken
            and (self.model.device.type == "cuda" or WAYS[way] is not offloaded)
        ]
        self.taken += left[:1]
        return left[0] if left else None

    @property
    def notes(self) -> list[str]:
        """What the record of an edit says of them."""
        return [f"memory was short: {way}" for way in self.taken]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Trainings inside are made in the ways that were taken."""
        with ExitStack() as stack:
            for way in self.taken:
                stack.enter_context(WAYS[way](self.model))
            yield
