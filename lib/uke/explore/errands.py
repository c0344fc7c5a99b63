"""One thing at a time in a thread beside the kernel's own, so that a click on Stop or Undo, or an interrupt, is heard while it runs."""

import asyncio
import contextvars
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


class Errands:
    """Runs one errand at a time; `interrupted` is called where the kernel is interrupted meanwhile."""

    def __init__(self, interrupted: Callable[[], None]) -> None:
        self.interrupted = interrupted
        self._free = threading.Lock()
        self._thread: threading.Thread | None = None
        try:  # made in a cell, that is in the thread that hears signals; JupyterLab may handle clicks in another
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # no kernel
            self._loop = None

    @property
    def busy(self) -> bool:
        return self._free.locked()

    def start(
        self,
        errand: Callable[[], None],
        ended: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> bool:
        """Call `begin`, let the errand run and return; False, and nothing is called, while another one runs.

        `ended` is called when the next may begin.
        """
        if not self._free.acquire(blocking=False):
            return False
        begin()
        restore = self._listen()

        def run() -> None:
            try:
                errand()
            finally:
                restore()
                self._free.release()
                ended()

        # Widgets report to the cell or click they were called from, which the context knows.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(run,), name="uke-errand", daemon=True
        )
        self._thread.start()
        return True

    def wait(self, seconds: float | None = None) -> None:
        """Return when the errand that runs has ended."""
        if self._thread:
            self._thread.join(seconds)

    def _listen(self) -> Callable[[], None]:
        """Hear an interrupt until the returned function is called: an idle kernel would ignore it."""
        if self._loop is None:
            return lambda: None
        earlier: list[Any] = []

        def listen() -> None:
            # While it handles a click a kernel has its own handler, so this one is put in its place afterwards.
            if self.busy:
                earlier.append(signal.signal(signal.SIGINT, lambda *_: self.interrupted()))

        def restore() -> None:
            if earlier:
                signal.signal(signal.SIGINT, earlier.pop())

        self._loop.call_soon_threadsafe(listen)
        return partial(self._loop.call_soon_threadsafe, restore)
