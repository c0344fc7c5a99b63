"""Memory: a peak that is missed or counted though it was before, free memory misread."""

import mmap
import sys

import pytest
import torch
from uke.study import memory
from uke.study.memory import MIB, Peak

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def fill(mib: int) -> None:
    """Touch so many mebibytes of the system and give them back, past a heap that may keep them."""
    with mmap.mmap(-1, mib * MIB) as taken:
        taken[:: mmap.PAGESIZE] = b"1" * (len(taken) // mmap.PAGESIZE)


@on_linux
def test_the_highest_point_since_the_start_is_seen_and_nothing_before_it():
    fill(192)
    held = torch.ones(128 * MIB, dtype=torch.uint8)
    peak = Peak(CPU)
    assert peak.mib() < 30
    fill(96)
    first = peak.mib()
    fill(32)
    assert 90 < first <= peak.mib() < first + 20 and held.all()


def test_a_system_that_does_not_say_gives_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
    assert Peak(CPU).mib() is None


def test_memory_that_torch_holds_in_reserve_on_a_gpu_is_free(monkeypatch):
    says = {"mem_get_info": (3 * MIB, 80 * MIB), "memory_reserved": 70 * MIB}
    for name, value in (says | {"memory_allocated": 12 * MIB}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_mib(torch.device("cuda", 0)) == 3 + 70 - 12
