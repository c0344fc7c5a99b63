"""Measure the memory that a piece of work takes, and what is left."""

import ctypes
import gc
import os
import resource
from functools import cache
from pathlib import Path

import psutil
import torch

MIB = 2**20
CLEAR = Path("/proc/self/clear_refs")  # where Linux takes orders to forget the peak


@cache
def settle() -> None:
    """Exempt what is loaded by now, once: collecting before a measurement then takes no time."""
    gc.collect()
    gc.freeze()


class Peak:
    """The most memory held since it was made, beyond what was held then.

        peak = Peak(model.device)
        train()
        print(peak.mib())

    On CUDA what torch's allocator handed out, on Linux the resident memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        settle()
        gc.collect()
        self.device, self.start = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / MIB
            return
        try:  # give freed memory back, so that it counts when taken again
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
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return max(0.0, highest - self.start)


def free_mib(device: torch.device) -> float:
    """Return the mebibytes that can still be taken."""
    if device.type == "cuda":
        # What torch's allocator holds in reserve is used for the driver, but free for us.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reserve) / MIB
    free = psutil.virtual_memory().available / MIB
    if allowed := os.environ.get("SLURM_MEM_PER_NODE"):  # of the node's memory, to this job
        free = min(free, float(allowed) - psutil.Process().memory_info().rss / MIB)
    return free
