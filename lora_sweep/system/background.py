"""Work in a thread of its own, in order, and waiting for it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

WAIT_SECONDS = 5.0
"""How often a wait looks whether the thread is still alive."""


class Background:
    """One thread. Use it as a context manager: its end waits for all work.

    A thread that gets no memory for its own bookkeeping ends, and its executor never says so: what waited for it
    would wait for ever.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Puts the work behind what is waiting already; `result` has its outcome."""
        return self._executor.submit(work, *arguments)

    def result(self, future: "Future[Result]") -> Result:
        """What the work returned or raised. Raises MemoryError where its thread has died before it."""
        while True:
            try:
                return future.result(timeout=WAIT_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
                if not any(thread.is_alive() for thread in self._executor._threads):
                    raise MemoryError("a thread has died") from None

    def close(self) -> None:
        """Drops what is waiting, and waits for what is under way."""
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
