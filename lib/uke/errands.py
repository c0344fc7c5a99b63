"""One thing at a time in a thread beside the kernel's own, so that a click on Stop or Undo, or an interrupt, is heard while it runs."""

import asyncio
import contextvars
import signal
import threading
from collections.abc import Callable
from typing import Any


class Errands:
    """Runs one errand at a time; `interrupted` is called where the kernel is interrupted meanwhile."""

    def __init__(self, interrupted: Callable[[], None]) -> None:
        self.interrupted = interrupted
        self._free = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._free.locked()

    def start(self, errand: Callable[[], None], ended: Callable[[], None] = lambda: None) -> bool:
        """Begin the errand and return; False, and nothing is begun, while another one runs. `ended` is called when the next may begin."""
        if not self._free.acquire(blocking=False):
            return False
        restore = self._listen()

        def run() -> None:
            try:
                errand()
            finally:
                restore()
                self._free.release()
                ended()

        # Widgets report to the cell or click they were called from, which the context knows.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="uke-errand", daemon=True)
        self._thread.start()
        return True

    def wait(self, seconds: float | None = None) -> None:
        """Return when the errand that runs has ended."""
        if self._thread:
            self._thread.join(seconds)

    def _listen(self) -> Callable[[], None]:
        """Hear an interrupt until the returned function is called: an idle kernel would ignore it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel
            return lambda: None
        earlier: list[Any] = []

        def listen() -> None:
            # A kernel puts its own handler back when the click that began the errand has been handled, so this comes after it.
            if self.busy:
                earlier.append(signal.signal(signal.SIGINT, lambda *_: self.interrupted()))

        def restore() -> None:
            if earlier:
                signal.signal(signal.SIGINT, earlier.pop())

        loop.call_soon(listen)
        return lambda: loop.call_soon_threadsafe(restore)
