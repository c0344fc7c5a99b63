"""What a notebook run without a person needs of the machine: its own kernel, a time limit, a GPU."""

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec


class Expired(KeyboardInterrupt):
    """A time limit is over; a KeyboardInterrupt, because asyncio swallows other exceptions of a signal handler."""


class Kernel(AsyncKernelManager):
    """The kernel of the interpreter that runs this, whatever kernelspecs are installed on the machine.

    It is spoken to through sockets in a folder of its own: parallel starts over TCP collide on ports, and anyone on the machine could listen.
    """

    connected = None

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="uke-")
        super().__init__(transport="ipc", ip=str(Path(self.folder.name) / "kernel"))

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    def client(self, **kwargs):
        self.connected = super().client(**kwargs)
        return self.connected

    def end(self) -> None:
        """Kill the kernel, however its run ended, and close the channels to it."""
        if self.connected:
            self.connected.stop_channels()
        if self.has_kernel:
            asyncio.run(self.shutdown_kernel(now=True))
        self.folder.cleanup()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Expired in the main thread after `seconds`, and again until the block is left."""

    def expire(number, frame):
        raise Expired

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def leased_device() -> Iterator[str]:
    """Name of the device to compute on; where several GPUs are visible, one that no other run of this user leases."""
    visible = _visible_gpus()
    if len(visible) < 2:
        yield f"cuda:{visible[0]}" if visible else f"cpu ({os.cpu_count()} cores)"
        return
    device, lock = _lease(visible)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield f"cuda:{device}"
    finally:
        lock.release()
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _visible_gpus() -> list[str]:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    return [name.strip() for name in shown.split(",") if name.strip()]


def _lease(devices: list[str]) -> tuple[str, FileLock]:
    while True:
        for device in devices:
            lock = FileLock(_locks() / f"cuda-{device}.lock")
            try:
                lock.acquire(blocking=False)
                return device, lock
            except Timeout:
                continue
        time.sleep(1)


def _locks() -> Path:
    folder = Path(tempfile.gettempdir()) / f"uke-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder
